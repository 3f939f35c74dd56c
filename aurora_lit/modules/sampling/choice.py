"""The target's own token for rows of logits: the argmax, or drawn with Gumbel noise; with a request's options.

Verification accepts a proposal where it equals this token. Leaves out the options' definitions (distribution.py) and
the noise (noise.py).

Shapes: N rows, D rows with options, V vocabulary, L tokens of a context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_lit.kernels import native, sampler
from aurora_lit.kernels.sampler import DenseRows
from aurora_lit.modules.sampling.distribution import apply_bias_and_penalties, probabilities
from aurora_lit.modules.sampling.noise import gumbel


def choose(logits_NV: Tensor, *, temperature_N: Tensor, key_N: Tensor, position_N: Tensor) -> Tensor:
    """The argmax of logits at temperature 0, otherwise of logit · (1 / temperature) + noise; int64 [N].

    That is a draw from softmax(logits / temperature); see `gumbel` for the noise of `key_N` and `position_N`. The
    first of equal tokens is chosen. `PackedLinear.choose` does the same without storing logits.
    """
    token_N = logits_NV.argmax(-1)
    drawn = (temperature_N > 0).nonzero()[:, 0]
    if drawn.numel():
        perturbed = logits_NV[drawn].float() * temperature_N[drawn].float().reciprocal()[:, None]
        perturbed += gumbel(key_N[drawn], position_N[drawn], torch.arange(logits_NV.shape[1], device=perturbed.device))
        token_N[drawn] = perturbed.argmax(-1)
    return token_N


def choose_dense(logits_DV: Tensor, rows: DenseRows) -> Tensor:
    """A token for each row with its request's options: as `choose`, among the tokens that they keep; int64 [D].

    Bias and penalties change the logits, at temperature 0 too; min-p, top-k and top-p remove tokens. Native where
    there are kernels and the logits are fp32 on the CPU; `choose_dense_in_torch` is the reference. The target's logits
    are overwritten. Raises IndexError if a bias or a context names a token that is not in the vocabulary.
    """
    is_native = logits_DV.device.type == "cpu" and logits_DV.dtype == torch.float32 and logits_DV.is_contiguous()
    if is_native and native.library() is not None:
        return sampler.choose_dense(logits_DV, rows)
    return choose_dense_in_torch(logits_DV, rows)


def choose_dense_in_torch(logits_DV: Tensor, rows: DenseRows) -> Tensor:
    """`choose_dense` by the functions of distribution.py."""
    kept_DV = torch.empty_like(logits_DV, dtype=torch.promote_types(logits_DV.dtype, torch.float32))
    of_rows = (rows.params, rows.contexts, rows.prompt_lengths, rows.temperature_D.tolist())
    for logits_V, kept_V, p, context, prompt_length, temperature in zip(logits_DV, kept_DV, *of_rows, strict=True):
        context_L = context.to(logits_V.device, torch.int64)
        shifted_V = apply_bias_and_penalties(logits_V, p, context_L=context_L, prompt_length=prompt_length)
        if temperature > 0:
            is_kept_V = probabilities(shifted_V, p, temperature=temperature) > 0
            shifted_V.masked_fill_(~is_kept_V, float("-inf"))
        kept_V.copy_(shifted_V)
    return choose(kept_DV, temperature_N=rows.temperature_D, key_N=rows.key_D, position_N=rows.position_D)
