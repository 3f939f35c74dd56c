"""What the live page shows of the past: samples of the status report, and what happened between them. Pure.

A sample is read by one task for all viewers (serve/http/live_page.py). Its counters are totals since the start, so the
page takes differences, and a sample can be left out without loss: two intervals become one. That bounds the history:
when it is full, a sample goes whose neighbours are close together for their age. So the last minute stays whole, and
what is older gets coarser. The first accepted lengths are therefore kept apart.

    history = History()
    history.add(report, latencies={}, now_s=time.time())      # report: that of GET /v1/aurora/status
    history.points, history.events_after(0)
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
MAX_POINTS = 360
MAX_EVENTS = 200
MIN_ROUNDS = 12
"""Fewer say nothing about the accepted length; as in static/page.js."""
ALL = ""
"""All traffic, among domains; none has this name."""
_FRESH_S = 60.0
"""What is younger stays, and older ages below twice that count as about the same."""
_SETTLED_S = 10.0
"""A younger history has no first accepted lengths."""
_DOMAIN = re.compile(r"(?:^|, )(.+?) (\d+)% \(heat (\d\.\d+)\)")
"""One domain in the learner's text (modules/domains/controller.py: describe)."""


class History:
    """A bounded number of points and events, oldest first."""

    def __init__(self) -> None:
        self.points: list[Json] = []
        self.report: Json = {}
        """The last one that was added."""
        self.first_lengths: dict[str, float] = {}
        """Domain or ALL → accepted length of the first minute with enough rounds, of those that have had one."""
        self._events: deque[Json] = deque(maxlen=MAX_EVENTS)
        self.num_events = 0
        """Since the start; an event's `number` is this when it was added."""

    def add(self, report: Json, *, latencies: Json, now_s: float) -> None:
        """Add a sample. latencies: name → (seconds in total, count). now_s: since 1970."""
        if len(self.points) == MAX_POINTS:
            del self.points[least_missed([point["time"] for point in self.points], now_s)]
        self.points.append(point_of(report, latencies) | {"time": round(now_s, 2)})
        for event in changes(self.report, report) if self.report else ():
            self.num_events += 1
            self._events.append({"number": self.num_events, "time": round(now_s, 2), **event})
        self.report = report
        self._keep_first_lengths()

    def shift(self, by_s: float) -> None:
        """Correct all times: the clock was wrong by so much when they were taken."""
        for each in (*self.points, *self._events):
            each["time"] = round(each["time"] + by_s, 2)

    def events_after(self, number: int) -> list[Json]:
        """Those with a higher number that are still kept."""
        return [event for event in self._events if event["number"] > number]

    def _keep_first_lengths(self) -> None:
        """Add those that the last minute gives; forget domains that are no longer counted."""
        start, now = self.points[0], self.points[-1]
        if now["time"] - start["time"] < _SETTLED_S:
            return
        before = next((point for point in reversed(self.points) if now["time"] - point["time"] >= _FRESH_S), start)
        known = {name: length for name, length in self.first_lengths.items() if name == ALL or name in now["domains"]}
        self.first_lengths = accepted_lengths(before, now) | known


def least_missed(times: list[float], now_s: float) -> int:
    """The index of a point that leaves the smallest gap, for its age; neither the first nor one of the last minute."""
    old = sum(time_s < now_s - _FRESH_S for time_s in times)
    end = max(min(old, len(times) - 1), 2)
    return min(range(1, end), key=lambda i: (times[i + 1] - times[i - 1]) / (now_s - times[i] + _FRESH_S))


def point_of(report: Json, latencies: Json) -> Json:
    """The part of a report whose course the page shows."""
    speculation, learner = report["speculation"], report["learner"]
    return {
        "sources": list(speculation["generated_by_source"].values()),
        "drafts": speculation["drafts"],
        "accepted": speculation["accepted"],
        "against_plain": [
            round(speculation["against_plain"]["plain_seconds"], 3),
            round(speculation["against_plain"]["seconds"], 3),
        ],
        "domains": _traffic(report["domains"]["served"]),
        "kinds": _traffic(report["kinds"]),
        "queue": [report["queue"]["running"], report["queue"]["waiting"]],
        "latencies": latencies,
        "learner": [learner["positions"], learner["compute_share"], learner["domains"]["rate_factor"]],
        "heat": learned_domains(learner["domains"]["now"] or ""),
    }


def _traffic(served: Json) -> Json:
    """Domain or kind → tokens generated, rounds with proposals, accepted proposals."""
    return {name: [each["generated_tokens"], each["drafts"], each["accepted"]] for name, each in served.items()}


def accepted_lengths(before: Json, now: Json) -> dict[str, float]:
    """Domain or ALL → accepted length between two points, where there were enough rounds."""
    totals, totals_before = (
        {**point["domains"], ALL: [0, point["drafts"], point["accepted"]]} for point in (now, before)
    )
    lengths = {}
    for name, total in totals.items():
        _, drafts, accepted = (new - old for new, old in zip(total, totals_before.get(name, (0, 0, 0)), strict=True))
        if drafts >= MIN_ROUNDS:
            lengths[name] = round(1 + accepted / drafts, 3)
    return lengths


def learned_domains(text: str) -> dict[str, list[float]]:
    """Domain → share of the latest requests and heat, both from 0 to 1. Of a text that was cut, what is whole."""
    return {name: [int(percent) / 100, float(heat)] for name, percent, heat in _DOMAIN.findall(text)}


def changes(before: Json, now: Json) -> Iterator[Json]:
    """What happened between two reports, as events: `kind`, and what concerns it."""
    gate, gate_before = now["learner"]["gate"], before["learner"]["gate"]
    verdict = {"challenger": gate["challenger"], "champion": gate["champion"]}
    if gate["refused"] > gate_before["refused"]:
        yield {"kind": "held_back", "count": gate["refused"] - gate_before["refused"], **verdict}
    if gate["published"] > gate_before["published"]:
        count = gate["published"] - gate_before["published"]
        yield {"kind": "published", "version": now["learner"]["version"], "count": count, **verdict}
    draft, draft_before = now["draft"], before["draft"]
    if draft["refusals"] > draft_before["refusals"]:
        yield {"kind": "refused", **(draft["refused"] or {})}
    if draft["alarms"] > draft_before["alarms"]:
        yield {"kind": "alarm", **(draft["alarm"] or {})}
    if draft["version"] != draft_before["version"]:
        # The verdict may be older: until another draft is loaded, the bad one serves.
        rolled_back = draft["rolled_back"] or {}
        if rolled_back.get("version") == draft_before["version"]:
            yield {"kind": "rolled_back", **rolled_back, "to": draft["version"]}
        else:
            yield {"kind": "swapped", "version": draft["version"], "count": draft["swaps"] - draft_before["swaps"]}
    shifts, shifts_before = (report["learner"]["domains"]["shifts"] for report in (now, before))
    has_reported = before["learner"]["domains"]["rate_factor"] > 0  # else those of the server before come at once
    if shifts > shifts_before and has_reported:
        yield {"kind": "shift", "reason": now["learner"]["domains"]["last_shift"]}
    if now["learner"]["state"] != before["learner"]["state"]:
        yield {"kind": "learner", "state": now["learner"]["state"], "reason": now["learner"]["error"]}
    if now["worker"]["state"] != before["worker"]["state"]:
        yield {"kind": "worker", "state": now["worker"]["state"], "reason": now["worker"]["error"]}
