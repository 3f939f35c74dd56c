"""The gate: may the challenger replace the champion? Both are scored on requests that were kept out of training.

The score is the expected accepted length, computed from the traces alone: from every position of an answer, the draft
continues the committed tokens, and proposal i counts with the chance that all up to it are accepted. For greedy and
seeded requests that chance is 0 or 1, exactly what serving would have seen; for free ones it is Π Σ min(p, q) at the
request's temperature. What is left out: making checkpoints of what passes (publishing.py).

Shapes: K draft steps, B rows, T positions, N scored positions, D draft vocabulary.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from aurora_lit.learn.data.batches import collate
from aurora_lit.learn.data.labelled_trace import LabelledTrace, first_taught
from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.unroll import shift
from aurora_lit.traces.record import Trace

HELD_OUT_EVERY = 6
"""One request in so many never teaches."""
MIN_REQUESTS = 6
"""Newest held-out requests without which nothing is judged."""
_LUCKY_PASSES = 0.25
"""Chance that a draft as good as the champion passes: each that does would be a step at random."""
_FALSE_REFUSALS = 0.05
"""Chance that a draft as good as the champion in every domain is refused for one of them."""
_OLD_REQUESTS = 64
"""Older held-out requests kept, all domains together."""


@dataclass(kw_only=True, eq=False)
class HeldOutRequest:
    """One request, in one or more segments."""

    request_id: str
    domain: str
    read: Callable[[Trace], LabelledTrace]
    traces: list[Trace] = field(default_factory=list)
    champion_score: float | None = None
    """Cached until the champion changes or a segment comes."""
    _lessons: list[LabelledTrace] = field(default_factory=list)

    @property
    def lessons(self) -> list[LabelledTrace]:
        """The traces as the head reads them: not before they are asked for, since most requests never are."""
        self._lessons += map(self.read, self.traces[len(self._lessons) :])
        return self._lessons


class HeldOut:
    """Requests that only the gate sees: the newest, and a random few of each domain from before them."""

    def __init__(self, *, num_newest: int, seed: int, read: Callable[[Trace], LabelledTrace]) -> None:
        """`read`: as `for_gate` of rounds.py."""
        self.newest: deque[HeldOutRequest] = deque()
        self.old: dict[str, list[HeldOutRequest]] = {}
        self._num_newest, self._read = num_newest, read
        self._num_seen: dict[str, int] = {}
        self._random = random.Random(seed)

    @staticmethod
    def takes(request_id: str) -> bool:
        """Whether a request is held out: by its id, so that all its segments are, after a restart too."""
        return zlib.crc32(request_id.encode()) % HELD_OUT_EVERY == 0

    def add(self, trace: Trace) -> None:
        """Keep a segment; its request's older segments are looked for among the newest requests."""
        request = next((r for r in self.newest if r.request_id == trace.request_id), None)
        if request is None:
            request = HeldOutRequest(request_id=trace.request_id, domain=trace.domain, read=self._read)
            self.newest.append(request)
        request.traces.append(trace)
        request.champion_score = None
        if len(self.newest) > self._num_newest:
            self._remember(self.newest.popleft())

    def forget_scores(self) -> None:
        """The champion is another one."""
        for request in self:
            request.champion_score = None

    def __iter__(self) -> Iterator[HeldOutRequest]:
        """All requests, the newest first."""
        yield from self.newest
        for requests in self.old.values():
            yield from requests

    def _remember(self, request: HeldOutRequest) -> None:
        """Reservoir sampling (Vitter's R) in the request's domain."""
        domain = request.domain if request.domain in self.old or len(self.old) < MAX_DOMAINS else ""
        kept = self.old.setdefault(domain, [])
        self._num_seen[domain] = self._num_seen.get(domain, 0) + 1
        size = max(1, _OLD_REQUESTS // len(self.old))
        for requests in self.old.values():
            del requests[size:]
        if len(kept) < size:
            kept.append(request)
        elif (place := self._random.randrange(self._num_seen[domain])) < size:
            kept[place] = request


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found. Scores are expected accepted lengths, the bonus token included."""

    passed: bool
    reason: str
    champion: float
    """Mean over the newest requests."""
    challenger: float
    num_requests: int
    by_domain: dict[str, dict[str, float]]
    """The same for each domain, older requests included."""

    @property
    def record(self) -> dict[str, Any]:
        """What is kept beside a published draft."""
        return {
            "score": round(self.challenger, 4),
            "champion_score": round(self.champion, 4),
            "gate_requests": self.num_requests,
            "by_domain": self.by_domain,
        }


def judge(newest: Sequence[tuple[float, float]], by_domain: dict[str, list[tuple[float, float]]]) -> Verdict:
    """Decide by (champion, challenger) scores, paired by request.

    The challenger passes when it is likely to be better on the newest requests and is in no domain worse beyond noise:
    paired one-sided t-tests, at _LUCKY_PASSES, and at levels that share _FALSE_REFUSALS (Bonferroni).
    """
    champion, challenger, errors = _compare(newest)
    reason = f"{challenger:.3f} against {champion:.3f} tokens a round on the {len(newest)} newest requests"
    passed = len(newest) > 1 and bool(errors > stdtrit(len(newest) - 1, 1 - _LUCKY_PASSES))
    table = {}
    for domain, pairs in sorted(by_domain.items()):
        before, after, errors = _compare(pairs)
        table[domain] = {"champion": round(before, 4), "challenger": round(after, 4), "requests": float(len(pairs))}
        if len(pairs) > 1 and errors < stdtrit(len(pairs) - 1, _FALSE_REFUSALS / len(by_domain)):
            passed = False
            reason += f"; worse in domain {domain!r}: {after:.3f} against {before:.3f} on {len(pairs)} requests"
    return Verdict(
        passed=passed,
        reason=reason,
        champion=champion,
        challenger=challenger,
        num_requests=len(newest),
        by_domain=table,
    )


def _compare(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Means of champion and challenger, and their difference in standard errors (0 when there is but one pair)."""
    count = len(pairs)
    before, after = (sum(side) / count for side in zip(*pairs, strict=True))
    if count < 2:
        return before, after, 0.0
    variance = sum((b - a - (after - before)) ** 2 for a, b in pairs) / (count - 1)
    return before, after, (after - before) / max(math.sqrt(variance / count), 1e-9)


def compare(
    held_out: HeldOut, *, champion: DraftModule, challenger: DraftModule, batch_positions: int
) -> Verdict | None:
    """Score both drafts on all held-out requests; None when too few of them can be scored."""
    requests = list(held_out)
    unscored = [request for request in requests if request.champion_score is None]
    for request, score in score_requests(champion, unscored, batch_positions=batch_positions):
        request.champion_score = score
    scores = dict(score_requests(challenger, requests, batch_positions=batch_positions))
    newest: list[tuple[float, float]] = []
    by_domain: dict[str, list[tuple[float, float]]] = {}
    for request in requests:
        if request.champion_score is None or request not in scores:  # too short to tell
            continue
        pair = (request.champion_score, scores[request])
        by_domain.setdefault(request.domain, []).append(pair)
        if request in held_out.newest:
            newest.append(pair)
    return judge(newest, by_domain) if len(newest) >= MIN_REQUESTS else None


@torch.no_grad()
def score_requests(
    module: DraftModule, requests: Sequence[HeldOutRequest], *, batch_positions: int
) -> Iterator[tuple[HeldOutRequest, float]]:
    """Expected accepted length of each request, bonus token included; those too short to tell are left out."""
    lessons = [(request, lesson) for request in requests for lesson in request.lessons]
    sums: dict[str, tuple[float, int]] = {}
    for batch in _pack(lessons, batch_positions):
        for (request, _), (total, count) in zip(batch, _accepted(module, [pair[1] for pair in batch]), strict=True):
            before = sums.get(request.request_id, (0.0, 0))
            sums[request.request_id] = (before[0] + total, before[1] + count)
    for request in requests:
        total, count = sums.get(request.request_id, (0.0, 0))
        if count:
            yield request, 1 + total / count


def _accepted(module: DraftModule, lessons: Sequence[LabelledTrace]) -> list[tuple[float, int]]:
    """By lesson: proposals expected to be accepted, summed over all roots, and how many roots there are."""
    device = module.embedding_VH.device
    batch = collate([lesson.trace for lesson in lessons], with_prompt=[False] * len(lessons)).to(device)
    hidden_KBTH = module.unroll(batch)
    K, B, T, _ = hidden_KBTH.shape
    accept_KBT = torch.zeros(K, B, T)
    for row, lesson in enumerate(lessons):
        # The last token of a segment has no successor to compare with.
        scored = slice(first_taught(lesson.trace), len(lesson.trace.token_ids_T) - 1)
        accept_KBT[:, row, scored] = _acceptance(module, lesson, hidden_KBTH[:, row, scored], scored)
    # Step j of the chain from root t aims at position t + 1 + j; chains that would begin before the text are none.
    chain_BT, total_BT = torch.ones(B, T), torch.zeros(B, T)
    for step in range(K):
        chain_BT = chain_BT * shift(accept_KBT[step], -step)
        total_BT = total_BT + chain_BT
    found = []
    for row, lesson in enumerate(lessons):
        first, end = max(1, first_taught(lesson.trace)), len(lesson.trace.token_ids_T) - 1
        found.append((float(total_BT[row, first:end].sum()), max(0, end - first)))
    return found


def _acceptance(module: DraftModule, lesson: LabelledTrace, hidden_KNH: Tensor, scored: slice) -> Tensor:
    """Chance that the draft's proposal is accepted at each position, by step [K, N], on the CPU."""
    trace, draft = lesson.trace, module.draft
    logits_KND = draft.logits(hidden_KNH)
    if trace.verify != "free":
        proposal_KN = draft.draft_token_ids[logits_KND.argmax(-1)].cpu()
        return (proposal_KN == trace.token_ids_T[scored.start + 1 : scored.stop + 1]).float()
    q_KND = (logits_KND.float() / trace.temperature).softmax(-1)
    last_NH = trace.last_TH[scored].to(module.head_VdH.device, module.head_VdH.dtype)
    logits_ND = module.finish((last_NH @ module.head_VdH.T).float()) / trace.temperature
    p_ND = (logits_ND - lesson.tempered_lse_T[scored, None].to(logits_ND.device)).exp()
    return torch.minimum(p_ND, q_KND).sum(-1).cpu()


def _pack(
    lessons: Sequence[tuple[HeldOutRequest, LabelledTrace]], batch_positions: int
) -> Iterator[list[tuple[HeldOutRequest, LabelledTrace]]]:
    """Lessons of like length together, so that a batch with its padding holds about `batch_positions`."""
    batch: list[tuple[HeldOutRequest, LabelledTrace]] = []
    for pair in sorted(lessons, key=lambda pair: len(pair[1].trace.token_ids_T)):
        if batch and len(pair[1].trace.token_ids_T) * (len(batch) + 1) > batch_positions:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch
