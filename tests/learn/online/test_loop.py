"""The loop: it improves a draft on traffic, publishes through the gate, follows rollbacks, keeps to its budget."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.learner_harness import LearnerHarness
from support.live_traces import asked_again, make_controller, serve, some_requests

from aurora_lit.drafts.centroid_file import CENTROIDS_NAME, read_centroids, write_centroids
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import AuroraError, CheckpointError
from aurora_lit.learn.online import gate, loop
from aurora_lit.learn.online.budget import Budget, ServerLoad, ShareLimit
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.centroids import Centroids
from aurora_lit.modules.domains.detector import DomainDetector
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace, to_bytes


def accepted_length(target: Target, draft: Eagle3Draft) -> float:
    """Tokens a round that the engine gets with a draft on greedy prompts of the traffic."""
    traces = serve(target, draft, some_requests(10))
    accepted = torch.cat([trace.num_accepted_R for trace in traces])
    return 1 + float(accepted.float().mean())


@pytest.fixture(scope="module")
def learned(
    target: Target, traffic: list[Trace], tmp_path_factory: pytest.TempPathFactory
) -> tuple[LearnerHarness, Eagle3Draft]:
    """A learner that has published twice, and the second draft."""
    harness = LearnerHarness(target, tmp_path_factory.mktemp("learned"), publish_every_steps=25)
    harness.ring.records.extend(asked_again(traffic, 20))
    harness.tick_until(lambda: harness.loop.published >= 2)
    return harness, harness.served_draft("draft-000002")


def test_a_draft_gets_better_on_traffic_and_is_published_through_the_gate(
    target: Target, traffic: list[Trace], learned: tuple[LearnerHarness, Eagle3Draft]
) -> None:
    harness, draft = learned
    name = "draft-000002"
    before, after = accepted_length(target, harness.starting), accepted_length(target, draft)
    assert after > before + 0.3, (before, after)
    record = harness.store.versions()[1].record
    assert record["score"] > record["champion_score"]
    page = harness.page.read()
    assert (page.records, page.skipped, page.published) == (20 * len(traffic) - len(harness.ring.records), 0, 2)
    assert page.version == name
    assert page.steps == harness.learner.steps >= 50
    assert harness.loop.records > 0
    remembered = {trace.request_id for _ in range(300) if (trace := harness.loop.batcher.reservoir.sample())}
    held_out = {request.request_id for request in harness.loop.held_out}
    assert len(remembered) > 20
    assert not remembered & held_out


def test_the_gate_holds_back_a_draft_that_got_worse(
    target: Target, traffic: list[Trace], learned: tuple[LearnerHarness, Eagle3Draft], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, draft=learned[1])
    harness.ring.records.extend(asked_again(traffic, 8))
    with torch.no_grad():
        harness.learner.draft.lm_head.weight.zero_()  # and it does not learn
    for group in (g for optimizer in harness.learner.optimizers for g in optimizer.param_groups):
        group["lr"] = group["initial_lr"] = 0.0
    for schedule in harness.learner.schedules:
        schedule.base_lrs = [0.0]
    harness.tick_until(lambda: harness.loop.refused_by_gate >= 1)
    assert harness.store.current() is None
    assert harness.loop.published == 0
    assert harness.page.read().gate_refused == 1


def test_after_a_rollback_the_learner_continues_from_the_served_draft(
    learned: tuple[LearnerHarness, Eagle3Draft],
) -> None:
    harness, _ = learned
    first, second = (version.name for version in harness.store.versions())
    harness.loop._follow_versions()
    assert harness.learner.version == second
    harness.store.roll_back(bad=second, reason="test")
    harness.loop._follow_versions()
    assert harness.learner.version == first
    served = harness.served_draft(first).state_dict()
    assert all(torch.equal(tensor, served[name]) for name, tensor in harness.learner.draft.state_dict().items())
    assert not any(optimizer.state for optimizer in harness.learner.optimizers)

    # A newer draft of another publisher is the champion, but the learner does not continue from it.
    forced = harness.served_draft(first)
    with torch.no_grad():
        forced.lm_head.weight.zero_()
    harness.store.publish(forced, record={})
    mine = copy.deepcopy(harness.learner.draft.state_dict())
    harness.loop._follow_versions()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in harness.learner.draft.state_dict().items())
    assert not harness.loop._champion.draft.lm_head.weight.any()


def test_a_version_rolled_back_before_the_loop_has_looked_is_not_learned_on_from(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(asked_again(traffic, 2))
    harness.tick_until(lambda: harness.learner.steps >= 3)
    harness.learner.version = harness.store.publish(harness.learner.draft, record={})
    harness.held_out.evidence.add([0.3] * 12)
    assert harness.held_out.evidence.value > 1
    harness.store.roll_back(bad=harness.learner.version, reason="test")
    harness.loop._follow_versions()
    assert harness.learner.version == STARTING_VERSION
    assert torch.equal(harness.learner.draft.lm_head.weight, harness.starting.lm_head.weight)
    assert harness.held_out.evidence.value == 1
    weights = harness.learner.num_weight_changes
    harness.loop._follow_versions()
    assert harness.learner.num_weight_changes == weights, "once"


def test_counts_do_not_fall_behind_those_of_a_learner_that_was_killed(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, told_before={"steps": 5, "positions": 10**6})
    harness.ring.records.extend(asked_again(traffic, 2))
    harness.tick_until(lambda: harness.learner.steps == 2)
    page = harness.page.read()
    assert (page.steps, page.positions) == (5 + 2, 10**6 + harness.learner.positions), "they do not stand still"


def test_the_page_says_what_the_servers_first_learner_began_with(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    """What was learned since is the server's, whoever asks and when, and also after a restart of the learner."""
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(asked_again(traffic, 2))
    harness.tick_until(lambda: harness.learner.steps == 2)
    page = harness.page.read()
    assert (page.steps, page.steps_before, page.positions_before) == (2, 0, 0)
    harness.loop._save()

    next_server = LearnerHarness(target, tmp_path, resumes=True)
    page = next_server.page.read()
    assert page.steps == page.steps_before == 2
    assert page.positions == page.positions_before == harness.learner.positions

    told = {"steps": 9, "positions": 10**6, "steps_before": 1, "positions_before": 50, "rate_factor": 1}
    page = LearnerHarness(target, tmp_path, resumes=True, told_before=told).page.read()
    assert (page.steps, page.steps_before, page.positions, page.positions_before) == (9, 1, 10**6, 50)


def test_rounds_get_their_cores_back_when_the_learner_has_loaded_though_it_must_wait(
    target: Target, tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path)
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


def test_while_its_share_is_used_up_reading_has_a_share_too(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    """Else reading many short requests would use up what steps are given."""
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(traffic)
    harness.loop._budget = SimpleNamespace(wait_s=lambda load: 1.0, measured_share=0.0)  # type: ignore[assignment]
    for is_due, left in ((False, len(traffic)), (True, max(0, len(traffic) - 32))):
        limit = SimpleNamespace(is_due=is_due, measured=contextlib.nullcontext)
        harness.loop._reading_limit = limit  # type: ignore[assignment]
        harness.loop.tick()
        assert len(harness.ring.records) == left


def test_beside_many_requests_reading_leaves_the_time_for_steps(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    """Once traces wait; without any there would be no step."""
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(asked_again(traffic, 8))
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
    target: Target, traffic: list[Trace], tmp_path: Path, load: ServerLoad, first: int
) -> None:
    """Else it would always read what the ring is about to overwrite; without requests there is time for all."""
    harness = LearnerHarness(target, tmp_path)
    harness.load, harness.ring.passes_over = load, True
    records = [replace(traffic[0], request_id=str(number)) for number in range(70)]
    harness.ring.records.extend(records)
    harness.loop.tick()
    assert [trace.request_id for trace in harness.ring.records] == [str(number) for number in range(first + 32, 70)]


def test_a_few_positions_that_are_held_back_stop_neither_reading_nor_the_pause(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path)
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
def test_an_idle_loop_looks_often_and_reports_once_a_second(target: Target, tmp_path: Path, has_time: bool) -> None:
    """Without traces, or without time for them."""
    harness = LearnerHarness(target, tmp_path)
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


def test_damaged_traces_and_those_without_finite_loss_are_counted_and_change_no_weight(
    target: Target, traffic: list[Trace], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harness = LearnerHarness(target, tmp_path)
    huge = replace(traffic[0], request_id="a", aux_T3H=torch.full_like(traffic[0].aux_T3H, 3e38))
    other = traffic[1]
    foreign = replace(
        other,
        aux_T3H=torch.cat([other.aux_T3H] * 2, -1),
        last_TH=torch.cat([other.last_TH] * 2, -1),
        rejected_last_NH=torch.cat([other.rejected_last_NH] * 2, -1),
    )
    bad = [b"", b"no trace", to_bytes(traffic[0])[:-7], to_bytes(traffic[0]).replace(b"aux", b"axu", 1)]
    harness.ring.records.extend([*bad, foreign, foreign, huge])
    before = copy.deepcopy(harness.learner.draft.state_dict())
    for _ in range(12):
        harness.loop.tick()
    assert harness.loop.skipped == len(bad) + 2
    assert harness.learner.num_nonfinite > 0
    assert harness.page.read().skipped == harness.loop.skipped + harness.learner.num_nonfinite
    assert caplog.text.count("a trace is not learned from: it is of another target;") == 1
    assert harness.learner.steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in harness.learner.draft.state_dict().items())
    harness.ring.records.extend(traffic)
    harness.tick_until(lambda: harness.learner.steps >= 3)


@pytest.mark.parametrize(
    ("load", "activity", "records"),
    [
        (ServerLoad.SPARE, "resting: its share is used up", 5),
        (ServerLoad.FULL, "yielding to requests", 0),
        (ServerLoad.QUEUEING, "yielding to requests", 0),
    ],
)
def test_without_budget_the_loop_sleeps_and_reads_traces_only_while_slots_are_free(
    target: Target, traffic: list[Trace], tmp_path: Path, load: ServerLoad, activity: str, records: int
) -> None:
    harness = LearnerHarness(target, tmp_path)
    spent = 0.0
    harness.loop._budget = Budget(
        idle_share=0.0, share=0.001, full_load_share=0.001, minimum_share=0.0, cpu_s=lambda: spent
    )
    spent, harness.load = 100.0, load
    harness.ring.records.extend(traffic[:5])
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
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn costs a millisecond, and the timer is never late."""
    harness, clocks = LearnerHarness(target, tmp_path, batch_positions=64), Clocks()
    without_learning(harness, monkeypatch)
    harness.environment.sleep = clocks.sleep
    harness.ring.records.extend(traffic)
    harness.loop._budget = clocks.budget(idle_share=0.0, share=0.04, full_load_share=0.02, minimum_share=0.005, cpus=2)
    for _ in range(30):
        clocks.compute(0.001)
        harness.loop.tick()
    assert harness.learner.steps >= 10


def test_saving_takes_a_small_share_of_the_time_that_learning_takes(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(time, "process_time", lambda: clocks.cpu_s)
    harness = LearnerHarness(target, tmp_path, save_every_s=0.0, batch_positions=64, publish_every_s=3600.0)
    without_learning(harness, monkeypatch)
    harness.ring.records.extend(asked_again(traffic, 4))
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


def test_a_save_that_failed_is_tried_again_though_no_step_was_taken_since(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = LearnerHarness(target, tmp_path, save_every_s=0.0, publish_every_s=3600.0)
    harness.loop._saving_limit = ShareLimit(1.0)
    harness.ring.records.extend(traffic[:10])
    (tmp_path / ".learner.safetensors.tmp").mkdir()  # nothing can be written there
    harness.tick_until(lambda: "state could not be saved" in harness.page.read().error)
    monkeypatch.setattr(harness.loop, "_step", lambda: False)
    (tmp_path / ".learner.safetensors.tmp").rmdir()
    harness.loop.tick()
    assert harness.learner.resume()
    assert harness.page.read().error == ""
    (tmp_path / "learner.safetensors").unlink()
    harness.loop.tick()
    assert not harness.learner.resume(), "once is enough"


def test_trials_take_a_small_share_of_the_time_that_learning_takes(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    monkeypatch.setattr(time, "process_time", lambda: clocks.cpu_s)
    harness = LearnerHarness(target, tmp_path, publish_every_steps=1, limits_trials=True, batch_positions=64)
    without_learning(harness, monkeypatch)
    harness.held_out.champion_score = 100.0  # no challenger passes
    waiting = iter(asked_again(traffic, 12))
    began_s: list[float] = []

    def compare(*args: Any, **options: Any) -> Any:
        began_s.append(clocks.cpu_s)
        clocks.compute(2.0)
        return gate.compare_drafts(*args, **options)

    monkeypatch.setattr(loop, "compare_drafts", compare)
    for _ in range(120):
        harness.ring.records.extend(itertools.islice(waiting, 5))
        clocks.compute(0.5)
        harness.loop.tick()
    assert len(began_s) >= 3
    assert all(2.0 / 0.12 <= later - earlier < 2.0 / 0.12 + 3 for earlier, later in itertools.pairwise(began_s))
    assert 0.10 < 2.0 * len(began_s) / clocks.cpu_s < 0.14


def test_the_gate_is_told_how_hot_traffic_is(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    def compare(*args: Any, heat: float, **options: Any) -> None:
        told.append(heat)

    monkeypatch.setattr(loop, "compare_drafts", compare)
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2)
    waiting = iter(asked_again(traffic, 12))
    hot: list[float] = []
    for _ in range(30):
        harness.ring.records.extend(itertools.islice(waiting, 5))
        harness.loop.tick()
        hot += [harness.learner.controller.heat] * (len(told) - len(hot))
    assert told == hot
    assert told[-1] < told[0], "it cools as it is learned"


def test_after_repeated_refusals_the_learner_restarts_from_the_served_draft_at_half_the_rate(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2)
    harness.held_out.champion_score = 100.0
    start = copy.deepcopy(harness.learner.draft.state_dict())
    harness.ring.records.extend(asked_again(traffic, 8))

    def is_unchanged() -> bool:
        return all(torch.equal(tensor, start[name]) for name, tensor in harness.learner.draft.state_dict().items())

    harness.tick_until(lambda: harness.loop.refused_by_gate == PATIENCE_TRIALS - 1)
    assert not is_unchanged()
    assert harness.learner.schedules[0].backoff == 1
    harness.tick_until(lambda: harness.loop.refused_by_gate == PATIENCE_TRIALS)
    assert is_unchanged()
    assert {schedule.backoff for schedule in harness.learner.schedules} == {0.5}
    assert harness.held_out.evidence.value == 1.0, "what speaks against the old lineage does not hinder the new one"
    harness.held_out.champion_score = 0.0
    harness.tick_until(lambda: harness.loop.published == 1)
    assert {schedule.backoff for schedule in harness.learner.schedules} == {1}
    assert not is_unchanged(), "learning continues from a draft that passed"


def test_evidence_goes_on_after_a_restart_while_the_same_draft_is_served(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    """Or an equal draft would pass sooner or later, a chance for each restart."""
    first = LearnerHarness(target, tmp_path, publish_every_s=3600.0)
    first.ring.records.extend(traffic[:10])
    first.tick_until(lambda: first.learner.steps >= 1)
    first.held_out.evidence.add([-0.2] * 6)
    first.loop.stop()
    first.loop.run()
    again = LearnerHarness(target, tmp_path, resumes=True)
    assert again.held_out.evidence.value == first.held_out.evidence.value < 0.2
    first.store.publish(first.starting, record={})
    other = LearnerHarness(target, tmp_path, resumes=True)
    assert other.held_out.evidence.value == 1.0, "it was against another draft"


def test_the_status_page_shows_the_busy_threads_only_while_learning_computes(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, threads=3)
    seen: list[int] = []
    harness.environment.sleep = lambda _: seen.append(harness.page.peek("busy_threads"))
    harness.loop.tick()  # nothing to do
    learn = harness.learner.update

    def update(batch: Any) -> Any:
        seen.append(harness.page.peek("busy_threads"))
        return learn(batch)

    harness.learner.update = update  # type: ignore[method-assign]
    harness.ring.records.extend(traffic[:10])
    harness.loop.tick()
    assert seen == [0, 3]
    assert harness.page.peek("busy_threads") == 0


def test_rounds_have_all_cores_while_the_learner_waits_for_the_disk(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, threads=3, publish_every_steps=2, save_every_s=0.0)
    harness.held_out.champion_score = 0.0
    harness.ring.records.extend(asked_again(traffic, 4))
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CheckpointError("cannot be read")])
def test_a_full_disk_is_reported_and_learning_continues(
    error: Exception, target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2, save_every_s=0.1)
    (tmp_path / ".learner.safetensors.tmp").mkdir()  # nothing can be written there

    def full(*_: Any, **__: Any) -> str:
        raise error

    harness.held_out.champion_score = 0.0
    harness.ring.records.extend(asked_again(traffic, 4))
    failures = ("draft could not be published", "state could not be saved")
    with monkeypatch.context() as patched:
        patched.setattr(harness.store, "publish", full)
        harness.tick_until(lambda: all(failure in harness.page.read().error for failure in failures))
        steps = harness.learner.steps
        harness.tick_until(lambda: harness.learner.steps > steps)
        assert (harness.loop.published, harness.learner.version) == (0, STARTING_VERSION)
    (tmp_path / ".learner.safetensors.tmp").rmdir()
    harness.tick_until(lambda: failures[1] not in harness.page.read().error)
    harness.tick_until(lambda: harness.page.read().error == "", max_ticks=100)
    assert harness.loop.published == 1, "what failed once is not told for ever"


def test_that_a_draft_could_not_be_published_is_told_no_longer_once_another_did_not_pass(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2)

    def full(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harness.store, "publish", full)
    harness.held_out.champion_score = 0.0
    harness.ring.records.extend(asked_again(traffic, 4))
    harness.tick_until(lambda: "draft could not be published" in harness.page.read().error)
    harness.held_out.champion_score = 100.0
    harness.tick_until(lambda: harness.loop.refused_by_gate > 0)
    assert harness.page.read().error == "", "nobody tries to publish any more"


def test_metrics_that_cannot_be_written_are_reported_and_learning_continues(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_s=3600.0)
    calls: list[int] = []

    def full(values: dict[str, float], *, step: int) -> None:
        calls.append(step)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(harness.learner.fabric, "log_dict", full)
    harness.ring.records.extend(asked_again(traffic, 4))
    harness.tick_until(lambda: "metrics are not logged" in harness.page.read().error)
    harness.tick_until(lambda: harness.learner.steps >= 17)
    assert calls == [8]
    assert harness.page.read().loss > 0, "also where the last step's metrics were logged"


def test_beside_a_version_that_cannot_be_loaded_learning_goes_on_from_the_one_before(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_s=3600.0)
    harness.ring.records.extend(asked_again(traffic, 4))
    sound = harness.store.publish(harness.starting, record={})
    harness.tick_until(lambda: harness.loop._current_version == sound)
    loaded: list[str | None] = []

    def load(version: str | None) -> Eagle3Draft:
        loaded.append(version)
        return harness.served_draft(version)

    harness.environment.served_draft = load
    damaged = harness.store.publish(harness.starting, record={})
    (harness.store.folder / damaged / "model.safetensors").write_bytes(b"")
    steps = harness.learner.steps
    harness.tick_until(lambda: harness.learner.steps >= steps + 3)
    assert loaded == [damaged], "not in each turn"
    assert damaged in harness.page.read().error
    assert harness.loop._current_version == sound
    harness.store.roll_back(bad=damaged, reason="test")
    harness.loop._follow_versions()
    assert harness.page.read().error == ""
    again = LearnerHarness(target, tmp_path)
    assert again.loop._current_version == sound, "a learner that is started then takes it too"
    (harness.store.folder / "CURRENT").write_text("nonsense")
    assert LearnerHarness(target, tmp_path).loop._current_version is None


def test_a_version_of_another_shape_ends_the_learner_with_a_remedy(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(traffic)
    harness.tick_until(lambda: harness.learner.steps >= 2)
    wider = replace(harness.starting.config, intermediate_size=2 * harness.starting.config.intermediate_size)
    other = Eagle3Draft(wider)
    other.load_state_dict({name: harness.starting.state_dict()[name] for name in ("d2t", "t2d")}, strict=False)
    harness.store.publish(other, record={})
    with pytest.raises(AuroraError, match="draft-000001 is of another shape than the draft that learns; start the"):
        harness.tick_until(lambda: False)
    assert not harness.learner.state_path.exists(), "the last state of the other shape is not overwritten"


def test_learning_begins_from_the_starting_draft_if_no_version_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise CheckpointError("cannot be read")

    monkeypatch.setattr(DraftStore, "current", lambda _: "draft-000002")
    monkeypatch.setattr(DraftStore, "version_before", broken)
    assert loop.newest_usable(DraftStore(tmp_path, keep=3), broken) == (None, None)


def test_domains_set_learning_rate_and_exploration_and_are_reported(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    controller = make_controller(
        detector=detector, explore_shares=(0.02, 0.2), warmup_steps=0, min_lr_factor=0.5, decay_tokens=600.0
    )
    harness = LearnerHarness(target, tmp_path, controller=controller, publish_every_s=3600.0, gate_requests=2)

    def learn(traces: Sequence[Trace]) -> float:
        """The learning rate after a step."""
        harness.ring.records.extend(traces)
        steps = harness.learner.steps
        harness.tick_until(lambda: harness.learner.steps == steps + 1)
        (rate,) = {group["lr"] for optimizer in harness.learner.optimizers for group in optimizer.param_groups}
        return float(rate)

    chat = [trace for trace in traffic if trace.domain == "chat"]
    assert controller.explore_share == pytest.approx(0.2), "all is new"
    for n in range(6):
        last = learn(chat[8 * n : 8 * n + 8])
    assert last == pytest.approx(0.5 * 4e-3, rel=0.1)
    page = harness.page.read()
    assert page.domains.startswith("chat 100% (heat 0.0")
    assert page.rate_factor == pytest.approx(0.5, abs=0.03)
    assert page.explore_share == pytest.approx(0.02, abs=0.01)

    code = [replace(trace, domain="code", request_id=f"code{n}") for n, trace in enumerate(chat[:12])]
    rates = [learn(code[4 * n : 4 * n + 4]) for n in range(3)]
    assert max(rates) > 1.1 * last, "the new domain is learned faster"
    page = harness.page.read()
    assert "code" in page.domains
    assert page.explore_share > 0.03
    assert set(harness.loop.batcher.reservoir.domains) == {"chat", "code"}


def test_domains_are_published_beside_the_drafts_and_a_full_disk_is_reported(
    target: Target, traffic: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    harness = LearnerHarness(target, tmp_path, controller=make_controller(detector=detector), publish_every_s=3600.0)
    path = harness.store.folder / CENTROIDS_NAME
    harness.ring.records.extend(traffic)
    with monkeypatch.context() as patched:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("aurora_lit.learn.online.centroid_publisher.write_centroids", full)
        harness.tick_until(lambda: "domains could not be published" in harness.page.read().error)
    harness.loop._centroid_publisher._last_s = -float("inf")  # the pause after a failure is over
    harness.tick_until(path.exists)
    assert harness.page.read().error == ""
    centroids, version = read_centroids(path, harness.target_head)
    assert (centroids.names, version) == (("chat",), 1), "the traffic's label"


def test_a_domain_has_no_number_that_a_killed_learner_had_used(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    size_E = 3 * target.hidden_size
    centroids = Centroids(
        names=("code", "auto-7"),
        centroid_DE=torch.eye(2, size_E),
        mean_E=torch.zeros(size_E),
        variance_E=torch.ones(size_E),
        common=1.0,
        novelty_threshold=0.7,
    )
    write_centroids(tmp_path / "live" / CENTROIDS_NAME, centroids, version=1, target=target)
    detector = DomainDetector(max_domains=4, novelty_threshold=0.7)
    harness = LearnerHarness(target, tmp_path, controller=make_controller(detector=detector))
    harness.ring.records.extend(replace(trace, domain="") for trace in traffic)
    harness.tick_until(lambda: bool(detector.domains))
    assert set(detector.domains) == {"auto-8"}


def test_a_step_that_began_while_nobody_asked_waits_in_its_middle_for_those_who_do(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    waits, alone = (LearnerHarness(target, tmp_path / name) for name in ("waits", "alone"))
    clock = Clocks()
    waits.loop._budget = clock.budget(idle_share=1.0, share=0.0001, full_load_share=0.0, minimum_share=0.0, cpus=1)
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
        harness.ring.records.extend(traffic[:10])
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
    target: Target, traffic: list[Trace], tmp_path: Path, load: ServerLoad
) -> None:
    harness = LearnerHarness(target, tmp_path)
    spent = [0.0]
    harness.loop._budget = Budget(
        idle_share=1.0, share=0.001, full_load_share=0.001, minimum_share=0.0, cpu_s=lambda: spent[0]
    )
    harness.load = load
    harness.environment.sleep = lambda _: pytest.fail("it waited")
    harness.ring.records.extend(traffic[:10])
    learn = harness.learner.update

    def update(batch: Any) -> Any:
        spent[0] = 100.0
        return learn(batch)

    harness.learner.update = update  # type: ignore[method-assign]
    harness.loop.tick()
    assert harness.learner.steps == 1


def test_a_trial_too_waits_in_its_middle_for_requests(target: Target, traffic: list[Trace], tmp_path: Path) -> None:
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(asked_again(traffic, 8))
    looks: list[str] = []
    harness.loop._give_way = lambda: looks.append(harness.loop._activity)  # type: ignore[method-assign]
    harness.tick_until(lambda: harness.loop.decision is not None)
    assert looks.count("comparing drafts") >= 2, "after each batch of requests"


def test_the_average_is_what_is_tried_and_published(target: Target, traffic: list[Trace], tmp_path: Path) -> None:
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2, ema_decay=0.9)
    harness.held_out.champion_score = 0.0  # the challenger passes
    harness.ring.records.extend(asked_again(traffic, 8))
    tried: list[torch.Tensor] = []
    learned = harness.learner.draft
    harness.loop._give_way = lambda: tried.append(harness.learner.draft.fc.weight)  # type: ignore[method-assign]
    harness.tick_until(lambda: harness.loop.published > 0)
    with harness.learner.averaged() as module:
        average = module.draft.fc.weight
    assert tried[-1] is average, "during the trial"
    published = harness.environment.served_draft(harness.store.current()).fc.weight
    assert torch.equal(published, average.bfloat16().float())
    assert not torch.equal(published, learned.fc.weight.bfloat16().float())


def test_a_trial_ends_when_the_loop_is_stopped_and_decides_nothing(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    """A server that ends does not wait for long before it kills the learner."""
    harness = LearnerHarness(target, tmp_path, publish_every_steps=2, ema_decay=0.9)
    harness.held_out.champion_score = 0.0  # the challenger would pass
    harness.ring.records.extend(asked_again(traffic, 8))
    draft, looks = harness.learner.draft, list[str]()

    def stop() -> None:
        looks.append(harness.loop._activity)
        harness.loop.stop()

    harness.loop._give_way = stop  # type: ignore[method-assign]
    harness.loop.run()
    assert looks == ["comparing drafts"], "after the first batch of requests"
    assert harness.loop.decision is None
    assert (harness.loop.published, harness.loop.refused_by_gate) == (0, 0)
    assert len(harness.held_out.untried) == 12
    assert harness.held_out.evidence.value == 1.0
    assert harness.learner.draft is draft, "and not the average"
    steps = harness.learner.steps
    assert harness.learner.resume(), "it has saved its state"
    assert harness.learner.steps == steps >= 2


def test_rounds_of_drafts_that_are_too_old_are_told_to_the_batches(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path, max_staleness=2)
    oldest: list[int] = []
    harness.loop.batcher.next_batch = lambda *, oldest_fresh: oldest.append(oldest_fresh)  # type: ignore[method-assign, assignment, return-value]
    for number in (0, 1, 7):
        harness.loop._current_version = f"draft-{number:06d}" if number else None
        harness.loop._step()
    assert oldest == [-2, -1, 5]


def test_the_status_page_says_how_far_the_learner_is_behind(
    target: Target, traffic: list[Trace], tmp_path: Path
) -> None:
    harness = LearnerHarness(target, tmp_path)
    harness.ring.records.extend(asked_again(traffic, 4))
    harness.loop.tick()
    page = harness.page.read()
    assert (page.lag_records, page.lag_bytes) == (len(harness.ring.records), 1000 * len(harness.ring.records))
    assert page.lag_records > 0
