"""From raw logits to the distribution that a request asked for: bias, penalties, temperature, min-p, top-k, top-p.

The order is vLLM's: logit bias, repetition penalty, frequency and presence penalties, temperature, then min-p, top-k
and top-p, each applied to what the one before has kept. transformers runs min-p last, after top-p; each option alone
gives the same result as its processor there. Tokens as likely as the last one that top-p keeps are kept too (as with
top-k in transformers), so that the result depends on the distribution alone and not on the order of a sort.

Penalties are exact under speculation: column t of a round counts the committed tokens and the proposals before t.

Leaves out drawing (modules/sampling/noise.py) and verification (modules/sampling/verification.py).

Shapes: B sequences, T = K + 1 columns of a round, K proposals, V vocabulary, L history, E = L + K history and
proposals, R sequences selected from B, N bias entries, W candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""A request with a lower temperature is greedy; dividing by it would overflow."""
TOP_P_CANDIDATES = (64, 1024)
"""How many of the likeliest tokens top-p searches, in turn, before it sorts the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The tokens of every sequence so far. Penalties and seeded draws depend on them."""

    token_BL: Tensor
    """int64. Prompt, then committed output, then any valid token ids as padding."""
    prompt_length_B: Tensor
    """int64."""
    length_B: Tensor
    """int64. Prompt and committed output."""

    def select(self, rows: Tensor) -> History:
        """The history of some sequences of the batch."""
        return History(
            token_BL=self.token_BL[rows], prompt_length_B=self.prompt_length_B[rows], length_B=self.length_B[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Temperature, min-p, top-k and top-p of every sequence; neutral values where a request does not set one."""

    temperature_R: Tensor
    """fp32; 1 for greedy sequences, which do not use it."""
    min_p_R: Tensor
    """fp32; 0 is off."""
    top_k_R: Tensor
    """int64; 0 is off."""
    top_p_R: Tensor
    """fp32; 1 is off."""
    max_top_k: int
    """The largest of `top_k_R`, known without reading the tensor."""
    uses_min_p: bool
    """True if any sequence sets min-p."""
    uses_top_p: bool

    @property
    def truncates(self) -> bool:
        """True if any sequence sets min-p, top-k or top-p."""
        return self.uses_min_p or self.max_top_k > 0 or self.uses_top_p

    @staticmethod
    def from_params(params: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> Filters:
        """One row for each request."""
        # Greedy sequences take the argmax, which no filter removes, so their values are neutral.
        kept = [None if is_greedy(p) else p for p in params]
        return Filters(
            temperature_R=torch.tensor([p.temperature if p else 1.0 for p in kept], device=device),
            min_p_R=torch.tensor([p.min_p if p else 0.0 for p in kept], device=device),
            top_k_R=torch.tensor([p.top_k if p else 0 for p in kept], dtype=torch.int64, device=device),
            top_p_R=torch.tensor([p.top_p if p else 1.0 for p in kept], device=device),
            max_top_k=max((p.top_k for p in kept if p), default=0),
            uses_min_p=any(p.min_p > 0 for p in kept if p),
            uses_top_p=any(p.top_p < 1 for p in kept if p),
        )


@dataclass(frozen=True, kw_only=True)
class LogitOptions:
    """The sampling options of a batch as tensors. Built when the batch's composition changes, not every round."""

    repetition_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor
    bias_row_N: Tensor
    """int64. The three bias tensors list the entries (row of the batch, token id, value added to the logit)."""
    bias_token_N: Tensor
    bias_value_N: Tensor
    seed_B: Tensor
    """int64; 0 for requests without a seed."""
    filters: Filters
    """Of all B sequences."""
    sampled_filters: Filters
    """Of the sampled sequences only."""
    penalty_rows: Tensor
    """int64 indices into the batch, as the next two: sequences with a penalty."""
    greedy_rows: Tensor
    """Sequences at temperature 0."""
    sampled_rows: Tensor
    """All others, seeded and unseeded."""
    unseeded_B: Tensor
    """bool: sampled without a seed."""
    num_unseeded: int
    """Number of unseeded sequences, known without reading the tensor, as `num_sampled`."""
    num_sampled: int

    @property
    def uses_raw_argmax(self) -> bool:
        """True if every sequence takes the argmax of the raw logits: all are greedy, without bias or penalty."""
        return not (self.num_sampled or self.penalty_rows.numel() or self.bias_row_N.numel())

    @staticmethod
    def from_params(params: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> LogitOptions:
        """The options of a batch's requests, in the batch's order."""

        def indices_of(selected: list[bool]) -> Tensor:
            return torch.tensor([i for i, s in enumerate(selected) if s], dtype=torch.int64, device=device)

        sampled = [not is_greedy(p) for p in params]
        unseeded = [s and p.seed is None for s, p in zip(sampled, params, strict=True)]
        bias = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias.items()]
        penalised = [p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params]
        return LogitOptions(
            repetition_B=torch.tensor([p.repetition_penalty for p in params], device=device),
            presence_B=torch.tensor([p.presence_penalty for p in params], device=device),
            frequency_B=torch.tensor([p.frequency_penalty for p in params], device=device),
            bias_row_N=torch.tensor([b[0] for b in bias], dtype=torch.int64, device=device),
            bias_token_N=torch.tensor([b[1] for b in bias], dtype=torch.int64, device=device),
            bias_value_N=torch.tensor([b[2] for b in bias], dtype=torch.float32, device=device),
            seed_B=torch.tensor([_as_int64(p.seed or 0) for p in params], dtype=torch.int64, device=device),
            filters=Filters.from_params(params, device=device),
            sampled_filters=Filters.from_params([p for p, s in zip(params, sampled, strict=True) if s], device=device),
            penalty_rows=indices_of(penalised),
            greedy_rows=indices_of([not s for s in sampled]),
            sampled_rows=indices_of(sampled),
            unseeded_B=torch.tensor(unseeded, dtype=torch.bool, device=device),
            num_unseeded=sum(unseeded),
            num_sampled=sum(sampled),
        )


def is_greedy(params: SamplingParams) -> bool:
    """True if a request takes the likeliest token."""
    return params.temperature < GREEDY_BELOW


def uses_temperature_only(params: SamplingParams) -> bool:
    """True if p is the softmax of the target's raw logits at the temperature (at 0: their argmax) and nothing else."""
    shifted = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return not shifted and (is_greedy(params) or not truncated)


def apply_bias_and_penalties(
    logits_BTV: Tensor, *, options: LogitOptions, history: History | None, proposals_BK: Tensor
) -> Tensor:
    """Logits after bias and penalties: the input itself if no request has either, else an fp32 copy.

    Raises:
        ValueError: `history` is None but a sequence has a penalty.
    """
    if not options.bias_row_N.numel() and not options.penalty_rows.numel():
        return logits_BTV
    shifted = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32), copy=True)
    if options.bias_row_N.numel():
        value_NT = options.bias_value_N.to(shifted.dtype)[:, None].expand(-1, shifted.shape[1])
        shifted.transpose(1, 2).index_put_((options.bias_row_N, options.bias_token_N), value_NT, accumulate=True)
    if options.penalty_rows.numel():
        if history is None:
            raise ValueError("history is None but a sequence has a penalty: pass the sequences' tokens")
        rows = options.penalty_rows
        shifted[rows] = _apply_penalties(
            shifted[rows],
            history=history.select(rows),
            proposals_RK=proposals_BK[rows],
            repetition_R=options.repetition_B[rows],
            presence_R=options.presence_B[rows],
            frequency_R=options.frequency_B[rows],
        )
    return shifted


def _apply_penalties(
    logits_RTV: Tensor,
    *,
    history: History,
    proposals_RK: Tensor,
    repetition_R: Tensor,
    presence_R: Tensor,
    frequency_R: Tensor,
) -> Tensor:
    """Penalise, in place, the tokens that occur in the history or the proposals; all others have count 0.

    A token that occurs twice in the list is written twice with the same value.
    """
    token_RL = history.token_BL
    (R, L), K, T = token_RL.shape, proposals_RK.shape[1], logits_RTV.shape[1]
    position_L = torch.arange(L, device=token_RL.device)
    is_token_RL = position_L < history.length_B[:, None]
    is_output_RL = is_token_RL & (position_L >= history.prompt_length_B[:, None])
    zeros_RV = logits_RTV.new_zeros(R, logits_RTV.shape[2])
    token_RE = torch.cat([token_RL, proposals_RK], 1)
    output_count_RE = zeros_RV.scatter_add(1, token_RL, is_output_RL.to(zeros_RV.dtype)).gather(1, token_RE)
    count_RE = zeros_RV.scatter_add_(1, token_RL, is_token_RL.to(zeros_RV.dtype)).gather(1, token_RE)

    # The context of column t includes the proposals before t: an exclusive cumulative sum.
    proposed_RTE = logits_RTV.new_zeros(R, T, L + K)
    torch.cumsum(proposals_RK[:, :, None] == token_RE[:, None], 1, dtype=proposed_RTE.dtype, out=proposed_RTE[:, 1:])
    output_count_RTE = output_count_RE[:, None] + proposed_RTE
    occurs_RTE = count_RE[:, None] + proposed_RTE > 0

    index_RTE = token_RE[:, None].expand(R, T, L + K)
    z = logits_RTV.gather(2, index_RTE)
    repetition = repetition_R.to(z.dtype)[:, None, None]
    z = torch.where(occurs_RTE, torch.where(z < 0, z * repetition, z / repetition), z)
    z = z - frequency_R.to(z.dtype)[:, None, None] * output_count_RTE
    z = z - presence_R.to(z.dtype)[:, None, None] * (output_count_RTE > 0)
    return logits_RTV.scatter_(2, index_RTE, z)


def probabilities(logits_RTV: Tensor, *, filters: Filters) -> Tensor:
    """Softmax at each sequence's temperature, then min-p, top-k and top-p, renormalised; at least fp32.

    All three remove the tokens below a threshold on the probability, so one pass over the vocabulary applies them
    together. The thresholds of top-k and top-p are found among the likeliest candidates.
    """
    dtype = torch.promote_types(logits_RTV.dtype, torch.float32)
    p = logits_RTV / filters.temperature_R.to(dtype)[:, None, None]
    torch.softmax(p, -1, out=p)  # in place: a new buffer of this size costs more than the arithmetic
    if not filters.truncates:
        return p
    threshold_RT1 = filters.min_p_R.to(dtype)[:, None, None] * p.amax(-1, keepdim=True)
    if filters.max_top_k:
        top_k_R11 = filters.top_k_R.clamp(max=p.shape[-1])[:, None, None]
        likeliest_RTW = p.topk(min(filters.max_top_k, p.shape[-1]), -1).values
        kth_RT1 = likeliest_RTW.gather(-1, (top_k_R11 - 1).clamp_min(0).expand(-1, p.shape[1], 1))
        threshold_RT1 = torch.where(top_k_R11 > 0, torch.maximum(threshold_RT1, kth_RT1), threshold_RT1)
    if filters.uses_top_p:
        is_truncated = filters.uses_min_p or filters.max_top_k > 0
        top_p_R = filters.top_p_R.to(dtype)
        threshold_RT1 = torch.maximum(
            threshold_RT1, _top_p_threshold(p, threshold_RT1=threshold_RT1, is_truncated=is_truncated, top_p_R=top_p_R)
        )
    p.mul_(torch.ge(p, threshold_RT1, out=torch.empty_like(p)))  # floats, not bools: several times faster
    return p.div_(p.sum(-1, keepdim=True))


def _top_p_threshold(p_RTV: Tensor, *, threshold_RT1: Tensor, is_truncated: bool, top_p_R: Tensor) -> Tensor:
    """The probability of the last token that top-p keeps among those at or above the threshold; 0 where it is off.

    With tokens sorted by probability, top-p keeps those before which less than top_p of the remaining mass lies.
    """
    R, T, V = p_RTV.shape
    p_NV, threshold_N1 = p_RTV.view(R * T, V), threshold_RT1.reshape(R * T, 1)
    top_p_N = top_p_R[:, None].expand(R, T).reshape(R * T)
    result_N1 = torch.zeros_like(threshold_N1)
    searched = (top_p_N < 1).nonzero()[:, 0]  # rows still without a result; peaked ones need few candidates
    for count in (*TOP_P_CANDIDATES, V):
        p, threshold = p_NV if searched.numel() == R * T else p_NV[searched], threshold_N1[searched]
        mass = top_p_N[searched, None]
        if is_truncated:
            mass = mass * (p * torch.ge(p, threshold, out=torch.empty_like(p))).sum(-1, keepdim=True)
        likeliest = p.topk(min(count, V), -1).values
        remaining = likeliest * (likeliest >= threshold)
        cumulative = remaining.cumsum(-1)
        num_kept = (cumulative - remaining < mass).sum(-1, keepdim=True).clamp_min(1)
        result_N1[searched] = likeliest.gather(-1, num_kept - 1)
        searched = searched[(cumulative[:, -1:] < mass)[:, 0]] if count < V else searched[:0]
        if not searched.numel():
            break
    return result_N1.view(R, T, 1)


def target_distribution(
    logits_BTV: Tensor, *, options: LogitOptions, history: History | None, proposals_BK: Tensor
) -> Tensor:
    """The distribution p of every sequence and column [B, T, V]; a greedy sequence's is one-hot at its argmax."""
    shifted = apply_bias_and_penalties(logits_BTV, options=options, history=history, proposals_BK=proposals_BK)
    p_BTV = probabilities(shifted, filters=options.filters)
    if options.greedy_rows.numel():
        best_RT1 = shifted[options.greedy_rows].argmax(-1, keepdim=True)
        p_BTV[options.greedy_rows] = torch.zeros_like(p_BTV[options.greedy_rows]).scatter_(-1, best_RT1, 1)
    return p_BTV


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


def _as_int64(seed: int) -> int:
    """Any integer, wrapped around to int64."""
    folded = seed % 2**64
    return folded - 2**64 if folded >= 2**63 else folded
