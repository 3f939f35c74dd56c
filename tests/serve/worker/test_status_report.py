"""What the engine worker writes into its status page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.fake_engine import FakeEngine

from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.serve.worker.call_tracker import CallTracker
from aurora_lit.serve.worker.parts import WorkerParts
from aurora_lit.serve.worker.status_report import RoundTimes, StatusReport


def test_every_counter_of_the_engine_and_each_figure_of_the_memory_has_its_own_field(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(max_draft_tokens=31)
    report = StatusReport(WorkerParts(engine=engine, unrecorded=lambda: 5), CallTracker(engine), None, page)
    report.write()
    assert (page.read().memory_capacity, page.read().prefix_bytes) == (0, 0), "there is none"
    engine.prefix_cache = SimpleNamespace(num_bytes=77)
    engine.memory = SimpleNamespace(index=SimpleNamespace(capacity=9, counts=(1, 2)))
    for number, field in enumerate(dataclasses.fields(engine.counters), start=100):
        value = getattr(engine.counters, field.name)
        setattr(engine.counters, field.name, [number] * len(value) if isinstance(value, list) else number)
    report.write(started_ns=3)
    now = page.read()
    assert {name: getattr(now, name) for name in vars(engine.counters)} == vars(engine.counters)
    assert (now.memory_capacity, now.memory_tokens, now.memory_evicted) == (9, 1, 2)
    assert now.prefix_bytes == 77
    assert (now.unrecorded, now.started_ns, now.draft_version) == (5, 3, "fake-000001")


def test_what_a_swap_brought_is_written_when_it_changes(tmp_path: Path) -> None:
    engine: Any = FakeEngine()
    page = EngineStatusPage.create(tmp_path / "status")
    gain = SimpleNamespace(line="")
    none: Any = {"refused": None, "rolled_back": None, "alarm": None, "domain_watch": None}
    live: Any = SimpleNamespace(gain=gain, num_swaps=1, num_refused=0, num_rollbacks=0, num_alarms=0, **none)
    report = StatusReport(WorkerParts(engine=engine), CallTracker(engine), live, page)
    for line in ("", "draft 7: 2.61 → 2.83 tokens a round", ""):
        gain.line = line
        report.write()
        assert page.read().draft_gain == line


def test_percentiles_of_rounds_are_in_microseconds_and_those_that_swap_a_draft_are_apart() -> None:
    times = RoundTimes()
    assert times.changed_fields() == {}, "no round yet"
    times = RoundTimes()
    for _ in range(99):
        times.add(0.010, swapped=False)
    times.add(0.110, swapped=False)
    times.add(0.250, swapped=True)
    assert times.changed_fields() == {"round_p50_us": 10_000, "round_p99_us": 11_000, "swap_round_p99_us": 250_000}
    assert times.changed_fields() == {}, "once a second"
