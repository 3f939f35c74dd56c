"""The target's own token for rows of logits: the argmax, or drawn with Gumbel noise; with a request's options.

Verification accepts a proposal where it equals this token. Leaves out the options' definitions (distribution.py) and
the noise (noise.py).

Shapes: N rows, D rows with options, V vocabulary, L longest context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aurora_lit.kernels import native, sampler
from aurora_lit.modules.sampling.distribution import apply_bias_and_penalties, probabilities
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.request import SamplingParams


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


def choose_dense(
    logits_DV: Tensor,
    params: Sequence[SamplingParams],
    contexts: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    temperature_D: Tensor,
    key_D: Tensor,
    position_D: Tensor,
) -> Tensor:
    """A token for each row with its request's options: as `choose`, among the tokens that they keep.

    Bias and penalties change the logits, at temperature 0 too; min-p, top-k and top-p remove tokens. Native where
    there are kernels and the logits are fp32 on the CPU; `choose_dense_in_torch` is the reference.

    Args:
        logits_DV: the target's logits; overwritten.
        params: of each row's request, without their temperature and seed.
        contexts: int64 on the CPU, the tokens before each row: prompt, output and the proposals that the row follows.
            Only rows with a penalty read them.
        prompt_lengths: tokens of each context that belong to the prompt.
        temperature_D: fp32; 0: greedy.
        key_D: int64, keys of the noise.
        position_D: int64, index in the output of each row's token.

    Returns:
        Tokens, int64 [D].

    Raises:
        IndexError: a bias or a context names a token that is not in the vocabulary.
    """
    is_native = logits_DV.device.type == "cpu" and logits_DV.dtype == torch.float32 and logits_DV.is_contiguous()
    implementation = sampler.choose_dense if is_native and native.library() is not None else choose_dense_in_torch
    return implementation(
        logits_DV,
        params=params,
        contexts=contexts,
        prompt_lengths=prompt_lengths,
        temperature_D=temperature_D,
        key_D=key_D,
        position_D=position_D,
    )


def choose_dense_in_torch(
    logits_DV: Tensor,
    *,
    params: Sequence[SamplingParams],
    contexts: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    temperature_D: Tensor,
    key_D: Tensor,
    position_D: Tensor,
) -> Tensor:
    """`choose_dense` by the functions of distribution.py."""
    kept_DV = torch.empty_like(logits_DV, dtype=torch.promote_types(logits_DV.dtype, torch.float32))
    temperatures = temperature_D.tolist()
    rows = zip(logits_DV, params, contexts, prompt_lengths, temperatures, kept_DV, strict=True)
    for logits_V, p, context, prompt_length, temperature, kept_V in rows:
        context_L = context.to(logits_V.device, torch.int64)
        shifted_V = apply_bias_and_penalties(logits_V, p, context_L=context_L, prompt_length=prompt_length)
        if temperature > 0:
            is_kept_V = probabilities(shifted_V, p, temperature=temperature) > 0
            shifted_V.masked_fill_(~is_kept_V, float("-inf"))
        kept_V.copy_(shifted_V)
    return choose(kept_DV, temperature_N=temperature_D, key_N=key_D, position_N=position_D)
