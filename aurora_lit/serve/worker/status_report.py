"""Writes the engine worker's counters, round times and draft events to its status page.

Leaves out what the fields mean (ipc/engine_status.py).

    report = StatusReport(parts, calls, live, page)
    report.round_times.add(0.012, swapped=False)
    report.write()
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from aurora_lit.drafts.hot_reload import Refusal
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.serve.worker.call_tracker import CallTracker
from aurora_lit.serve.worker.domain_counts import DomainCounts
from aurora_lit.serve.worker.parts import WorkerParts

if TYPE_CHECKING:
    from aurora_lit.serve.speculation.sources.memory import TrafficMemory
    from aurora_lit.serve.worker.live_draft import LiveDraft

_WINDOW_ROUNDS = 2048
_UPDATE_EVERY_S = 1.0


class RoundTimes:
    """Percentiles of the times of the last rounds; rounds that swapped a draft are counted apart."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=_WINDOW_ROUNDS)
        self._swapping: deque[float] = deque(maxlen=_WINDOW_ROUNDS)
        self._next_update_s = 0.0

    def add(self, seconds: float, *, swapped: bool) -> None:
        """Add a round; `seconds` includes the swap, if it made one."""
        (self._swapping if swapped else self._plain).append(seconds)

    def changed_fields(self) -> dict[str, int]:
        """round_p50_us, round_p99_us and swap_round_p99_us in microseconds; computed at most once a second, else {}."""
        now_s = time.monotonic()
        if now_s < self._next_update_s:
            return {}
        self._next_update_s = now_s + _UPDATE_EVERY_S
        fields = {}
        if self._plain:
            p50, p99 = np.percentile(np.array(self._plain), (50, 99))
            fields = {"round_p50_us": int(p50 * 1e6), "round_p99_us": int(p99 * 1e6)}
        if self._swapping:
            fields["swap_round_p99_us"] = int(np.percentile(np.array(self._swapping), 99) * 1e6)
        return fields


class StatusReport:
    """Writes the status page; texts only when they have changed."""

    def __init__(
        self, parts: WorkerParts, calls: CallTracker, live_draft: LiveDraft | None, page: EngineStatusPage
    ) -> None:
        self._parts, self._calls, self._live_draft, self._page = parts, calls, live_draft, page
        self._written_texts: tuple[Refusal | None, Refusal | None, Refusal | None, str, str] | None = None
        self._written_domains: tuple[list[str], str] = [], ""
        self.round_times = RoundTimes()
        self.domains = DomainCounts()

    def write(self, **more: int) -> None:
        """Write all counters, and the fields `more`, in one update."""
        engine = self._parts.engine
        self._page.write(
            running=engine.num_running,
            waiting=engine.num_waiting,
            **vars(engine.counters),
            prefix_bytes=0 if engine.prefix_cache is None else engine.prefix_cache.num_bytes,
            **_memory_fields(engine.memory),
            opted_out=self._calls.num_opted_out,
            unrecorded=self._parts.unrecorded(),
            **self.round_times.changed_fields(),
            **self._draft_fields(),
            **self._domain_fields(),
            **more,
        )

    def _domain_fields(self) -> dict[str, int | str | list[int]]:
        watch = None if self._live_draft is None else self._live_draft.domain_watch
        names, refused = self.domains.names, "" if watch is None else watch.refused
        fields: dict[str, int | str | list[int]] = {
            "domain_numbers": self.domains.numbers,
            "domains_version": 0 if watch is None else watch.version,
        }
        if (names, refused) != self._written_domains:
            self._written_domains = names, refused
            fields.update(domain_names="\n".join(names), domains_refused=refused)
        return fields

    def _draft_fields(self) -> dict[str, int | str]:
        version, live = self._parts.engine.draft_version, self._live_draft
        refused, rolled_back, alarm = (None,) * 3 if live is None else (live.refused, live.rolled_back, live.alarm)
        gain = "" if live is None else live.gain.line
        fields: dict[str, int | str] = {}
        if live is not None:
            fields = {
                "swaps": live.num_swaps,
                "refusals": live.num_refused,
                "rollbacks": live.num_rollbacks,
                "alarms": live.num_alarms,
            }
        if (refused, rolled_back, alarm, version, gain) != self._written_texts:
            self._written_texts = (refused, rolled_back, alarm, version, gain)
            fields.update(draft_version=version, draft_gain=gain)
            if refused is not None:
                fields.update(refused_version=refused.version, refused_reason=refused.reason)
            if rolled_back is not None:
                fields.update(rolled_back_version=rolled_back.version, rolled_back_reason=rolled_back.reason)
            if alarm is not None:
                fields.update(alarm_version=alarm.version, alarm_reason=alarm.reason)
        return fields


def _memory_fields(memory: TrafficMemory | None) -> dict[str, int]:
    if memory is None:
        return {}
    held, forgotten = memory.index.counts
    return {"memory_capacity": memory.index.capacity, "memory_tokens": held, "memory_evicted": forgotten}
