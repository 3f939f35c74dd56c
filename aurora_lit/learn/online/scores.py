"""Scores of a draft on served requests: its expected accepted length, computed from traces alone.

From every position of an answer, the draft continues the committed tokens, and proposal i counts with the probability
that all proposals up to it are accepted. For greedy requests this probability is 0 or 1, exactly as in serving. For
sampled ones it is Π Σ min(p, q) at the request's temperature: a surrogate, the upper bound of the acceptance rate with
shared noise (modules/losses/lk.py). It has less variance than what was accepted, and overrates all drafts. p is the
target's distribution within the draft vocabulary, and a position whose token lies outside it counts 0. So the target's
whole head is not needed. In expectation that is P Σ min(p, q), where P is the target's probability of the draft
vocabulary, and hardly less than Σ min(P p, q).

Leaves out which requests are scored, and what follows (learn/online/trial.py).

Shapes: K draft steps, B rows, T positions, N scored positions, S those of sampled requests, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.learn.data.trace_parts import crop, first_trained_position
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.lk import overlap
from aurora_lit.modules.losses.unroll import StepwiseChains
from aurora_lit.traces.record import Trace

TRIAL_POSITIONS = 1024
"""Positions of one forward pass, padding included, and of a held-out trace, which is cropped to them."""
_MAX_ROOTS, _MAX_SAMPLED_ROOTS = 32, 16
"""Positions of a segment from which the draft continues; of a longer one only every second, third, … does. Those of a
sampled request take more time, and vary less."""
_LEAST_PROBABILITY = 0.01
"""Proposals that are reached with a smaller probability are not counted."""


@dataclass(kw_only=True, eq=False)
class HeldOutRequest:
    """A request that is not learned from, in one or more segments."""

    request_id: str
    domain: str
    client: str = ""
    traces: list[Trace] = field(default_factory=list)
    champion_score: float | None = None
    """Cached until the champion changes or another segment arrives."""
    challenger_score: float | None = None
    """Of the last trial that scored the request, unless another segment has arrived."""
    was_tried: bool = False
    """True if a challenger's evidence contains it: it may not count again."""
    draw: float = 0.0
    """Drawn from [0, 1) when it is one of the older requests, of which the smallest draws are kept."""

    @property
    def num_bytes(self) -> int:
        """Memory of its traces."""
        return sum(trace.num_bytes for trace in self.traces)


@torch.no_grad()
def score_requests(
    module: DraftModule,
    requests: Sequence[HeldOutRequest],
    *,
    batch_positions: int,
    between_batches: Callable[[], None] = lambda: None,
) -> Iterator[tuple[HeldOutRequest, float]]:
    """Yield each request with its expected accepted length, bonus token included; too short ones are left out."""
    segments = [(request, crop(trace, TRIAL_POSITIONS)) for request in requests for trace in request.traces]
    lengths = [len(trace.token_ids_T) for _, trace in segments]
    sums: dict[str, tuple[float, int]] = {}
    for group in group_by_length(lengths, batch_positions):
        accepted = _accepted(module, [segments[i][1] for i in group])
        for (request, _), (total, count) in zip([segments[i] for i in group], accepted, strict=True):
            before = sums.get(request.request_id, (0.0, 0))
            sums[request.request_id] = (before[0] + total, before[1] + count)
        between_batches()
    for request in requests:
        total, count = sums.get(request.request_id, (0.0, 0))
        if count:
            yield request, 1 + total / count


def _accepted(module: DraftModule, traces: Sequence[Trace]) -> list[tuple[float, int]]:
    """For each trace: expected number of accepted proposals, summed over all roots, and the number of roots."""
    device = module.head_VdH.device
    batch = collate(traces, with_prompt=[False] * len(traces)).to(device)
    # There is no chain from before the text, and the last token of a segment has no successor to compare with.
    roots_B = [slice(max(1, first_trained_position(trace)), len(trace.token_ids_T) - 1) for trace in traces]
    needed_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.bool)
    for row, roots in enumerate(roots_B):
        most = _MAX_SAMPLED_ROOTS if traces[row].verify == "sampled" else _MAX_ROOTS
        stride = -(-(roots.stop - roots.start) // most)
        needed_BT[row, roots.start : roots.stop : max(1, stride)] = True
    counts = needed_BT.sum(1).tolist()
    if not sum(counts):
        return [(0.0, 0) for _ in traces]
    chains = StepwiseChains(
        module.draft,
        token_ids_BT=batch.token_ids_BT,
        aux_BT3H=batch.aux_BT3H.to(module.draft.fc.weight.dtype),  # autocast, if it is on, casts them again
        embed=module.embed,
        needed_BT=needed_BT.to(device),
    )
    total_B = torch.zeros(len(traces))
    reached_N = torch.ones(sum(counts))
    end_B = torch.tensor([roots.stop for roots in roots_B])
    for step in range(module.num_steps):
        row_N, target_N = (index_M[: chains.count].cpu() for index_M in (chains.row_M, chains.target_M))
        reached_N = reached_N * _acceptance(module, traces, chains.hidden_MH, row_N, target_N)
        total_B.index_add_(0, row_N, reached_N)
        kept_N = ((reached_N > _LEAST_PROBABILITY) & (target_N + 1 < end_B[row_N])).nonzero()[:, 0]
        if step + 1 == module.num_steps or not len(kept_N):
            break
        chains.advance(kept_N.to(device))
        reached_N = reached_N[kept_N]
    return list(zip(total_B.tolist(), counts, strict=True))


def _acceptance(
    module: DraftModule, traces: Sequence[Trace], hidden_MH: Tensor, row_N: Tensor, target_N: Tensor
) -> Tensor:
    """Probability that the proposal for the token after each position is accepted [N], on the CPU.

    Of sampled requests it is the surrogate. `row_N`: the position's trace, ascending. `hidden_MH`: may have more rows.
    """
    draft, device = module.draft, module.head_VdH.device
    logits_MD = draft.compute_logits(hidden_MH)
    proposal_M = draft.draft_token_ids[first_choice(logits_MD)].cpu()
    accept_N, is_sampled_N = torch.empty(len(row_N)), torch.zeros(len(row_N), dtype=torch.bool)
    last, temperatures, known = [], [], []  # of the sampled rows
    start = 0
    for trace, count in zip(traces, torch.bincount(row_N, minlength=len(traces)).tolist(), strict=True):
        rows = slice(start, start + count)
        start = rows.stop
        target_C = target_N[rows]
        token_C = trace.token_ids_T[target_C + 1].long()
        if trace.verify != "sampled":
            accept_N[rows] = (proposal_M[rows] == token_C).float()
        elif count:
            is_sampled_N[rows] = True
            last.append(trace.last_TH[target_C])
            temperatures.append(torch.full((count, 1), trace.temperature))
            known.append(draft.t2d[token_C.to(device)])
    if last:  # in one product: the head is larger than the caches
        temperature_S1 = torch.cat(temperatures).to(device)
        q_SD = (logits_MD[: len(row_N)][is_sampled_N.to(device)].float() / temperature_S1).softmax(-1)
        last_SH = torch.cat(last).to(device, module.head_VdH.dtype)
        p_SD = (module.logit_transform((last_SH @ module.head_VdH.T).float()) / temperature_S1).softmax(-1)
        accept_N[is_sampled_N] = (overlap(p_SD, q_SD) * torch.cat(known)).cpu()
    return accept_N


def first_choice(logits_ND: Tensor) -> Tensor:
    """argmax over D [N], in two passes of which torch vectorises the longer; a plain argmax takes thrice as long."""
    N, D = logits_ND.shape
    if D % 64 or not N:
        return logits_ND.argmax(-1)
    parts_NP = logits_ND.view(N, -1, 64)
    part_N = parts_NP.amax(-1).argmax(-1)
    return part_N * 64 + parts_NP[torch.arange(N, device=part_N.device), part_N].argmax(-1)
