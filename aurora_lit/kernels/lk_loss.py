"""The LK acceptance loss of rows of bf16 logits in one native pass (lk_loss.hpp); learning only.

What is left out: the formulas and the torch version (modules/losses/lk.py).

Shapes: K steps, C rows, D draft vocabulary.
"""

from __future__ import annotations

import ctypes

import torch

from aurora_lit.kernels import native


class _LKRows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("draft", "target", "target_lse", "weight", "top")),
        *((name, ctypes.c_int64) for name in ("K", "C", "D")),
        ("decay", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("loss", "alpha", "kl", "match")),
    )


def can_take(logits: torch.Tensor) -> bool:
    """Whether `lk_rows` covers this case."""
    return (
        logits.dtype == torch.bfloat16
        and logits.device.type == "cpu"
        and logits.shape[-1] % 16 == 0
        and native.library() is not None
    )


def lk_rows(
    draft_KCD: torch.Tensor,
    target_CD: torch.Tensor,
    *,
    target_lse_C: torch.Tensor,
    weight_KC: torch.Tensor,
    top_C: torch.Tensor | None,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted loss, acceptance rate, KL [K, C] and whether the first choices agree; draft logits become gradients."""
    library = native.library()
    assert library is not None
    K, C, D = draft_KCD.shape
    assert draft_KCD.is_contiguous()
    assert target_CD.is_contiguous()
    assert target_CD.dtype == torch.bfloat16
    inputs = (target_lse_C.float().contiguous(), weight_KC.float().contiguous())
    top_C = None if top_C is None else top_C.long().contiguous()
    loss_KC, alpha_KC, kl_KC = (torch.empty(K, C) for _ in range(3))
    match_KC = torch.empty(K, C, dtype=torch.bool)
    rows = _LKRows(K=K, C=C, D=D, decay=decay)
    tensors = (draft_KCD, target_CD, *inputs, top_C, loss_KC, alpha_KC, kl_KC, match_KC)
    names = ("draft", "target", "target_lse", "weight", "top", "loss", "alpha", "kl", "match")
    for name, tensor in zip(names, tensors, strict=True):
        setattr(rows, name, None if tensor is None else tensor.data_ptr())
    library.aurora_lk_rows(ctypes.byref(rows))
    return loss_KC, alpha_KC, kl_KC, match_KC
