"""From raw logits to the distribution that a request asked for: bias, penalties, temperature, min-p, top-k, top-p.

The order is vLLM's: logit bias, repetition penalty, frequency and presence penalties, temperature, then min-p, top-k
and top-p, each applied to what the one before has kept. transformers runs min-p last, after top-p; each option alone
gives the same result as its processor there. Tokens as likely as the last one that top-p keeps are kept too (as with
top-k in transformers), so that the result depends on the distribution alone and not on the order of a sort.

These functions take one row of logits, and are the definition that csrc/sampler.hpp follows for all rows at once.

Leaves out choosing a token (modules/sampling/choice.py).

Shapes: V vocabulary, L context, U different tokens of a context, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_lit.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""A request with a lower temperature is greedy; dividing by it would overflow."""


def is_greedy(params: SamplingParams) -> bool:
    """True if a request takes the likeliest token."""
    return params.temperature < GREEDY_BELOW


def has_options(params: SamplingParams) -> bool:
    """True if penalties, a bias, top-k, top-p or min-p change p; the last three do not if it is greedy."""
    shifted = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return bool(shifted) or (truncated and not is_greedy(params))


def apply_bias_and_penalties(
    logits_V: Tensor, params: SamplingParams, *, context_L: Tensor, prompt_length: int
) -> Tensor:
    """A copy of the logits, at least fp32, after bias and penalties.

    Args:
        logits_V: the target's logits.
        params: of the request.
        context_L: int64, the tokens before the row: prompt, output, and the proposals that the row follows. Penalties
            are therefore exact under speculation.
        prompt_length: tokens of the context that belong to the prompt. Only the repetition penalty counts them.

    Raises:
        IndexError: the bias or the context names a token that is not in the vocabulary.
    """
    z_V = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32), copy=True)
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), device=z_V.device)
        z_V[biased] += torch.tensor(list(params.logit_bias.values()), dtype=z_V.dtype, device=z_V.device)
    if params.repetition_penalty != 1:
        seen_U = context_L.unique()  # type: ignore[no-untyped-call]
        z_U = z_V[seen_U]
        z_V[seen_U] = torch.where(z_U < 0, z_U * params.repetition_penalty, z_U / params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        seen_U, count_U = context_L[prompt_length:].unique(return_counts=True)  # type: ignore[no-untyped-call]
        z_V[seen_U] = z_V[seen_U] - params.frequency_penalty * count_U - params.presence_penalty
    return z_V


def probabilities(logits_V: Tensor, params: SamplingParams, *, temperature: float) -> Tensor:
    """Softmax at a positive temperature, then min-p, top-k and top-p, renormalised; at least fp32.

    All three remove the tokens below a threshold on the probability.
    """
    p_V = (logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)) / temperature).softmax(-1)
    least = params.min_p * p_V.max()
    if params.top_k:
        least = torch.maximum(least, p_V.topk(min(params.top_k, len(p_V))).values[-1])
    if params.top_p < 1:
        # Of the tokens sorted by probability, those are kept before which less than top_p of the remaining mass lies.
        remaining_V = p_V[p_V >= least].sort(descending=True).values
        cumulative_V = remaining_V.cumsum(-1)
        num_kept = (cumulative_V - remaining_V < params.top_p * remaining_V.sum()).sum().clamp_min(1)
        least = torch.maximum(least, remaining_V[num_kept - 1])
    p_V = torch.where(p_V >= least, p_V, 0.0)
    return p_V / p_V.sum()


def token_logprobs(logits_TV: Tensor, *, token_ids: list[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of given tokens and of the `num_top` likeliest, under the softmax of the target's raw logits.

    Row t of the logits is the position that token t was drawn at; further rows are ignored.
    """
    logits_TV = logits_TV[: len(token_ids)].float()
    lse_T1 = logits_TV.logsumexp(-1, keepdim=True)
    index_T1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_TV.device)[:, None]
    chosen = (logits_TV.gather(1, index_T1) - lse_T1)[:, 0].tolist()
    top = logits_TV.topk(min(num_top, logits_TV.shape[1]), -1)
    top_ids, top_values = top.indices.tolist(), (top.values - lse_T1).tolist()
    return tuple(
        TokenLogprob(token_id=t, logprob=c, top=tuple(zip(ids, values, strict=True)))
        for t, c, ids, values in zip(token_ids, chosen, top_ids, top_values, strict=True)
    )
