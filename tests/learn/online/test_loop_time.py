"""When the loop reads, learns, tries and saves, and how it gives way to requests."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.learner_harness import LearnerHarness, MakeHarness
from support.live_traces import asked_again

from aurora_lit.learn.online import loop
from aurora_lit.learn.online.budget import Budget, ServerLoad
from aurora_lit.learn.online.trial import Trial
from aurora_lit.traces.record import Trace


def test_rounds_get_their_cores_back_when_the_learner_has_loaded_though_it_must_wait(make: MakeHarness) -> None:
    harness = make()
    harness.page.write(busy_threads=2)
    harness.load = ServerLoad.FULL
    harness.loop._budget = SimpleNamespace(wait_s=lambda load: 1.0, measured_share=0.0)  # type: ignore[assignment]
    busy: list[int] = []

    def stop(_: float) -> None:
        busy.append(harness.page.read().busy_threads)
        harness.loop.stop()

    harness.environment.sleep = stop
    harness.loop.run()
    assert busy == [0]


def test_while_its_share_is_used_up_reading_has_a_share_too(make: MakeHarness, traffic: list[Trace]) -> None:
    """Else reading many short requests would use up what steps are given."""
    harness = make()
    harness.ring.records.extend(harness.traffic)
    harness.loop._budget = SimpleNamespace(wait_s=lambda load: 1.0, measured_share=0.0)  # type: ignore[assignment]
    for is_due, left in ((False, len(traffic)), (True, max(0, len(traffic) - 32))):
        limit = SimpleNamespace(is_due=is_due, measured=contextlib.nullcontext)
        harness.loop._reading_limit = limit  # type: ignore[assignment]
        harness.loop.tick()
        assert len(harness.ring.records) == left


def test_beside_many_requests_reading_leaves_the_time_for_steps(make: MakeHarness) -> None:
    """Once traces wait; without any there would be no step."""
    harness = make()
    harness.ask(8)
    read: list[int] = []
    harness.loop._reading_limit = SimpleNamespace(is_due=False, measured=contextlib.nullcontext)  # type: ignore[assignment]
    while harness.learner.steps < 12:
        before, waiting = len(harness.ring.records), harness.loop.batcher.num_waiting
        harness.loop.tick()
        read.append(before - len(harness.ring.records))
        assert bool(read[-1]) == (waiting == 0)
    assert read[0] == 32
    assert read.count(0) > len(read) / 2


@pytest.mark.parametrize(
    ("load", "first"),
    [(ServerLoad.IDLE, 0), (ServerLoad.SPARE, 20), (ServerLoad.FULL, 20)],
    ids=lambda value: str(value),
)
def test_while_there_are_requests_a_learner_that_is_behind_goes_on_with_the_newest(
    make: MakeHarness, traffic: list[Trace], load: ServerLoad, first: int
) -> None:
    """Else it would always read what the ring is about to overwrite; without requests there is time for all."""
    harness = make()
    harness.load, harness.ring.passes_over = load, True
    records = [replace(traffic[0], request_id=str(number)) for number in range(70)]
    harness.ring.records.extend(records)
    harness.loop.tick()
    assert [trace.request_id for trace in harness.ring.records] == [str(number) for number in range(first + 32, 70)]


def test_a_few_positions_that_are_held_back_stop_neither_reading_nor_the_pause(
    make: MakeHarness, traffic: list[Trace]
) -> None:
    harness = make()
    batcher = harness.loop.batcher
    batcher.add(traffic[0])
    batcher.positions_out = 10_000
    harness.loop._reading_limit = SimpleNamespace(is_due=False, measured=contextlib.nullcontext)  # type: ignore[assignment]
    harness.ring.records.append(traffic[1])
    harness.loop.tick()
    assert not harness.ring.records
    assert (harness.learner.steps, harness.sleeps_s) == (0, [0.2])
    assert batcher.num_waiting >= 1
    batcher.positions_out = 0
    harness.loop.tick()
    assert harness.learner.steps == 1


@pytest.mark.parametrize("has_time", [True, False])
def test_an_idle_loop_looks_often_and_reports_once_a_second(make: MakeHarness, has_time: bool) -> None:
    """Without traces, or without time for them."""
    harness = make()
    clock, reports = [1000.0], []
    harness.environment.monotonic_s = lambda: clock[0]
    harness.environment.sleep = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    harness.loop._budget = SimpleNamespace(wait_s=lambda load: 1.0, measured_share=0.0)  # type: ignore[assignment]
    report = harness.loop._report
    harness.loop._report = lambda: (reports.append(clock[0]), report())  # type: ignore[method-assign, assignment, return-value]
    if has_time:
        harness.loop._budget.wait_s = lambda load: 0.0 if load is ServerLoad.SPARE else 1.0  # type: ignore[method-assign]
    for load in (ServerLoad.SPARE, ServerLoad.FULL):
        harness.load = load
        for _ in range(52):
            harness.loop.tick()
    assert clock[0] == pytest.approx(1020.8)
    assert len(reports) == pytest.approx(21, abs=2)
    assert any(reported == pytest.approx(1010.4) for reported in reports), "what it does now is told at once"


@pytest.mark.parametrize(
    ("load", "activity", "records"),
    [
        (ServerLoad.SPARE, "resting: its share is used up", 5),
        (ServerLoad.FULL, "yielding to requests", 0),
        (ServerLoad.QUEUEING, "yielding to requests", 0),
    ],
)
def test_without_budget_the_loop_sleeps_and_reads_traces_only_while_slots_are_free(
    make: MakeHarness, traffic: list[Trace], load: ServerLoad, activity: str, records: int
) -> None:
    harness = make()
    spent = 0.0
    harness.loop._budget = Budget(idle_share=0.0, share=0.001, cpu_s=lambda: spent)
    spent, harness.load = 100.0, load
    harness.ring.records.extend(harness.traffic[:5])
    for _ in range(3):
        harness.loop.tick()
    assert (harness.learner.steps, harness.loop.records, len(harness.sleeps_s)) == (0, records, 3)
    assert harness.page.read().activity == activity
    assert max(harness.sleeps_s) <= 0.2


class Clocks:
    """Wall and processor time that only the test advances."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def compute(self, duration_s: float) -> None:
        self.wall_s += duration_s
        self.cpu_s += duration_s

    def sleep(self, duration_s: float) -> None:
        self.wall_s += duration_s

    def budget(self, **shares: float) -> Budget:
        return Budget(**shares, wall_s=lambda: self.wall_s, cpu_s=lambda: self.cpu_s)  # type: ignore[arg-type]


def without_learning(harness: LearnerHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's steps are counted, which is all that a schedule of the loop's turns needs."""

    def update(_: Any) -> None:
        harness.learner.steps += 1

    monkeypatch.setattr(harness.learner, "update", update)


def test_turns_without_work_leave_the_share_to_steps(
    make: MakeHarness, traffic: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn costs a millisecond, and the timer is never late."""
    harness, clocks = make(batch_positions=64), Clocks()
    without_learning(harness, monkeypatch)
    harness.environment.sleep = clocks.sleep
    harness.ring.records.extend(harness.traffic)
    harness.loop._budget = clocks.budget(idle_share=0.0, share=0.04, cpus=2)
    for _ in range(30):
        clocks.compute(0.001)
        harness.loop.tick()
    assert harness.learner.steps >= 10


def test_saving_takes_a_small_share_of_the_time_that_learning_takes(
    make: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(time, "process_time", lambda: clocks.cpu_s)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    harness = make(batch_positions=64, publish_every_s=3600.0)
    without_learning(harness, monkeypatch)
    harness.ask(4)
    saved_at_s: list[float] = []

    def save() -> None:
        saved_at_s.append(clocks.cpu_s)
        clocks.compute(0.3)

    monkeypatch.setattr(harness.learner, "save", save)
    for _ in range(80):
        clocks.compute(0.5)
        harness.loop.tick()
    assert len(saved_at_s) >= 2
    assert all(later - earlier >= 0.3 / 0.03 for earlier, later in itertools.pairwise(saved_at_s))


@pytest.mark.slow
def test_trials_take_a_small_share_of_the_time_that_learning_takes(
    make: MakeHarness, traffic: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(time, "process_time", lambda: clocks.cpu_s)
    harness = make(publish_every_steps=1, limits_trials=True, batch_positions=64)
    without_learning(harness, monkeypatch)
    waiting = iter(asked_again(traffic, 12))
    began_s: list[float] = []

    def compare(*_: Any, **__: Any) -> None:
        began_s.append(clocks.cpu_s)
        clocks.compute(2.0)

    monkeypatch.setattr(Trial, "hold", compare)
    for _ in range(120):
        harness.ring.records.extend(itertools.islice(waiting, 5))
        clocks.compute(0.5)
        harness.loop.tick()
    assert len(began_s) >= 3
    assert all(2.0 / 0.12 <= later - earlier < 2.0 / 0.12 + 3 for earlier, later in itertools.pairwise(began_s))
    assert 0.10 < 2.0 * len(began_s) / clocks.cpu_s < 0.14


def test_the_status_page_shows_the_busy_threads_only_while_learning_computes(
    make: MakeHarness, traffic: list[Trace]
) -> None:
    harness = make(threads=3)
    seen: list[int] = []
    harness.environment.sleep = lambda _: seen.append(harness.page.peek("busy_threads"))
    harness.loop.tick()  # nothing to do
    learn = harness.learner.update

    def update(batch: Any) -> Any:
        seen.append(harness.page.peek("busy_threads"))
        return learn(batch)

    harness.learner.update = update  # type: ignore[method-assign]
    harness.ring.records.extend(harness.traffic[:10])
    harness.loop.tick()
    assert seen == [0, 3]
    assert harness.page.peek("busy_threads") == 0


def test_rounds_have_all_cores_while_the_learner_waits_for_the_disk(
    make: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    harness = make(threads=3, publish_every_steps=2)
    harness.trial.champion_score = 0.0
    harness.ask(4)
    busy: list[tuple[str, int]] = []

    def watched(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            busy.append((name, harness.page.peek("busy_threads")))
            return action(*args, **options)

        return act

    harness.learner.save = watched("save", harness.learner.save)  # type: ignore[method-assign]
    harness.store.publish = watched("publish", harness.store.publish)  # type: ignore[method-assign]
    harness.tick_until(lambda: harness.loop.published == 1)
    assert set(busy) == {("save", 0), ("publish", 0)}


def test_a_step_that_began_while_nobody_asked_waits_in_its_middle_for_those_who_do(
    make: MakeHarness, tmp_path: Path, traffic: list[Trace]
) -> None:
    waits, alone = (make(tmp_path / name) for name in ("waits", "alone"))
    clock = Clocks()
    waits.loop._budget = clock.budget(idle_share=1.0, share=0.0001, cpus=1)
    looks: list[ServerLoad] = []
    backward, looks_backward = waits.learner.fabric.backward, 0

    def counted_backward(loss: torch.Tensor) -> None:
        nonlocal looks_backward
        before = len(looks)
        backward(loss)
        looks_backward = len(looks) - before

    waits.learner.fabric.backward = counted_backward  # type: ignore[method-assign, assignment]

    def server_load() -> ServerLoad:
        clock.compute(0.1)
        # At every second look a request is there, and at the next it is answered.
        looks.append(ServerLoad.SPARE if len(looks) % 2 else ServerLoad.IDLE)
        return looks[-1]

    busy_while_waiting: list[tuple[int, float]] = []

    def sleep(duration_s: float) -> None:
        clock.sleep(duration_s)
        busy_while_waiting.append((waits.page.peek("busy_threads"), duration_s))

    waits.environment.server_load, waits.environment.sleep = server_load, sleep
    for harness in (waits, alone):
        harness.ring.records.extend(harness.traffic[:10])
    waits.loop.tick()
    alone.loop.tick()
    assert (waits.learner.steps, alone.learner.steps) == (1, 1)
    before_and_after = 2 * 2
    steps = waits.learner.module.module.num_steps
    assert looks_backward == 2 * steps, "at each step of the chains"
    assert len(looks) == 1 + before_and_after + 2 * (steps - 1) + looks_backward, "forward between them"
    assert busy_while_waiting == [(0, 0.02)] * looks.count(ServerLoad.SPARE)
    assert waits.page.peek("busy_threads") == 0
    expected = alone.learner.draft.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in waits.learner.draft.state_dict().items())


@pytest.mark.parametrize("load", [ServerLoad.SPARE, ServerLoad.FULL])
def test_a_step_within_the_share_that_requests_leave_is_not_interrupted(
    make: MakeHarness, traffic: list[Trace], load: ServerLoad
) -> None:
    harness = make()
    spent = [0.0]
    harness.loop._budget = Budget(idle_share=1.0, share=0.001, cpu_s=lambda: spent[0])
    harness.load = load
    harness.environment.sleep = lambda _: pytest.fail("it waited")
    harness.ring.records.extend(harness.traffic[:10])
    learn = harness.learner.update

    def update(batch: Any) -> Any:
        spent[0] = 100.0
        return learn(batch)

    harness.learner.update = update  # type: ignore[method-assign]
    harness.loop.tick()
    assert harness.learner.steps == 1


def test_a_trial_too_waits_in_its_middle_for_requests(make: MakeHarness) -> None:
    harness = make()
    harness.ask(8)
    looks: list[str] = []
    harness.loop._give_way = lambda: looks.append(harness.loop._activity)  # type: ignore[method-assign]
    harness.tick_until(lambda: harness.loop.decision is not None)
    assert looks.count("comparing drafts") >= 2, "after each batch of requests"
