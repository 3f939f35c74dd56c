"""The gate decides whether the challenger may replace the champion, by their scores on requests not yet learned from.

The score is the expected accepted length, computed from traces alone: from every position of an answer, the draft
continues the committed tokens, and proposal i counts with the probability that all proposals up to it are accepted. For
greedy requests this probability is 0 or 1, exactly as in serving. For sampled ones it is Π Σ min(p, q) at the request's
temperature: a surrogate, the upper bound of the acceptance rate with shared noise (modules/losses/lk.py). It has less
variance than what was accepted, and overrates both drafts. p is the target's distribution within the draft vocabulary,
and a position whose token lies outside it counts 0. So the target's whole head is not needed. In expectation that is
P Σ min(p, q), where P is the target's probability of the draft vocabulary, and hardly less than Σ min(P p, q).

A trial scores both drafts on the waiting requests that no challenger was tried on, by turns of their clients, until the
evidence suffices or does not promise to. By those that are never learned from the drafts are compared in domains of the
past. A mean is one over clients, and no client alone can have a challenger refused for a domain while several have a
say. Leaves out which requests these are (learn/online/held_out.py), how evidence is weighed
(drafts/evidence.py), when a trial is held (learn/online/loop.py), and writing checkpoints of drafts that pass
(drafts/versions.py).

Shapes: K draft steps, B rows, T positions, N scored positions, S those of sampled requests, D draft vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora_lit.drafts.evidence import FEWEST_FOR_A_SAY, Evidence, agreed
from aurora_lit.learn.data.collate import collate, group_by_length
from aurora_lit.learn.data.trace_parts import crop, first_trained_position
from aurora_lit.learn.online.held_out import HeldOut, HeldOutRequest
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.lk import overlap
from aurora_lit.modules.losses.unroll import StepwiseChains
from aurora_lit.traces.record import Trace

MIN_REQUESTS = 6
"""Untried requests that a trial needs at least; it looks at the evidence after each so many."""
_PATIENCE_REQUESTS = 12
"""After so many requests a trial ends unless the evidence is half of what a pass needs, in its logarithm."""
_OLD_PILOT_REQUESTS = 4
"""A domain's other older requests are scored only if the challenger is behind on so many of them."""
NEEDED_TO_PASS = 4.0
"""Evidence with which a challenger passes at heat 0: if all are as good as the champion, one passes in a quarter of
the lineages at most."""
_NEEDED_TO_REFUSE = 20.0
"""Evidence, the mean over the domains, that a challenger is worse in some: an equal one is refused in one of 20 trials
at most."""
TRIAL_POSITIONS = 1024
"""Positions of one forward pass, padding included, and of a held-out trace, which is cropped to them."""
_MAX_ROOTS, _MAX_SAMPLED_ROOTS = 32, 16
"""Positions of a segment from which the draft continues; of a longer one only every second, third, … does. Those of a
sampled request take more time, and vary less."""
_LEAST_PROBABILITY = 0.01
"""Proposals that are reached with a smaller probability are not counted."""


class Scores(NamedTuple):
    """Expected accepted lengths of one request, in tokens a round."""

    champion: float
    challenger: float
    client: str = ""


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """The gate's decision. Scores are expected accepted lengths in tokens a round, the bonus token included."""

    passed: bool
    refused: bool
    """True if something speaks against the challenger; false too while there is only too little evidence for it."""
    reason: str
    champion: float
    """Mean over the trial's new requests."""
    challenger: float
    num_requests: int
    evidence: float
    """The lineage's e-value."""
    by_domain: dict[str, dict[str, float]]
    """Mean scores and number of requests of each domain, older requests included."""

    @property
    def record(self) -> dict[str, Any]:
        """The decision as it is stored beside a published draft."""
        return {
            "score": round(self.challenger, 4),
            "champion_score": round(self.champion, 4),
            "gate_requests": self.num_requests,
            "gate_evidence": round(self.evidence, 3),
            "by_domain": self.by_domain,
        }


def decide(
    new: Sequence[Scores],
    by_domain: dict[str, list[Scores]],
    *,
    evidence: float,
    needed: float = NEEDED_TO_PASS,
) -> GateDecision:
    """Decide by both drafts' scores of the same requests; `evidence`: the lineage's e-value, `new` included.

    The challenger passes if the evidence is as much as needed, if it is itself ahead on the new requests, and if it is
    in no domain worse: the mean over domains of the evidence for that is too little, as far as clients agree. If it is
    neither ahead nor behind, since hardly anything was learned, it is not refused either.
    """
    champion, challenger = _means(new)
    reason = f"{challenger:.3f} against {champion:.3f} tokens a round on {len(new)} new requests"
    reason += f", evidence {evidence:.2f} of {needed:.3g}"
    table, against = {}, dict[str, Evidence]()
    for domain, scores in sorted(by_domain.items()):
        before, after = _means(scores)
        table[domain] = {"champion": round(before, 4), "challenger": round(after, 4), "requests": float(len(scores))}
        against[domain] = Evidence()
        against[domain].add([of.champion - of.challenger for of in scores], clients=[of.client for of in scores])
    counts = Counter(each.client for scores in by_domain.values() for each in scores)
    have_a_say = {client for client, count in counts.items() if count >= FEWEST_FOR_A_SAY}
    evidence_against = agreed(lambda client: fmean(each.without(client) for each in against.values()), have_a_say)
    is_worse = evidence_against >= _NEEDED_TO_REFUSE
    if is_worse:
        domain = max(against, key=lambda domain: against[domain].value)
        before, after, number = table[domain].values()
        reason += f"; worse in domain {domain!r}: {after:.3f} against {before:.3f} on {number:.0f} requests"
    return GateDecision(
        passed=challenger > champion and not is_worse and evidence >= needed,
        refused=challenger < champion or is_worse,
        reason=reason,
        champion=champion,
        challenger=challenger,
        num_requests=len(new),
        evidence=evidence,
        by_domain=table,
    )


def _means(scores: Sequence[Scores]) -> tuple[float, float]:
    """Of the champion's and of the challenger's scores; each client has the same weight, however much it asks."""
    counts = Counter(each.client for each in scores)
    champion, challenger = (
        math.fsum(getattr(each, draft) / counts[each.client] for each in scores) / len(counts)
        for draft in ("champion", "challenger")
    )
    return champion, challenger


def compare_drafts(
    held_out: HeldOut,
    *,
    champion: DraftModule,
    challenger: DraftModule,
    heat: float = 0.0,
    batch_positions: int = TRIAL_POSITIONS,
    between_batches: Callable[[], None] = lambda: None,
) -> GateDecision | None:
    """Score both drafts on untried requests, add the evidence and decide; None if fewer than MIN_REQUESTS are scored.

    heat: how much is left to learn in the traffic, 0 to 1 (modules/domains/lr_schedule.py). The more there is, the
    likelier a challenger is better, and the more is lost by waiting: less evidence is needed, none at heat 1.
    between_batches: called after each batch of requests is scored.

    Requests that are too short to be scored count as tried. Older ones, which only tell whether a domain has become
    worse, are scored if nothing else keeps the challenger from passing.
    """
    for request in held_out:
        request.challenger_score = None
    tried: list[tuple[HeldOutRequest, Scores]] = []
    needed = NEEDED_TO_PASS ** (1 - heat)
    if len(untried := held_out.untried) < MIN_REQUESTS:
        return None

    scored = partial(score_requests, batch_positions=batch_positions, between_batches=between_batches)

    def score(part: Sequence[HeldOutRequest]) -> list[tuple[HeldOutRequest, Scores]]:
        """Scores of those that are long enough."""
        unscored = [request for request in part if request.champion_score is None]
        for request, of_champion in scored(champion, unscored):
            request.champion_score = of_champion
        for request, of_challenger in scored(challenger, part):
            request.challenger_score = of_challenger
        pairs = [(request, request.champion_score, request.challenger_score) for request in part]
        return [
            (request, Scores(before, after, request.client))
            for request, before, after in pairs
            if before is not None and after is not None
        ]

    def decision(others: Sequence[tuple[HeldOutRequest, Scores]] = ()) -> GateDecision:
        new = [scores for _, scores in tried]
        return decide(new, _by_domain([*tried, *others]), evidence=held_out.evidence.value, needed=needed)

    while untried:
        part, untried = untried[:MIN_REQUESTS], untried[MIN_REQUESTS:]
        pairs = score(part)
        for request in part:
            request.was_tried = True
        held_out.evidence.add([of.challenger - of.champion for _, of in pairs])
        tried += pairs
        if len(tried) < MIN_REQUESTS:
            continue
        is_promising = held_out.evidence.value >= needed**0.5
        if decision().passed or (len(tried) >= _PATIENCE_REQUESTS and not is_promising):
            break
    if len(tried) < MIN_REQUESTS:
        return None
    if not decision().passed:
        return decision()
    older = score([request for requests in held_out.old.values() for request in requests[:_OLD_PILOT_REQUESTS]])
    means = {domain: _means(pairs) for domain, pairs in _by_domain(older).items()}
    behind = {domain for domain, (before, after) in means.items() if after < before}
    rest = [request for requests in held_out.old.values() for request in requests[_OLD_PILOT_REQUESTS:]]
    return decision([*older, *score([request for request in rest if request.domain in behind])])


def _by_domain(
    scored: Sequence[tuple[HeldOutRequest, Scores]],
) -> dict[str, list[Scores]]:
    table: dict[str, list[Scores]] = {}
    for request, scores in scored:
        table.setdefault(request.domain, []).append(scores)
    return table


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
    device = module.embedding_VH.device
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
        embedding_VH=module.embedding_VH,
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
