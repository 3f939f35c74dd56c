"""The LK acceptance loss and its gradient, in one native pass (csrc/lk_loss.hpp); for learning only.

Leaves out: the formulas and the torch version (modules/losses/lk.py).

Shapes: K draft steps, C positions, D draft vocabulary.
"""

from __future__ import annotations

import ctypes

import torch

from aurora_lit.kernels import native


class _LKRows(ctypes.Structure):
    """LKRows in lk_loss.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("draft", "target", "target_lse", "weight", "gain", "top")),
        *((name, ctypes.c_int64) for name in ("K", "C", "D")),
        ("decay", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("loss", "alpha", "kl", "match")),
    )


_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def is_supported(logits: torch.Tensor) -> bool:
    """True if `lk_loss_and_gradient` supports these logits."""
    return (
        logits.dtype in _SUFFIXES
        and logits.device.type == "cpu"
        and logits.shape[-1] % 16 == 0
        and native.library() is not None
    )


def lk_loss_and_gradient(
    draft_KCD: torch.Tensor,
    target_CD: torch.Tensor,
    *,
    target_lse_C: torch.Tensor,
    weight_KC: torch.Tensor,
    gain_KC: torch.Tensor,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted loss, acceptance probability, KL divergence, and whether draft and target agree on the top token.

    All are [K, C]. The draft's logits are overwritten with their gradient. `target_lse_C`: log-sum-exp of the target's
    logits over its whole vocabulary; `gain_KC`: by which 1 − α is multiplied; `decay`: of the schedule between KL and
    acceptance loss.
    """
    library = native.library()
    assert library is not None
    K, C, D = draft_KCD.shape
    assert draft_KCD.is_contiguous()
    assert target_CD.is_contiguous()
    assert target_CD.dtype == draft_KCD.dtype
    inputs = tuple(each.float().contiguous() for each in (target_lse_C, weight_KC, gain_KC))
    loss_KC, alpha_KC, kl_KC = (torch.empty(K, C) for _ in range(3))
    match_KC = torch.empty(K, C, dtype=torch.bool)
    rows = _LKRows(K=K, C=C, D=D, decay=decay, top=None)  # the target's top token is that of its logits here
    tensors = (draft_KCD, target_CD, *inputs, loss_KC, alpha_KC, kl_KC, match_KC)
    names = ("draft", "target", "target_lse", "weight", "gain", "loss", "alpha", "kl", "match")
    for name, tensor in zip(names, tensors, strict=True):
        setattr(rows, name, tensor.data_ptr())
    getattr(library, f"aurora_lk_rows_{_SUFFIXES[draft_KCD.dtype]}")(ctypes.byref(rows))
    return loss_KC, alpha_KC, kl_KC, match_KC
