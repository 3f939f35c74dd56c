"""Readings of a server while it runs, and the invariants that they must show.

    with Watch(scene) as watch:
        watch.at_rest("baseline")           # while no client runs
    rows = invariants(run)

Leaves out the clients (clients.py) and what is done to the server (faults.py).
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from aurora_lit.bench.load import LOOPBACK, status
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.store import KEPT_VERSIONS
from aurora_lit.drafts.versions import PublishedVersions
from aurora_lit.errors import AuroraError, CheckpointError
from benchmarks.cancelled import Held, held, settled

from .clients import CALL_S, KINDS, Call
from .faults import BY_NAME, Scene

_EVERY_S, _READ_S = 2.0, 5.0
_READINGS = 10
"""Of memory at rest."""
HEALTHY_S, RESTARTED_S = 12.0, 60.0
"""After a fault /health must be 200 within so long; if the server was started again, within the second."""
_LONG_S = 600.0
"""From a last phase of so long on, memory must be flat and speed that of the baseline; else the limits are looser."""
_GROWTH_MB_IN_TEN_MINUTES, _SHORT_GROWTH_MB = 1.05, 128.0
_MORE, _SHORT_MORE = 0, 8
"""Threads, files and sockets: pools fill in the first minutes after a start."""
_SPEED, _SHORT_SPEED = 0.95, 0.75
_TRACES = ("Traceback (most recent call last)", "panicked at", "terminate called")


class Rest(NamedTuple):
    """What a server holds while no client runs."""

    name: str
    time_s: float
    life: int
    """Number of servers before it."""
    held: Held
    memory_by_role_mb: dict[str, float]
    """Pss of its processes, the least of several readings: a learner goes on with steps, each 90 MB."""

    @property
    def memory_mb(self) -> float:
        """Of all of them."""
        return sum(self.memory_by_role_mb.values())


class Done(NamedTuple):
    """A fault that was made. Times are those of the monotonic clock."""

    name: str
    began_s: float
    ended_s: float
    healthy_s: float
    """From then until /health was 200."""
    restarts: int
    note: str
    traces: list[str]
    """Lines of the log that no server should write."""


class Row(NamedTuple):
    """An invariant."""

    name: str
    figure: str
    holds: bool


class Watch:
    """Reads counters, the current version and the number of versions every two seconds."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        config = read_config(scene.draft)
        self._shape = SimpleNamespace(
            vocab_size=config.vocab_size, hidden_size=config.target_hidden_size, aux_layer_ids=config.aux_layer_ids
        )
        self.is_spoilt = threading.Event()
        """CURRENT need not be readable now."""
        self.rests: list[Rest] = []
        self.loads = self.compared = self.most_versions = self.torn = 0
        self.wrong: list[str] = []
        self._checked: tuple[object, ...] = ()
        self._counters: dict[tuple[object, ...], float] = {}
        self._log_at: dict[str, int] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def at_rest(self, name: str) -> None:
        """Note what is held once nothing runs and the counts stand still."""
        server = self._scene.server
        main = server.main()
        found = settled(lambda: held(status(server.url, key=server.key)["queue"], main.pid))
        assert server.server is not None
        readings = [server.server.memory_by_role_mb()]
        while len(readings) < _READINGS:
            time.sleep(_EVERY_S)
            readings.append(server.server.memory_by_role_mb())
        least = min(readings, key=lambda memory_by_role_mb: sum(memory_by_role_mb.values()))
        self.rests.append(Rest(name, time.monotonic(), server.lives, found, least))

    def new_traces(self) -> list[str]:
        """Lines of the logs since the last call that no server should write, each with the one before."""
        found = []
        for log in self._scene.server.logs():
            content = log.read_bytes()
            text = content[self._log_at.get(log.name, 0) :].decode(errors="replace")
            self._log_at[log.name] = len(content)
            lines = text.splitlines()
            for before, line in zip(["", *lines], lines, strict=False):
                if any(sign in line for sign in _TRACES):
                    found.append(f"{log.name}: {before} | {line}")
        return found

    def _run(self) -> None:
        while not self._ends.wait(_EVERY_S):
            with suppress(OSError, AuroraError, psutil.Error, ValueError):  # no server runs, or it hangs
                self._compare_counters()
            self._check_versions()

    def _compare_counters(self) -> None:
        server = self._scene.server
        life = server.lives, server.main().pid
        request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.key}"})
        with LOOPBACK.open(request, timeout=_READ_S) as response:
            text = response.read().decode()
        if (server.lives, server.main().pid) != life:
            return
        for family in text_string_to_metric_families(text):
            if family.type != "counter":
                continue
            for sample in family.samples:
                key = (*life, sample.name, *sorted(sample.labels.items()))
                if sample.name.endswith("_total"):
                    self.compared += 1
                    if sample.value < self._counters.get(key, 0.0):
                        self.wrong.append(f"{sample.name} {sample.labels}: {self._counters[key]} → {sample.value}")
                    self._counters[key] = sample.value
                if sample.name == "aurora_traces_dropped_total" and sample.labels.get("cause") == "torn":
                    self.torn = max(self.torn, int(sample.value))

    def _check_versions(self) -> None:
        versions = PublishedVersions(self._scene.versions)
        for is_last in (False, True):  # what is read may be replaced meanwhile
            if self.is_spoilt.is_set():
                return
            try:
                self.most_versions = max(self.most_versions, len(versions.names()))
                name = versions.current()
                if name is not None and self._checked != (name,):
                    load_draft(self._scene.versions / name, self._shape)
                    self._checked = (name,)
                self.loads += 1
                return
            except CheckpointError as error:
                if is_last and not self.is_spoilt.is_set():
                    self.wrong.append(str(error))
                time.sleep(0.2)


# -- the invariants ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Run:
    """What a run came to."""

    calls: list[Call]
    faults: list[Done]
    watch: Watch
    traces: list[str]
    """As those of a fault, while there was none."""
    first_s: tuple[float, float]
    """Begin and end of the baseline."""
    last_s: tuple[float, float]
    """Of the last phase."""
    canary: Sequence[str] = field(default_factory=list)
    """What was found where it must not be."""
    canary_figure: str = ""


def invariants(run: Run) -> list[Row]:
    """Each with its figure."""
    return [*_of_calls(run), *_of_health(run), *_of_files(run), *_of_rest(run), *_of_logs(run)]


def failed_without_cause(calls: Iterable[Call], faults: Iterable[Done]) -> list[Call]:
    """Calls that failed, or were refused, while no fault lasted that may do that; a full queue may always refuse."""
    excused = [(each.began_s, each.ended_s + each.healthy_s + 1.0) for each in faults if BY_NAME[each.name].fails_calls]

    def is_excused(call: Call) -> bool:
        return any(call.sent_s < until and call.ended_s > since for since, until in excused)

    return [
        call
        for call in calls
        if call.outcome in ("failed", "refused") and not call.detail.startswith("429") and not is_excused(call)
    ]


def speed(calls: Iterable[Call], window_s: tuple[float, float]) -> float:
    """Tokens a second of the compared answers that ended in a window."""
    begin, end = window_s
    tokens = sum(call.tokens for call in calls if call.client in KINDS and begin <= call.ended_s < end)
    return tokens / (end - begin)


def _of_calls(run: Run) -> list[Row]:
    same = [call for call in run.calls if call.outcome == "same"]
    different = [call for call in run.calls if call.outcome == "different"]
    longest = max(run.calls, key=lambda call: call.ended_s - call.sent_s)
    seconds = longest.ended_s - longest.sent_s
    lost = failed_without_cause(run.calls, run.faults)
    failed = sum(call.outcome in ("failed", "refused") for call in run.calls)
    first, last = speed(run.calls, run.first_s), speed(run.calls, run.last_s)
    least = _SPEED if run.last_s[1] - run.last_s[0] >= _LONG_S else _SHORT_SPEED
    return [
        Row("answers equal those without speculation", f"{len(same)} equal, {len(different)} not", not different),
        Row(
            f"every call ends within {CALL_S:.0f} s",
            f"{len(run.calls)} calls, longest {seconds:.1f} s",
            seconds < CALL_S,
        ),
        Row("calls fail in faults that end processes only", f"{failed} in these, {len(lost)} beside", not lost),
        Row(
            f"last phase at least {least:.0%} as fast as baseline",
            f"{first:.1f} → {last:.1f} tokens/s ({last / first:.0%})",
            last >= least * first,
        ),
    ]


def _of_health(run: Run) -> list[Row]:
    ends = [each for each in run.faults if each.restarts]
    stays = [each for each in run.faults if not each.restarts]
    slowest = max((each.healthy_s for each in stays), default=0.0)
    slowest_start = max((each.healthy_s for each in ends), default=0.0)
    unexpected = [each.name for each in ends if not BY_NAME[each.name].restarts]
    told = f"{sum(each.restarts for each in ends)} restarts, {', '.join(unexpected) or 'none'} in other faults"
    return [
        Row(f"healthy within {HEALTHY_S:.0f} s after a fault", f"{slowest:.1f} s at most", slowest <= HEALTHY_S),
        Row(
            f"within {RESTARTED_S:.0f} s after a restart",
            f"{slowest_start:.1f} s at most",
            slowest_start <= RESTARTED_S,
        ),
        Row("restarts in faults that end processes only", told, not unexpected),
    ]


def _of_files(run: Run) -> list[Row]:
    watch, most = run.watch, KEPT_VERSIONS + 2
    decreased = [each for each in watch.wrong if "→" in each]
    unread = [each for each in watch.wrong if "→" not in each]
    return [
        Row("CURRENT always loads", f"{watch.loads} checks, {len(unread)} failed", not unread),
        Row(f"versions ≤ {most}", f"{watch.most_versions} at most", watch.most_versions <= most),
        Row("counters never decrease", f"{watch.compared:,} compared, {len(decreased)} did", not decreased),
        Row("torn traces", str(watch.torn), watch.torn == 0),
    ]


def _of_rest(run: Run) -> list[Row]:
    queues = [sum(each.held[:3]) for each in run.watch.rests]
    first, before, after = run.watch.rests[0], *run.watch.rests[-2:]
    minutes = (after.time_s - before.time_s) / 60
    is_long = minutes * 60 >= _LONG_S
    growth, more = after.memory_mb - before.memory_mb, _MORE if is_long else _SHORT_MORE
    most = _GROWTH_MB_IN_TEN_MINUTES * minutes / 10 if is_long else _SHORT_GROWTH_MB
    where = ", ".join(
        f"{role} {before.memory_by_role_mb.get(role, 0.0):.0f} → {mb:.0f}"
        for role, mb in after.memory_by_role_mb.items()
    )
    rows = [
        Row("the queue returns to 0", f"{queues} at rest", not any(queues)),
        Row(
            f"memory grows by at most {most:.1f} MB in the last {minutes:.1f} minutes",
            f"{first.memory_mb:.0f} MB after the baseline, {before.memory_mb:.0f} → {after.memory_mb:.0f} MB: {where}",
            growth <= most and before.life == after.life,
        ),
    ]
    for name in ("threads", "files", "sockets"):
        numbers = [getattr(each.held, name) for each in (first, before, after)]
        figure = f"{numbers[0]} after the baseline, {numbers[1]} → {numbers[2]}"
        rows.append(Row(f"{name}: at most {more} more after that time", figure, numbers[2] <= numbers[1] + more))
    return rows


def _of_logs(run: Run) -> list[Row]:
    expected = [line for each in run.faults if BY_NAME[each.name].traces for line in each.traces]
    of_others = [line for each in run.faults if not BY_NAME[each.name].traces for line in each.traces]
    other = [*run.traces, *of_others]
    return [
        Row("no traceback but where one is expected", f"{len(expected)} expected, {len(other)} not", not other),
        Row("the canary is found nowhere", run.canary_figure, not run.canary),
    ]
