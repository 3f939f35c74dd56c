"""A learner publishes what the gate passes, follows the versions that are served, and begins again where it must."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.learner_harness import LearnerHarness, MakeHarness
from support.live_traces import asked_again, serve, some_requests

from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import AuroraError, CheckpointError
from aurora_lit.learn.online import loop
from aurora_lit.learn.online.learner import PATIENCE_TRIALS, STARTING_VERSION
from aurora_lit.learn.online.trial import Trial
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace


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
    held_out = {request.request_id for request in harness.loop.trial}
    assert len(remembered) > 20
    assert not remembered & held_out


@pytest.mark.slow
def test_the_gate_holds_back_a_draft_that_got_worse(
    make: MakeHarness, learned: tuple[LearnerHarness, Eagle3Draft]
) -> None:
    harness = make(draft=learned[1])
    harness.ask(8)
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


def test_a_version_rolled_back_before_the_loop_has_looked_is_not_learned_on_from(make: MakeHarness) -> None:
    harness = make()
    harness.ask(2)
    harness.tick_until(lambda: harness.learner.steps >= 3)
    harness.learner.version = harness.store.publish(harness.learner.draft, record={})
    harness.trial.evidence.add([0.3] * 12)
    assert harness.trial.evidence.value > 1
    harness.store.roll_back(bad=harness.learner.version, reason="test")
    harness.loop._follow_versions()
    assert harness.learner.version == STARTING_VERSION
    assert torch.equal(harness.learner.draft.lm_head.weight, harness.starting.lm_head.weight)
    assert harness.trial.evidence.value == 1
    weights = harness.learner.num_weight_changes
    harness.loop._follow_versions()
    assert harness.learner.num_weight_changes == weights, "once"


@pytest.mark.slow
def test_the_gate_is_told_how_hot_traffic_is(
    make: MakeHarness, traffic: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    def compare(*args: Any, heat: float, **options: Any) -> None:
        told.append(heat)

    monkeypatch.setattr(Trial, "hold", compare)
    harness = make(publish_every_steps=2)
    waiting = iter(asked_again(traffic, 12))
    hot: list[float] = []
    for _ in range(30):
        harness.ring.records.extend(itertools.islice(waiting, 5))
        harness.loop.tick()
        hot += [harness.learner.controller.heat] * (len(told) - len(hot))
    assert told == hot
    assert told[-1] < told[0], "it cools as it is learned"


@pytest.mark.slow
def test_after_repeated_refusals_the_learner_restarts_from_the_served_draft_at_half_the_rate(make: MakeHarness) -> None:
    harness = make(publish_every_steps=2)
    harness.trial.champion_score = 100.0
    start = copy.deepcopy(harness.learner.draft.state_dict())
    harness.ask(8)

    def is_unchanged() -> bool:
        return all(torch.equal(tensor, start[name]) for name, tensor in harness.learner.draft.state_dict().items())

    harness.tick_until(lambda: harness.loop.refused_by_gate == PATIENCE_TRIALS - 1)
    assert not is_unchanged()
    assert harness.learner.schedules[0].backoff == 1
    harness.tick_until(lambda: harness.loop.refused_by_gate == PATIENCE_TRIALS)
    assert is_unchanged()
    assert {schedule.backoff for schedule in harness.learner.schedules} == {0.5}
    assert harness.trial.evidence.value == 1.0, "what speaks against the old lineage does not hinder the new one"
    harness.trial.champion_score = 0.0
    harness.tick_until(lambda: harness.loop.published == 1)
    assert {schedule.backoff for schedule in harness.learner.schedules} == {1}
    assert not is_unchanged(), "learning continues from a draft that passed"


def test_evidence_goes_on_after_a_restart_while_the_same_draft_is_served(
    make: MakeHarness, traffic: list[Trace]
) -> None:
    """Or an equal draft would pass sooner or later, a chance for each restart."""
    first = make(publish_every_s=3600.0)
    first.ring.records.extend(traffic[:10])
    first.tick_until(lambda: first.learner.steps >= 1)
    first.trial.evidence.add([-0.2] * 6)
    first.loop.stop()
    first.loop.run()
    again = make(resumes=True)
    assert again.trial.evidence.value == first.trial.evidence.value < 0.2
    first.store.publish(first.starting, record={})
    other = make(resumes=True)
    assert other.trial.evidence.value == 1.0, "it was against another draft"


def test_beside_a_version_that_cannot_be_loaded_learning_goes_on_from_the_one_before(make: MakeHarness) -> None:
    harness = make(publish_every_s=3600.0)
    harness.ask(4)
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
    again = make()
    assert again.loop._current_version == sound, "a learner that is started then takes it too"
    (harness.store.folder / "CURRENT").write_text("nonsense")
    assert make().loop._current_version is None


def test_a_version_of_another_shape_ends_the_learner_with_a_remedy(make: MakeHarness, traffic: list[Trace]) -> None:
    harness = make()
    harness.ring.records.extend(harness.traffic)
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


def test_the_average_is_what_is_tried_and_published(make: MakeHarness) -> None:
    harness = make(publish_every_steps=2, ema_decay=0.9)
    harness.trial.champion_score = 0.0  # the challenger passes
    harness.ask(8)
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


def test_a_trial_ends_when_the_loop_is_stopped_and_decides_nothing(make: MakeHarness) -> None:
    """A server that ends does not wait for long before it kills the learner."""
    harness = make(publish_every_steps=2, ema_decay=0.9)
    harness.trial.champion_score = 0.0  # the challenger would pass
    harness.ask(8)
    draft, looks = harness.learner.draft, list[str]()

    def stop() -> None:
        looks.append(harness.loop._activity)
        harness.loop.stop()

    harness.loop._give_way = stop  # type: ignore[method-assign]
    harness.loop.run()
    assert looks == ["comparing drafts"], "after the first batch of requests"
    assert harness.loop.decision is None
    assert (harness.loop.published, harness.loop.refused_by_gate) == (0, 0)
    assert len(harness.trial.untried) == 12
    assert harness.trial.evidence.value == 1.0
    assert harness.learner.draft is draft, "and not the average"
    steps = harness.learner.steps
    assert harness.learner.resume(), "it has saved its state"
    assert harness.learner.steps == steps >= 2
