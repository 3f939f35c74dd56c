"""From raw logits to the distribution that a request asked for: bias, penalties, temperature, min-p, top-k, top-p.

The order is vLLM's: logit bias, repetition penalty, frequency and presence penalties, temperature, then min-p, top-k
and top-p, each within what the one before has left. transformers runs min-p last, after top-p; each option by itself
gives the same as its processor there. Tokens as likely as the last one kept by top-p are kept too (as with top-k in
transformers), so that the result depends on the distribution alone and not on the order of a sort.

Penalties are exact under speculation: position t of a round counts the committed tokens and the proposals before t.

Left out: drawing from the distribution and verifying proposals (modules/sampling/verification.py).

Shapes: B rows (requests), T = K + 1 positions of a round, K proposals, V vocabulary, L history, E = L + K history and
proposals, R rows picked from B, N bias entries, W candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.request import SamplingParams

GREEDY_BELOW = 1e-5  # a lower temperature means greedy; dividing by it would overflow
TOP_P_CANDIDATES = (64, 1024)  # how many of the likeliest tokens are tried before the whole vocabulary is sorted


@dataclass(frozen=True, kw_only=True)
class History:
    """The tokens of every row so far; what penalties and seeded draws depend on."""

    token_BL: Tensor
    """int64: prompt, then committed output, then any valid token ids as padding."""
    prompt_length_B: Tensor
    """int64."""
    length_B: Tensor
    """int64: prompt and committed output."""

    def at(self, rows: Tensor) -> History:
        """The same for some rows."""
        return History(
            token_BL=self.token_BL[rows], prompt_length_B=self.prompt_length_B[rows], length_B=self.length_B[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Temperature and what cuts the tail off; neutral values where a row has no such option."""

    temperature_R: Tensor
    """fp32; 1 for greedy rows, which do not use it."""
    min_p_R: Tensor
    """0 is off."""
    top_k_R: Tensor
    """int64; 0 is off."""
    top_p_R: Tensor
    """1 is off."""
    largest_top_k: int
    """The largest of top_k_R, known without reading the tensor."""
    any_min_p: bool
    any_top_p: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> Filters:
        """One row a request."""
        # A greedy row keeps its likeliest token whatever the filters, so they are neutral there.
        kept = [None if is_greedy(p) else p for p in params]
        return Filters(
            temperature_R=torch.tensor([p.temperature if p else 1.0 for p in kept], device=device),
            min_p_R=torch.tensor([p.min_p if p else 0.0 for p in kept], device=device),
            top_k_R=torch.tensor([p.top_k if p else 0 for p in kept], dtype=torch.int64, device=device),
            top_p_R=torch.tensor([p.top_p if p else 1.0 for p in kept], device=device),
            largest_top_k=max((p.top_k for p in kept if p), default=0),
            any_min_p=any(p.min_p > 0 for p in kept if p),
            any_top_p=any(p.top_p < 1 for p in kept if p),
        )


@dataclass(frozen=True, kw_only=True)
class LogitOptions:
    """Every row's options, laid out for the batch. Built once when the batch changes, not once a round."""

    repetition_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor
    bias_row_N: Tensor
    """int64; the three bias tensors list (row, token, what is added)."""
    bias_token_N: Tensor
    bias_value_N: Tensor
    seed_B: Tensor
    """int64; 0 where a row has none."""
    filters: Filters
    """All B rows."""
    sampled_filters: Filters
    """The sampled rows only."""
    penalty_rows: Tensor
    """int64 row indices; so are those below. Rows with a penalty."""
    greedy_rows: Tensor
    """Temperature 0."""
    sampled_rows: Tensor
    """All others: with a seed or free."""
    free_B: Tensor
    """bool: sampled without a seed."""
    num_free: int
    """How many rows that is; known without reading the tensor, as num_sampled."""
    num_sampled: int

    @property
    def is_argmax(self) -> bool:
        """Whether all rows take the largest logit as it is: greedy, without bias or penalty."""
        return not (self.num_sampled or self.penalty_rows.numel() or self.bias_row_N.numel())

    @staticmethod
    def of(params: Sequence[SamplingParams], *, device: torch.device | str = "cpu") -> LogitOptions:
        """One row a request, in the batch's order."""

        def rows(wanted: list[bool]) -> Tensor:
            return torch.tensor([i for i, w in enumerate(wanted) if w], dtype=torch.int64, device=device)

        sampled = [not is_greedy(p) for p in params]
        free = [s and p.seed is None for s, p in zip(sampled, params, strict=True)]
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
            filters=Filters.of(params, device=device),
            sampled_filters=Filters.of([p for p, s in zip(params, sampled, strict=True) if s], device=device),
            penalty_rows=rows(penalised),
            greedy_rows=rows([not s for s in sampled]),
            sampled_rows=rows(sampled),
            free_B=torch.tensor(free, dtype=torch.bool, device=device),
            num_free=sum(free),
            num_sampled=sum(sampled),
        )


def is_greedy(params: SamplingParams) -> bool:
    """Whether a request takes the likeliest token."""
    return params.temperature < GREEDY_BELOW


def is_plain(params: SamplingParams) -> bool:
    """Whether p is the softmax of the target's own logits at the temperature (at 0: their argmax), nothing else."""
    shifted = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    cut = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return not shifted and (is_greedy(params) or not cut)


def shift_logits(logits_BTV: Tensor, *, options: LogitOptions, history: History | None, proposals_BK: Tensor) -> Tensor:
    """Logits after bias and penalties. The input itself, untouched, when no row has either; else an fp32 copy."""
    if not options.bias_row_N.numel() and not options.penalty_rows.numel():
        return logits_BTV
    shifted = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32), copy=True)
    if options.bias_row_N.numel():
        value_NT = options.bias_value_N.to(shifted.dtype)[:, None].expand(-1, shifted.shape[1])
        shifted.transpose(1, 2).index_put_((options.bias_row_N, options.bias_token_N), value_NT, accumulate=True)
    if options.penalty_rows.numel():
        if history is None:
            raise ValueError("history is None but a row has a penalty: pass the rows' tokens")
        rows = options.penalty_rows
        shifted[rows] = _penalise(
            shifted[rows],
            history=history.at(rows),
            proposals_RK=proposals_BK[rows],
            repetition_R=options.repetition_B[rows],
            presence_R=options.presence_B[rows],
            frequency_R=options.frequency_B[rows],
        )
    return shifted


def _penalise(
    logits_RTV: Tensor,
    *,
    history: History,
    proposals_RK: Tensor,
    repetition_R: Tensor,
    presence_R: Tensor,
    frequency_R: Tensor,
) -> Tensor:
    """Changes, in place, the logits of tokens that occur in the history or the proposals; all others have count 0.

    A token that occurs twice in the list is written twice with the same value.
    """
    token_RL = history.token_BL
    (R, L), K, T = token_RL.shape, proposals_RK.shape[1], logits_RTV.shape[1]
    place_L = torch.arange(L, device=token_RL.device)
    written_RL = place_L < history.length_B[:, None]
    output_RL = written_RL & (place_L >= history.prompt_length_B[:, None])
    zeros_RV = logits_RTV.new_zeros(R, logits_RTV.shape[2])
    token_RE = torch.cat([token_RL, proposals_RK], 1)
    outputs_RE = zeros_RV.scatter_add(1, token_RL, output_RL.to(zeros_RV.dtype)).gather(1, token_RE)
    everywhere_RE = zeros_RV.scatter_add_(1, token_RL, written_RL.to(zeros_RV.dtype)).gather(1, token_RE)

    # Position t of the round has the proposals before t in its context: a cumulative sum that starts with nothing.
    proposed_RTE = logits_RTV.new_zeros(R, T, L + K)
    torch.cumsum(proposals_RK[:, :, None] == token_RE[:, None], 1, dtype=proposed_RTE.dtype, out=proposed_RTE[:, 1:])
    outputs_RTE = outputs_RE[:, None] + proposed_RTE
    seen_RTE = everywhere_RE[:, None] + proposed_RTE > 0

    index_RTE = token_RE[:, None].expand(R, T, L + K)
    z = logits_RTV.gather(2, index_RTE)
    repetition = repetition_R.to(z.dtype)[:, None, None]
    z = torch.where(seen_RTE, torch.where(z < 0, z * repetition, z / repetition), z)
    z = z - frequency_R.to(z.dtype)[:, None, None] * outputs_RTE
    z = z - presence_R.to(z.dtype)[:, None, None] * (outputs_RTE > 0)
    return logits_RTV.scatter_(2, index_RTE, z)


def probabilities(logits_RTV: Tensor, *, filters: Filters) -> Tensor:
    """Softmax at the rows' temperatures, then min-p, top-k and top-p, renormalised. At least fp32.

    All three cut below a threshold on the probability, so the cut is one pass over the vocabulary. The threshold of
    top-k and top-p is looked for among the likeliest candidates.
    """
    dtype = torch.promote_types(logits_RTV.dtype, torch.float32)
    p = logits_RTV / filters.temperature_R.to(dtype)[:, None, None]
    torch.softmax(p, -1, out=p)  # in place: at this size a fresh buffer costs more than the arithmetic
    if not (filters.any_min_p or filters.largest_top_k or filters.any_top_p):
        return p
    cut_RT1 = filters.min_p_R.to(dtype)[:, None, None] * p.amax(-1, keepdim=True)
    if filters.largest_top_k:
        top_k_R11 = filters.top_k_R.clamp(max=p.shape[-1])[:, None, None]
        likeliest_RTW = p.topk(min(filters.largest_top_k, p.shape[-1]), -1).values
        kth_RT1 = likeliest_RTW.gather(-1, (top_k_R11 - 1).clamp_min(0).expand(-1, p.shape[1], 1))
        cut_RT1 = torch.where(top_k_R11 > 0, torch.maximum(cut_RT1, kth_RT1), cut_RT1)
    if filters.any_top_p:
        is_cut = filters.any_min_p or filters.largest_top_k > 0
        top_p_R = filters.top_p_R.to(dtype)
        cut_RT1 = torch.maximum(cut_RT1, _top_p_cut(p, cut_RT1=cut_RT1, is_cut=is_cut, top_p_R=top_p_R))
    p.mul_(torch.ge(p, cut_RT1, out=torch.empty_like(p)))  # numbers, not bools: several times faster
    return p.div_(p.sum(-1, keepdim=True))


def _top_p_cut(p_RTV: Tensor, *, cut_RT1: Tensor, is_cut: bool, top_p_R: Tensor) -> Tensor:
    """The probability of the last token that top-p keeps among those at or above the cut; 0 where top-p is off.

    Kept are the tokens with less than top_p of the remaining mass before them, likeliest first.
    """
    R, T, V = p_RTV.shape
    p_NV, cut_N1 = p_RTV.view(R * T, V), cut_RT1.reshape(R * T, 1)
    top_p_N = top_p_R[:, None].expand(R, T).reshape(R * T)
    found_N1 = torch.zeros_like(cut_N1)
    searched = (top_p_N < 1).nonzero()[:, 0]  # rows without an answer yet; peaked ones get theirs from few candidates
    for count in (*TOP_P_CANDIDATES, V):
        p, cut = p_NV if searched.numel() == R * T else p_NV[searched], cut_N1[searched]
        wanted = top_p_N[searched, None]
        if is_cut:
            wanted = wanted * (p * torch.ge(p, cut, out=torch.empty_like(p))).sum(-1, keepdim=True)
        likeliest = p.topk(min(count, V), -1).values
        remaining = likeliest * (likeliest >= cut)
        up_to = remaining.cumsum(-1)
        num_kept = (up_to - remaining < wanted).sum(-1, keepdim=True).clamp_min(1)
        found_N1[searched] = likeliest.gather(-1, num_kept - 1)
        searched = searched[(up_to[:, -1:] < wanted)[:, 0]] if count < V else searched[:0]
        if not searched.numel():
            break
    return found_N1.view(R, T, 1)


def target_distribution(
    logits_BTV: Tensor, *, options: LogitOptions, history: History | None, proposals_BK: Tensor
) -> Tensor:
    """The distribution of every row and position [B, T, V]; a greedy row's is one-hot at its argmax."""
    shifted = shift_logits(logits_BTV, options=options, history=history, proposals_BK=proposals_BK)
    p_BTV = probabilities(shifted, filters=options.filters)
    if options.greedy_rows.numel():
        best_RT1 = shifted[options.greedy_rows].argmax(-1, keepdim=True)
        p_BTV[options.greedy_rows] = torch.zeros_like(p_BTV[options.greedy_rows]).scatter_(-1, best_RT1, 1)
    return p_BTV


def _as_int64(seed: int) -> int:
    """Any integer, folded into what an int64 tensor holds."""
    folded = seed % 2**64
    return folded - 2**64 if folded >= 2**63 else folded
