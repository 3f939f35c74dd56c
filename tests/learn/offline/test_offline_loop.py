"""Replay: scores equal what a live engine gets, learning shows in them, and processes together learn as one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.live_traces import online_module, serve
from support.replay_harness import asked, make_replay, scored_rounds
from support.tiny_models import random_draft

from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.errors import AuroraError
from aurora_lit.kernels import native
from aurora_lit.learn.data.collate import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import crop
from aurora_lit.learn.offline.loop import blocks, read_traces
from aurora_lit.learn.offline.scoring import RoundTotals
from aurora_lit.learn.online.trial import Trial
from aurora_lit.models.interface import Target
from aurora_lit.modules.losses.objective import OnlineWeights
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace


def test_each_trace_is_scored_before_it_is_learned_from_and_scores_rise(
    target: Target, stream: list[Trace], tmp_path: Path
) -> None:
    replay = make_replay(target, random_draft(target), tmp_path)
    *earlier, last = blocks(iter(stream), 24)
    for block in earlier:
        replay.process_block(block)
    version = replay.version
    assert version != "start", replay.trials
    replay.process_block(last)
    assert len(stream) / 2 < replay.learner.steps <= len(stream)
    scored = replay.scored
    assert [s.domain for s in scored] == [t.domain for t in stream]
    before = [s for s in scored if s.version == "start"]
    assert len(before) >= 24
    assert all(s.static == s.learning for s in before), "the starting draft is served at first"
    tail = scored[-24:]
    assert {s.version for s in tail} == {version}
    static = sum((s.static for s in tail), RoundTotals()).accepted_length
    assert sum((s.learning for s in tail), RoundTotals()).accepted_length > static + 0.3
    # A live engine with the published draft, whose answers are the same, has the accepted length that was scored.
    published = load_draft(tmp_path / "versions" / version, TargetHead(target))
    live = {trace.request_id: scored_rounds(trace) for trace in serve(target, published, asked())}
    served = [live[trace.request_id] for trace in last]
    # Traces keep states in bf16, so that a near tie between two tokens may fall the other way.
    assert sum(s.learning != rounds for s, rounds in zip(tail, served, strict=True)) <= 2
    scored_length = sum((s.learning for s in tail), RoundTotals()).accepted_length
    assert scored_length == pytest.approx(sum(served, RoundTotals()).accepted_length, rel=0.01)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_without_gate_or_store_every_draft_is_served_and_none_is_written(
    target: Target, stream: list[Trace], tmp_path: Path, ema_decay: float
) -> None:
    how: dict[str, Any] = {"gated": False, "keep_versions": False, "publish_every_steps": 1, "ema_decay": ema_decay}
    replay = make_replay(target, random_draft(target), tmp_path, steps_per_trace=0.25, **how)
    for block in blocks(iter(stream[:48]), 12):
        replay.process_block(block)
    assert (replay.version, replay.published, replay.trials) == ("draft-000004", 4, [])
    assert not (tmp_path / "versions").exists()
    served = replay.served.state_dict()
    learned = replay.learner.draft.fc.weight
    with replay.learner.averaged() as module:
        averaged = module.draft.state_dict()
    assert torch.equal(averaged["fc.weight"], learned) is (ema_decay == 0.0)
    for name, learned in averaged.items():
        stored = learned.bfloat16() if learned.is_floating_point() else learned
        assert torch.equal(served[name], stored.to(learned.dtype)), name


def test_steps_that_nothing_is_left_for_are_owed_until_the_next_trial_at_most(
    target: Target, stream: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions are learned from a few times at most. Later traces would pay for earlier ones.

    What waits for a trial only is made up for, so that all arms of an ablation take as many steps.
    """
    replay = make_replay(target, random_draft(target), tmp_path, steps_per_trace=50.0, publish_every_steps=7)
    replay.process_block(stream[:16])
    steps = replay.learner.steps
    assert 0 < steps < 16 * 50
    replay._steps_per_trace = 0.0
    monkeypatch.setattr(replay._batcher, "next_batch", lambda **_: pytest.fail("a step was owed"))
    replay._steps_due -= 7
    replay.process_block(stream[16:20])


@pytest.mark.slow
def test_the_gate_is_told_how_hot_the_stream_is(
    target: Target, stream: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(Trial, "hold", lambda *args, heat, **options: told.append(heat))
    replay = make_replay(target, random_draft(target), tmp_path, steps_per_trace=0.5)
    hot: list[float] = []
    for block in blocks(iter(stream[:60]), 12):
        replay.process_block(block)
        hot += [replay.learner.controller.heat] * (len(told) - len(hot))
    assert told == hot
    assert told[-1] < told[0], "it cools as it is learned"


def test_other_targets_and_damaged_traces_are_skipped(
    target: Target, stream: list[Trace], tmp_path: Path, of_another_target: Callable[[Trace], Trace]
) -> None:
    replay = make_replay(target, random_draft(target), tmp_path)
    trace = stream[0]
    foreign = of_another_target(trace)
    broken = replace(trace, last_TH=torch.full_like(trace.last_TH, float("nan")))
    replay.process_block([foreign, broken, *stream[:3]])
    assert (replay.skipped, len(replay.scored)) == (2, 3)


@pytest.mark.parametrize(("of", "fewest_live"), [(2, 1), (3, 1), (7, 1), (3, 10_000)])
def test_the_shards_of_a_batch_sum_to_its_gradient(
    target: Target, stream: list[Trace], of: int, fewest_live: int
) -> None:
    within_its_answer = crop(stream[0], len(stream[0].token_ids_T) - stream[0].answer_start - 1)
    batch = collate_online([within_its_answer, *stream[1:4]], stream[4:6])
    draft = random_draft(target)
    weights = OnlineWeights(replay_weight=0.5, fewest_live=fewest_live)
    module = online_module(target, draft, online=weights)

    def gradient(batches: Sequence[Any]) -> torch.Tensor:
        module.zero_grad()
        for each in batches:
            module.training_step(each).loss.backward()
        return torch.cat([p.grad.to_dense().flatten() for p in draft.parameters() if p.grad is not None])

    parts = [batch.shard(number, world_size=of) for number in range(of)]
    torch.testing.assert_close(gradient(parts), gradient([batch]), rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(native.library() is None, reason="nothing is copied without kernels")
def test_copies_are_scored_beside_both_drafts_and_only_from_earlier_answers(
    target: Target, stream: list[Trace], tmp_path: Path
) -> None:
    settings = ("memory.capacity_mb=1",)
    replay = make_replay(target, random_draft(target), tmp_path / "memory", *settings, steps_per_trace=0.0)
    for block in blocks(iter(stream[:36]), 30):  # a block holds repeated prompts too
        replay.process_block(block)
    first, later = replay.scored[:12], replay.scored[12:]
    assert [s.both for s in replay.scored] == [s.memory for s in replay.scored], "the starting draft is served"
    for scored in (first, later):
        static = sum((s.static for s in scored), RoundTotals()).accepted_length
        memory = sum((s.memory for s in scored), RoundTotals()).accepted_length
        assert memory - static < 0.3 if scored is first else memory > static + 1
    without = make_replay(target, random_draft(target), tmp_path / "none", steps_per_trace=0.0)
    assert without.ngrams is None
    without.process_block(stream[:12])
    assert all(s.memory == s.static and s.both == s.learning for s in without.scored)
    singly = make_replay(target, random_draft(target), tmp_path / "singly", *settings, steps_per_trace=0.0)
    for trace in stream[:36]:
        singly.process_block([trace])
    assert [s.memory for s in singly.scored] == [s.memory for s in replay.scored]


def test_a_file_that_is_deleted_while_the_log_is_read_is_an_error(stream: list[Trace], tmp_path: Path) -> None:
    """Of several processes each reads the log, and they must read the same."""
    log = TraceLogWriter(tmp_path, kind="live", shard_positions=80)
    for trace in stream[:12]:
        log.append(trace)
    log.flush()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    traces = read_traces(tmp_path)
    assert next(traces).request_id == stream[0].request_id
    shards[1].unlink()
    with pytest.raises(AuroraError, match="was deleted by the server that records there; replay a copy"):
        list(traces)
