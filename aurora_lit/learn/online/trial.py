"""A trial of the learner's draft, live and in a replay: waiting requests, evidence, decision, consequence.

The newest requests wait for a trial before they are learned from (test-then-train), so that evidence costs no traffic.
A few of those that have waited are never learned from, as a sample of the domains of the past. Clients have turns: a
trial takes one request of each; those make room first that were tried, then the oldest of the client that has most of
them waiting; a mean is one over clients. So one that sends many requests does not decide it.

A trial scores both drafts, champion and challenger, on requests that no challenger was tried on, until the evidence
suffices or does not promise to. Evidence adds up within a lineage of challengers, which ends when the champion changes,
learning restarts, or traffic is new and more speaks against the lineage than for it. By the requests that are never
learned from the drafts are compared in domains of the past; no client alone can have a challenger refused for a domain
while several have a say.

Leaves out scores (learn/online/scores.py), how evidence is weighed (drafts/evidence.py), when a trial is held, and
publishing what passes (learn/online/loop.py, learn/offline/loop.py).

    for each in trial.take_in(trace): ...       # of requests that have waited: they are learned from now
    decision = trial.hold(champion=champion, challenger=challenger, heat=0.2)
    trial.conclude(decision, learner, champion=served, version="draft-000001")
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

from aurora_lit.drafts.evidence import FEWEST_FOR_A_SAY, Evidence, agreed
from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.learn.online.learner import Learner
from aurora_lit.learn.online.scores import TRIAL_POSITIONS, HeldOutRequest, score_requests
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.request import by_turns, oldest_of_busiest
from aurora_lit.traces.record import Trace

_KEPT_EVERY = 16
"""One request in so many is never learned from."""
_OLD_REQUESTS, _MAX_OLD_REQUESTS = 16, 64
"""Older held-out requests that are kept: of a domain, and of all together."""
_FEWEST_NEWEST = 8
"""The newest requests wait, however large they are: a trial needs six that no challenger was tried on."""
_RELEASED_IDS = 1024
"""Latest requests that are learned from and are remembered, in case more of their segments come."""
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


class Scores(NamedTuple):
    """Expected accepted lengths of both drafts on one request, in tokens a round."""

    champion: float
    challenger: float
    client: str = ""
    domain: str = ""


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
    new: Sequence[Scores], older: Sequence[Scores] = (), *, evidence: float, needed: float = NEEDED_TO_PASS
) -> GateDecision:
    """Decide by the scores of new requests and of older ones; `evidence`: the lineage's e-value, `new` included.

    The challenger passes if the evidence is as much as needed, if it is itself ahead on the new requests, and if it is
    in no domain worse: the mean over domains of the evidence for that is too little, as far as clients agree. If it is
    neither ahead nor behind, since hardly anything was learned, it is not refused either.
    """
    champion, challenger = _means(new)
    reason = f"{challenger:.3f} against {champion:.3f} tokens a round on {len(new)} new requests"
    reason += f", evidence {evidence:.2f} of {needed:.3g}"
    table, against = {}, dict[str, Evidence]()
    for domain, scores in sorted(_by_domain([*new, *older]).items()):
        before, after = _means(scores)
        table[domain] = {"champion": round(before, 4), "challenger": round(after, 4), "requests": float(len(scores))}
        against[domain] = Evidence()
        against[domain].add([of.champion - of.challenger for of in scores], clients=[of.client for of in scores])
    counts = Counter(each.client for each in [*new, *older])
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
    champion = math.fsum(each.champion / counts[each.client] for each in scores) / len(counts)
    challenger = math.fsum(each.challenger / counts[each.client] for each in scores) / len(counts)
    return champion, challenger


def _by_domain(scores: Iterable[Scores]) -> dict[str, list[Scores]]:
    table: dict[str, list[Scores]] = {}
    for each in scores:
        table.setdefault(each.domain, []).append(each)
    return table


class Trial:
    """The requests that are not learned from, and the trials of one challenger after another on them.

    They are the newest ones, for a while, and of older ones a sample from each domain. See the file's example.
    """

    def __init__(self, *, seed: int, num_waiting: int = 0, limit_bytes: int = 1 << 40) -> None:
        """seed: of the sample of older requests. num_waiting: so many of the newest requests wait. limit_bytes: memory
        for traces, a half of it for the newest requests; beyond it these wait less long, and fewer older ones are kept.
        """
        self.newest: list[HeldOutRequest] = []
        self.evidence = Evidence()
        """What speaks for the present lineage of challengers."""
        self.old: dict[str, list[HeldOutRequest]] = {}
        """Of each domain, by ascending draw."""
        self._least_dropped: dict[str, float] = {}
        """The smallest draw of a domain that was not kept."""
        self._random = random.Random(seed)
        self._half_bytes = limit_bytes // 2
        self._num_waiting, self._num_taken_in = num_waiting, 0
        self._released: dict[str, None] = {}
        """In their order."""

    def take_in(self, trace: Trace) -> list[Trace]:
        """Have a trace wait, and return what is learned from now: at the start half of what came, so that learning
        begins with the first. A further segment of a request that is learned from does not wait."""
        if trace.request_id in self._released:
            return [trace]
        self.add(trace)
        self._num_taken_in += 1
        released = self.release(min(self._num_waiting, self._num_taken_in // 2))
        self._released.update(dict.fromkeys(each.request_id for each in released))
        while len(self._released) > _RELEASED_IDS:
            del self._released[next(iter(self._released))]
        return released

    def hold(
        self,
        *,
        champion: DraftModule,
        challenger: DraftModule,
        heat: float = 0.0,
        batch_positions: int = TRIAL_POSITIONS,
        between_batches: Callable[[], None] = lambda: None,
    ) -> GateDecision | None:
        """Score both drafts on untried requests, add the evidence and decide; None if fewer than MIN_REQUESTS are
        scored.

        heat: how much is left to learn in the traffic, 0 to 1 (modules/domains/lr_schedule.py). The more there is, the
        likelier a challenger is better, and the more is lost by waiting: less evidence is needed, none at heat 1.
        between_batches: called after each batch of requests is scored.

        Requests that are too short to be scored count as tried. Older ones, which only tell whether a domain has become
        worse, are scored if nothing else keeps the challenger from passing.
        """
        for request in self:
            request.challenger_score = None
        needed = NEEDED_TO_PASS ** (1 - heat)
        if len(untried := self.untried) < MIN_REQUESTS:
            return None

        def score(part: Sequence[HeldOutRequest]) -> list[Scores]:
            """Of those that are long enough."""
            options: dict[str, Any] = {"batch_positions": batch_positions, "between_batches": between_batches}
            unscored = [request for request in part if request.champion_score is None]
            for request, of_champion in score_requests(champion, unscored, **options):
                request.champion_score = of_champion
            for request, of_challenger in score_requests(challenger, part, **options):
                request.challenger_score = of_challenger
            return [
                Scores(each.champion_score, each.challenger_score, client=each.client, domain=each.domain)
                for each in part
                if each.champion_score is not None and each.challenger_score is not None
            ]

        def decision(older: Sequence[Scores] = ()) -> GateDecision:
            return decide(tried, older, evidence=self.evidence.value, needed=needed)

        tried: list[Scores] = []
        while untried:
            part, untried = untried[:MIN_REQUESTS], untried[MIN_REQUESTS:]
            scores = score(part)
            for request in part:
                request.was_tried = True
            self.evidence.add([each.challenger - each.champion for each in scores])
            tried += scores
            if len(tried) < MIN_REQUESTS:
                continue
            is_promising = self.evidence.value >= needed**0.5
            if decision().passed or (len(tried) >= _PATIENCE_REQUESTS and not is_promising):
                break
        if len(tried) < MIN_REQUESTS:
            return None
        if not decision().passed:
            return decision()
        older = score([request for requests in self.old.values() for request in requests[:_OLD_PILOT_REQUESTS]])
        means = {domain: _means(scores) for domain, scores in _by_domain(older).items()}
        behind = {domain for domain, (before, after) in means.items() if after < before}
        rest = [request for requests in self.old.values() for request in requests[_OLD_PILOT_REQUESTS:]]
        return decision([*older, *score([request for request in rest if request.domain in behind])])

    def conclude(self, decision: GateDecision, learner: Learner, *, champion: Eagle3Draft, version: str) -> None:
        """What follows for learning, after a draft that passed was published. champion: served in the trial."""
        if (decision.passed or decision.refused) and learner.apply_gate_decision(
            passed=decision.passed, champion=champion, version=version
        ):
            self.evidence.clear()

    @staticmethod
    def is_kept(request_id: str) -> bool:
        """True if a request is never learned from; by a hash of its id, so that segments agree, after a restart too."""
        return zlib.crc32(request_id.encode()) % _KEPT_EVERY == 0

    def add(self, trace: Trace) -> None:
        """Keep a segment, with its request's earlier segments if there are any."""
        request = next((r for r in self if r.request_id == trace.request_id), None)
        if request is None:
            request = HeldOutRequest(request_id=trace.request_id, domain=trace.domain, client=trace.client)
            self.newest.append(request)
        request.traces.append(trace)
        request.champion_score = request.challenger_score = None

    def release(self, num_newest: int) -> list[Trace]:
        """Let some of the newest requests go until `num_newest` are left; returns what is learned from now."""
        released = []
        while len(self.newest) > num_newest or (
            len(self.newest) > _FEWEST_NEWEST and sum(r.num_bytes for r in self.newest) > self._half_bytes
        ):
            leaving = next((r for r in self.newest if r.was_tried), None) or oldest_of_busiest(self.newest)
            self.newest.remove(leaving)
            if self.is_kept(leaving.request_id):
                self._remember(leaving)
            else:
                released += leaving.traces
        return released

    def rename_domain(self, removed: str, kept: str) -> None:
        """Requests of a domain that went into another one are of that from now on."""
        for request in self:
            if request.domain == removed:
                request.domain = kept
            # Or they would go to batches and the reservoir as traces of a domain that is gone.
            request.traces = [replace(t, domain=kept) if t.domain == removed else t for t in request.traces]
        if removed in self.old:
            dropped = [self._least_dropped.pop(domain, 1.0) for domain in (removed, kept)]
            self._least_dropped[kept] = min(dropped)
            both = [r for r in self.old.pop(removed) + self.old.get(kept, []) if r.draw < min(dropped)]
            self.old[kept] = sorted(both, key=lambda request: request.draw)
            self._drop_beyond(_OLD_REQUESTS)

    @property
    def untried(self) -> list[HeldOutRequest]:
        """The newest requests that no challenger was tried on: the newest of each client, then their second, …"""
        return by_turns(request for request in reversed(self.newest) if not request.was_tried)

    def clear_champion_scores(self) -> None:
        """Forget the champion's cached scores and the evidence: another draft is the champion now."""
        self.evidence.clear()
        for request in self:
            request.champion_score = None

    def crown_challenger(self) -> None:
        """The last trial's challenger is the champion now: its scores are the champion's. The evidence is cleared."""
        self.evidence.clear()
        for request in self:
            request.champion_score = request.challenger_score

    def __iter__(self) -> Iterator[HeldOutRequest]:
        """All requests: the newest ones, then the older ones."""
        yield from self.newest
        for requests in self.old.values():
            yield from requests

    def _remember(self, request: HeldOutRequest) -> None:
        """Move a request to the older ones: a uniform sample of all that its domain had, by the smallest draws.

        Where requests differ in size, a reservoir that adds whatever still fits prefers small ones and recent ones.
        """
        domain = request.domain if request.domain in self.old or len(self.old) < MAX_DOMAINS else ""
        request.draw = self._random.random()
        if request.draw >= self._least_dropped.get(domain, 1.0):
            return
        kept = self.old.setdefault(domain, [])
        kept.append(request)
        kept.sort(key=lambda request: request.draw)
        self._drop_beyond(max(1, min(_OLD_REQUESTS, _MAX_OLD_REQUESTS // len(self.old))))
        while self._num_old_bytes() > self._half_bytes:
            several = [name for name, requests in self.old.items() if len(requests) > 1]
            if not several:
                break
            self._drop_last(max(several, key=lambda name: sum(each.num_bytes for each in self.old[name])))

    def _drop_beyond(self, size: int) -> None:
        """Keep `size` requests of each domain at most."""
        for domain, requests in self.old.items():
            while len(requests) > size:
                self._drop_last(domain)

    def _drop_last(self, domain: str) -> None:
        """From now on no request of the domain with a larger draw than this one's is kept."""
        self._least_dropped[domain] = self.old[domain].pop().draw

    def _num_old_bytes(self) -> int:
        return sum(request.num_bytes for requests in self.old.values() for request in requests)
