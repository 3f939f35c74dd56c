"""Requests that drafts are compared on: those that wait before they are learned from, and a few that never are.

The newest requests wait for a trial before they are learned from (test-then-train), so that evidence costs no traffic.
A few of those that have waited are never learned from, as a sample of the domains of the past. Evidence adds up within
a lineage of challengers, which ends when the champion changes, learning restarts, or traffic is new and more speaks
against the lineage than for it (learn/online/intake.py). Leaves out scores and the decision (learn/online/gate.py).

    held_out.add(trace)
    for trace in held_out.release(16): ...      # of requests that have waited; they are learned from now
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.learn.online.evidence import Evidence
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
    traces: list[Trace] = field(default_factory=list)
    champion_score: float | None = None
    """Cached until the champion changes or another segment arrives."""
    challenger_score: float | None = None
    """Of the last trial that scored the request, unless another segment has arrived."""
    was_tried: bool = False
    """True if a challenger's evidence contains it: it may not count again."""

    @property
    def num_bytes(self) -> int:
        """Memory of its traces."""
        return sum(trace.num_bytes for trace in self.traces)


class HeldOut:
    """Requests that are not learned from: the newest ones for a while, and of older ones a sample from each domain."""

    def __init__(self, *, seed: int, limit_bytes: int = 1 << 40) -> None:
        """seed: of the sample of older requests. limit_bytes: memory for traces, a half of it for the newest requests;
        beyond it these wait less long, and fewer older ones are kept."""
        self.newest: deque[HeldOutRequest] = deque()
        self.evidence = Evidence()
        """What speaks for the present lineage of challengers."""
        self.old: dict[str, list[HeldOutRequest]] = {}
        self._num_remembered: dict[str, int] = {}
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
            request = HeldOutRequest(request_id=trace.request_id, domain=trace.domain)
            self.newest.append(request)
        request.traces.append(trace)
        request.champion_score = request.challenger_score = None

    def release(self, num_newest: int) -> list[Trace]:
        """Let the oldest of the newest requests go until `num_newest` are left; returns what is learned from now."""
        released = []
        while len(self.newest) > num_newest or (
            len(self.newest) > _FEWEST_NEWEST and sum(r.num_bytes for r in self.newest) > self._half_bytes
        ):
            oldest = self.newest.popleft()
            if self.is_kept(oldest.request_id):
                self._remember(oldest)
            else:
                released += oldest.traces
        return released

    def rename_domain(self, removed: str, kept: str) -> None:
        """Requests of a domain that went into another one are of that from now on."""
        for request in self:
            if request.domain == removed:
                request.domain = kept
            # Or they would go to batches and the reservoir as traces of a domain that is gone.
            request.traces = [replace(t, domain=kept) if t.domain == removed else t for t in request.traces]
        if removed in self.old:
            moved = self.old.pop(removed)
            self.old[kept] = (self.old.get(kept, []) + moved)[:_OLD_REQUESTS]
            self._num_remembered[kept] = self._num_remembered.get(kept, 0) + self._num_remembered.pop(removed)

    @property
    def untried(self) -> list[HeldOutRequest]:
        """The newest requests that no challenger was tried on, the newest first."""
        return [request for request in reversed(self.newest) if not request.was_tried]

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
        """Move a request to the older ones: reservoir sampling (Vitter's algorithm R) within its domain."""
        domain = request.domain if request.domain in self.old or len(self.old) < MAX_DOMAINS else ""
        kept = self.old.setdefault(domain, [])
        self._num_remembered[domain] = self._num_remembered.get(domain, 0) + 1
        size = max(1, min(_OLD_REQUESTS, _MAX_OLD_REQUESTS // len(self.old)))
        for requests in self.old.values():
            del requests[size:]
        has_room = len(kept) < size and self._num_old_bytes() + request.num_bytes <= self._half_bytes
        if not kept or has_room:
            kept.append(request)
        elif (index := self._random.randrange(self._num_remembered[domain])) < len(kept):
            kept[index] = request
        while self._num_old_bytes() > self._half_bytes:
            several = [requests for requests in self.old.values() if len(requests) > 1]
            if not several:
                break
            largest = max(several, key=lambda requests: sum(each.num_bytes for each in requests))
            del largest[self._random.randrange(len(largest))]

    def _num_old_bytes(self) -> int:
        return sum(request.num_bytes for requests in self.old.values() for request in requests)
