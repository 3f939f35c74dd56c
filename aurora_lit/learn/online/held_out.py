"""Requests that drafts are compared on: those that wait before they are learned from, and a few that never are.

The newest requests wait for a trial before they are learned from (test-then-train), so that evidence costs no traffic.
Those make room first that were tried, then the oldest of the client that has most of them waiting, and a trial takes
one of each client by turns: one that sends many requests does not decide it.
A few of those that have waited are never learned from, as a sample of the domains of the past. Evidence adds up within
a lineage of challengers, which ends when the champion changes, learning restarts, or traffic is new and more speaks
against the lineage than for it (learn/online/intake.py). Leaves out scores and the decision (learn/online/gate.py).

    held_out.add(trace)
    for trace in held_out.release(16): ...      # of requests that have waited; they are learned from now
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from aurora_lit.drafts.evidence import Evidence
from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.request import by_turns, oldest_of_busiest
from aurora_lit.traces.record import Trace

_KEPT_EVERY = 16
"""One request in so many is never learned from."""
_OLD_REQUESTS, _MAX_OLD_REQUESTS = 16, 64
"""Older held-out requests that are kept: of a domain, and of all together."""
_FEWEST_NEWEST = 8
"""The newest requests wait, however large they are: a trial needs six that no challenger was tried on."""


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


class HeldOut:
    """Requests that are not learned from: the newest ones for a while, and of older ones a sample from each domain."""

    def __init__(self, *, seed: int, limit_bytes: int = 1 << 40) -> None:
        """seed: of the sample of older requests. limit_bytes: memory for traces, a half of it for the newest requests;
        beyond it these wait less long, and fewer older ones are kept."""
        self.newest: list[HeldOutRequest] = []
        self.evidence = Evidence()
        """What speaks for the present lineage of challengers."""
        self.old: dict[str, list[HeldOutRequest]] = {}
        """Of each domain, by ascending draw."""
        self._least_dropped: dict[str, float] = {}
        """The smallest draw of a domain that was not kept."""
        self._random = random.Random(seed)
        self._half_bytes = limit_bytes // 2

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
