"""Replay: scores equal what a live engine gets, learning shows in them, and processes together learn as one does."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support import ROOT
from support.live_traces import online_module, serve, some_requests
from support.replay_harness import make_replay, replay_config, scored_rounds
from support.replay_ranks import replay_with
from support.tiny_models import random_draft

from aurora_lit.cli import replay as replay_command
from aurora_lit.cli.main import main
from aurora_lit.cli.replay import report
from aurora_lit.config import load_config, to_yaml
from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import AuroraError
from aurora_lit.kernels import native
from aurora_lit.learn import training_precision as training_precision_module
from aurora_lit.learn.data.labelled_trace import crop, label_traces
from aurora_lit.learn.data.online_batch import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline import replay as replay_module
from aurora_lit.learn.offline.replay import ARMS, Replay, blocks, read_traces
from aurora_lit.learn.offline.scoring import RoundTotals
from aurora_lit.learn.online import learner as learner_module
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.objective import OnlineWeights
from aurora_lit.request import Request
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace

TIMES = 8
"""The stream's prompts are asked so often."""


@pytest.fixture(scope="module")
def stream(target: Target) -> list[Trace]:
    """A few prompts asked again and again, of two domains, answered by way of a draft that knows nothing."""
    return serve(
        target, random_draft(target), _asked(TIMES), explore_share=0.3, explore_temperature=1.0, explore_seed=1
    )


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
    live = {trace.request_id: scored_rounds(trace) for trace in serve(target, published, _asked(TIMES))}
    served = [live[trace.request_id] for trace in last]
    # Traces keep states in bf16, so that a near tie between two tokens may fall the other way.
    assert sum(s.learning != rounds for s, rounds in zip(tail, served, strict=True)) <= 2
    scored_length = sum((s.learning for s in tail), RoundTotals()).accepted_length
    assert scored_length == pytest.approx(sum(served, RoundTotals()).accepted_length, rel=0.01)


def test_the_policy_learns_from_the_replays_own_rounds(target: Target, tmp_path: Path) -> None:
    """These answers were recorded without a draft; the rounds are those of a server with this one, exploring."""
    plain = serve(target, None, _asked(2))
    assert not any(trace.num_proposed_R.any() for trace in plain)
    config = replay_config()
    config = replace(config, engine=replace(config.engine, explore_share=0.5, explore_temperature=1.5))
    replay = Replay(
        config,
        target_head=TargetHead(target),
        starting=random_draft(target),
        folder=tmp_path / "versions",
        scratch=tmp_path,
        steps_per_trace=0.5,
    )
    short = serve(target, None, some_requests(2, seed=3, max_tokens=3))  # no round of theirs is known wholly
    replay.process_block([*short, *plain])
    assert replay.learner.steps >= 10
    assert replay.learner.mean("policy_weight") > 0
    assert replay.learner.mean("mean_ratio") == pytest.approx(1, abs=0.3), "the rounds are on-policy but for the steps"
    traces = replay.simulate_rounds(plain)
    assert set(torch.cat([trace.draft_temperature_R[trace.explored_R] for trace in traces]).tolist()) == {1.5}


def test_only_the_replays_own_rounds_are_fresh_whatever_version_was_served_when_they_were_recorded(
    target: Target, stream: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = make_replay(target, random_draft(target), tmp_path, steps_per_trace=0.5)
    sampled = serve(target, random_draft(target), some_requests(12, seed=2, domain="code", temperature=0.7))
    recorded = [
        replace(trace, round_version_R=torch.full_like(trace.round_version_R, 40 * (number % 2)))
        for number, traces in enumerate(zip(stream, sampled, strict=False))
        for trace in traces
    ]
    batches: list[OnlineBatch] = []
    monkeypatch.setattr(replay.learner, "update", batches.append)
    replay.process_block(recorded)
    fresh_Q = torch.cat([batch.rounds.fresh_Q for batch in batches])
    is_greedy_Q = torch.cat([batch.rounds.temperature_Q for batch in batches]) == 0
    assert 0 < int(is_greedy_Q.sum()) < len(is_greedy_Q)
    assert torch.equal(fresh_Q, is_greedy_Q)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_without_gate_or_store_every_draft_is_served_and_none_is_written(
    target: Target, stream: list[Trace], tmp_path: Path, ema_decay: float
) -> None:
    replay = Replay(
        replay_config(publish_every_steps=1, ema_decay=ema_decay),
        target_head=TargetHead(target),
        starting=random_draft(target),
        folder=tmp_path / "versions",
        scratch=tmp_path,
        steps_per_trace=0.25,
        gated=False,
        keep_versions=False,
    )
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
    replay.process_block(stream[:24])
    steps = replay.learner.steps
    assert 0 < steps < 24 * 50
    replay._steps_per_trace = 0.0
    monkeypatch.setattr(replay._batcher, "next_batch", lambda **_: pytest.fail("a step was owed"))
    replay._steps_due -= 7
    replay.process_block(stream[24:28])


def test_the_gate_is_told_how_hot_the_stream_is(
    target: Target, stream: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(replay_module, "compare_drafts", lambda *args, heat, **options: told.append(heat))
    replay = make_replay(target, random_draft(target), tmp_path, steps_per_trace=0.3)
    hot: list[float] = []
    for block in blocks(iter(stream), 12):
        replay.process_block(block)
        hot += [replay.learner.controller.heat] * (len(told) - len(hot))
    assert told == hot
    assert told[-1] < told[0], "it cools as it is learned"


def of_another_target(trace: Trace) -> Trace:
    """The trace with states that are twice as wide."""
    return replace(
        trace,
        aux_T3H=torch.cat([trace.aux_T3H] * 2, -1),
        last_TH=torch.cat([trace.last_TH] * 2, -1),
        rejected_last_NH=torch.cat([trace.rejected_last_NH] * 2, -1),
    )


def test_other_targets_and_damaged_traces_are_skipped(target: Target, stream: list[Trace], tmp_path: Path) -> None:
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
    target_head = TargetHead(target)
    within_its_answer = crop(stream[0], len(stream[0].token_ids_T) - stream[0].answer_start - 1)
    labelled_traces = label_traces([within_its_answer, *stream[1:6]], target_head)
    batch = collate_online(labelled_traces[:4], [labelled.trace for labelled in labelled_traces[4:]], oldest_fresh=0)
    assert batch.rounds.behaviour_logprob_QK.isfinite().any()
    draft = random_draft(target)
    weights = OnlineWeights(ppo_weight=0.0, replay_weight=0.5, fewest_live=fewest_live)
    module = online_module(target, draft, online=weights)

    def gradient(batches: Sequence[Any]) -> torch.Tensor:
        module.zero_grad()
        for each in batches:
            module.training_step(each).loss.backward()
        return torch.cat([p.grad.to_dense().flatten() for p in draft.parameters() if p.grad is not None])

    parts = [batch.shard(number, world_size=of) for number in range(of)]
    assert sum(len(part.rounds.row_Q) for part in parts) == len(batch.rounds.row_Q)
    torch.testing.assert_close(gradient(parts), gradient([batch]), rtol=1e-3, atol=1e-6)
    module.online = replace(weights, ppo_weight=1.0)
    whole, summed = gradient([batch]), gradient(parts)
    # The policy's weight is each part's own, and so is what its averages are over.
    assert torch.cosine_similarity(whole, summed, dim=0) > 0.95


@pytest.fixture
def recorded(target: Target, folder: Path, stream: list[Trace], tmp_path: Path) -> list[str]:
    """Arguments for the command line: a log, a target, a draft, settings."""
    log = TraceLogWriter(tmp_path / "traces", kind="live", shard_positions=600)
    for trace in stream:
        log.append(trace)
    log.flush()
    save_draft(random_draft(target), tmp_path / "start", dtype=torch.float32)
    config = replay_config()
    config = replace(
        config,
        target=replace(config.target, source=str(folder), sha256=None, precision="fp32"),
        draft=replace(config.draft, checkpoint=str(tmp_path / "start")),
        trace=replace(config.trace, record=str(tmp_path / "traces")),
    )
    (tmp_path / "replay.yaml").write_text(to_yaml(config))
    return ["--config", str(tmp_path / "replay.yaml"), "--steps-per-trace", "0.5", "--trial-every", "20"]


def test_the_command_writes_a_draft_and_a_report(
    target: Target, stream: list[Trace], recorded: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(out), "--window", "50"])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "replay.json").read_text())
    assert (report["traces"], report["skipped"]) == (len(stream), 0)
    # What two reports on the same traces differ by.
    assert report["options"] == {"traces": str(tmp_path / "traces"), "steps_per_trace": 0.5, "trial_every": 20}
    settings = report["settings"]
    assert (settings["learn"]["learning_rate"], settings["draft"]["checkpoint"]) == (4e-3, str(tmp_path / "start"))
    assert "server" not in settings, "it holds the key of the API"
    assert len(stream) / 3 < report["steps"] <= len(stream) / 2
    assert [row["domain"] for row in report["domains"]] == ["chat", "code"]
    assert [row["first"] for row in report["windows"]] == list(range(0, len(stream), 50))
    for part in ("domains", "windows"):
        assert sum(row["traces"] for row in report[part]) == len(stream)
        assert sum(row["static"]["rounds"] for row in report[part]) == report["all"]["static"]["rounds"]
    static = sum(map(scored_rounds, serve(target, random_draft(target), _asked(TIMES))), RoundTotals())
    assert report["all"]["static"]["accepted_length"] == pytest.approx(static.accepted_length, abs=1e-4)
    assert report["copies"] is False, "the settings say so"
    assert (report["all"]["memory"], report["all"]["both"]) == (report["all"]["static"], report["all"]["learning"])
    assert report["published"] >= 1
    assert "no trial was held" not in done.stdout
    assert report["windows"][-1]["learning"]["accepted_length"] > static.accepted_length + 0.2
    draft = load_draft(out / "draft", TargetHead(target))
    live = sum(map(scored_rounds, serve(target, draft, _asked(1))), RoundTotals())
    assert live.accepted_length > static.accepted_length + 0.2
    for word in ("chat", *ARMS):
        assert word in done.output
    assert str(out / "draft") in done.output.replace("\n", "")


def logged(folder: Path, traces: Sequence[Trace]) -> Path:
    """A log with a shard for each trace, so that they may be of different targets."""
    log = TraceLogWriter(folder, kind="live", shard_positions=1)
    for trace in traces:
        log.append(trace)
    return folder


def test_a_replay_from_scratch_says_so_and_how_its_draft_is_served(
    stream: list[Trace], recorded: list[str], tmp_path: Path
) -> None:
    traces, out = logged(tmp_path / "few", stream[:3]), tmp_path / "out"
    words = ["replay", *recorded, "--traces", str(traces), "--out", str(out), "learn.from_scratch=true"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "learning begins untrained" in " ".join(done.stderr.split())
    assert f"draft.checkpoint={out / 'draft'} learn.from_scratch=false checkpoint.run=NEW\n" in done.stdout


def test_where_a_version_is_published_the_draft_is_served_under_another_run(
    target: Target, stream: list[Trace], recorded: list[str], tmp_path: Path
) -> None:
    """A server would begin with the version, and say little of the draft it was given."""
    traces = logged(tmp_path / "few", stream[:3])
    run = ["replay", *recorded, "--traces", str(traces), f"checkpoint.dir={tmp_path}"]
    for out, more in (("unpublished", ""), ("published", " checkpoint.run=NEW")):
        done = CliRunner().invoke(main, [*run, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        assert f"serve it with draft.checkpoint={tmp_path / out / 'draft'}{more}\n" in done.stdout
        DraftStore(tmp_path / "live", keep=2).publish(random_draft(target), record={})


def test_files_where_the_draft_will_be_are_refused_at_once(recorded: list[str], tmp_path: Path) -> None:
    (tmp_path / "out" / "draft").mkdir(parents=True)
    (tmp_path / "out" / "draft" / "mine").touch()
    done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert f"--out: {tmp_path / 'out' / 'draft'} holds files, but no draft" in done.stderr
    assert not (tmp_path / "out" / "versions").exists()


def test_skipped_traces_are_counted_and_it_is_an_error_if_all_are(
    stream: list[Trace], recorded: list[str], tmp_path: Path
) -> None:
    foreign = [of_another_target(trace) for trace in stream[:2]]
    some, others = logged(tmp_path / "some", [*foreign, stream[2]]), logged(tmp_path / "all", foreign)
    done = CliRunner().invoke(main, ["replay", *recorded, "--traces", str(some), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "2 of 3 traces were skipped" in done.stdout
    assert "no trial was held: 0 steps were taken, and one needs learn.publish_every_steps=10 and 6 " in done.stdout
    done = CliRunner().invoke(main, ["replay", *recorded, "--traces", str(others), "--out", str(tmp_path / "none")])
    assert done.exit_code == 2, done.output
    assert "all 2 traces" in done.stderr
    assert "give the server's --config" in done.stderr
    assert not (tmp_path / "none" / "replay.json").exists()


def test_traces_of_damaged_files_are_skipped_and_the_files_named(
    stream: list[Trace], recorded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    traces, out = logged(tmp_path / "some", stream[:4]), tmp_path / "out"
    truncated, empty, foreign, _ = sorted(traces.glob("*.safetensors"))
    truncated.write_bytes(truncated.read_bytes()[:-40])
    empty.write_bytes(b"")
    save_file({"x": torch.zeros(1)}, foreign)
    done = CliRunner().invoke(main, ["replay", *recorded, "--traces", str(traces), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "3 of 4 traces were skipped" in done.stdout
    report = json.loads((out / "replay.json").read_text())
    assert (report["traces"], report["skipped"]) == (1, 3)
    for path in (truncated, empty, foreign):
        assert f"{path} cannot be read, and its traces are skipped: " in caplog.text


def ctrl_c() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("end", "code"),
    [(ctrl_c, 1), (partial(signal.raise_signal, signal.SIGTERM), 143), (fail, 1)],
    ids=["Ctrl-C", "SIGTERM", "a failure"],
)
def test_an_interrupted_replay_writes_its_report(
    end: Callable[[], None],
    code: int,
    stream: list[Trace],
    recorded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traces, out, process_block = logged(tmp_path / "few", stream[:3]), tmp_path / "out", Replay.process_block
    scratch, before = tmp_path / "scratch", signal.getsignal(signal.SIGTERM)
    scratch.mkdir()

    def interrupt(self: Replay, block: Sequence[Trace]) -> None:
        if self.scored:
            assert list(scratch.iterdir()), "where traces are remembered"
            end()
        process_block(self, block)

    monkeypatch.setattr(Replay, "process_block", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    words = ["replay", *recorded, "--traces", str(traces), "--out", str(out), "--trial-every", "2"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code
    assert (end is fail) == isinstance(done.exception, ZeroDivisionError)
    assert f"drafts that have passed the gate are in {out / 'versions'}\n" in done.stdout
    assert json.loads((out / "replay.json").read_text())["traces"] == 2
    assert not (out / "draft").exists()
    assert list(scratch.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_replay_writes_its_report_though_it_is_told_to_end(
    stream: list[Trace], recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one of several processes has failed, `fabric run` ends the others, which fail too."""
    traces, out, process_block = logged(tmp_path / "few", stream[:3]), tmp_path / "out", Replay.process_block
    ended: list[int] = []

    def lose_the_others(self: Replay, block: Sequence[Trace]) -> None:
        if self.scored:
            raise RuntimeError("Connection closed by peer")
        process_block(self, block)

    def told_to_end(replayed: Replay, *, window: int) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return report(replayed, window=window)

    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        monkeypatch.setattr(Replay, "process_block", lose_the_others)
        monkeypatch.setattr(replay_command, "report", told_to_end)
        words = ["replay", *recorded, "--traces", str(traces), "--out", str(out), "--trial-every", "2"]
        done = CliRunner().invoke(main, words)
        assert isinstance(done.exception, RuntimeError), done.output
        assert not ended, "the process would not be there any more"
        assert json.loads((out / "replay.json").read_text())["traces"] == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
    recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(replay_command, "load_head_and_draft")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", Path("/proc/self")):  # cannot be made; holds no file that is made
        done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(out)])
        assert done.exit_code == 2, done.output
        assert str(out) in done.stderr


def test_a_folder_without_locks_is_an_error_before_any_work(
    recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first draft that passes could not be published."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.delattr(replay_command, "load_head_and_draft")
    monkeypatch.setattr(fcntl, "flock", refuse)
    done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    said = f"--out {tmp_path / 'out'}: its file system has no locks; name a folder on a local disk"
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize("left", ["replay.json", "versions/draft-000001/config.json"])
def test_a_folder_of_an_earlier_replay_is_refused_before_any_work(
    left: str, recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drafts could not be told from this one's."""
    monkeypatch.delattr(replay_command, "load_head_and_draft")
    file = tmp_path / "out" / left
    file.parent.mkdir(parents=True)
    file.touch()
    done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    said = f"--out {tmp_path / 'out'}: an earlier replay has written there; name another folder, or delete that one"
    assert said in " ".join(done.stderr.split())
    assert file.exists()


def _asked(times: int) -> list[Request]:
    asked = [*some_requests(8), *some_requests(4, seed=1, domain="code")]
    return [replace(r, request_id=f"{n}-{r.request_id}") for n in range(times) for r in asked]


def test_a_folder_without_traces_is_an_error_before_any_work(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(replay_command, "load_head_and_draft")
    result = CliRunner().invoke(main, ["replay", *recorded, "--traces", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "holds no traces" in result.output
    result = CliRunner().invoke(main, ["replay", *recorded, "trace.record=null"])
    assert result.exit_code == 2
    assert "--traces" in result.output


@pytest.mark.parametrize(
    ("environment", "setting", "said", "or_alone"),
    [
        (
            {"WORLD_SIZE": "2"},
            "learn.devices=1",
            "WORLD_SIZE=2: another launcher's processes would each replay alone",
            "; or, if each is to replay alone into its own --out, unset WORLD_SIZE",
        ),
        (
            {"SLURM_PROCID": "3"},
            "learn.devices=1",
            "SLURM_PROCID=3: another launcher's processes",
            "; or, if each is to replay alone into its own --out, unset SLURM_PROCID",
        ),
        ({}, "learn.devices=4", "learn.devices=4: this is one process; use learn.devices=1, or start several", ""),
    ],
    ids=["torchrun", "srun", "a setting"],
)
def test_processes_that_would_each_replay_alone_are_refused(
    environment: dict[str, str], setting: str, said: str, or_alone: str, recorded: list[str], tmp_path: Path
) -> None:
    words = ["replay", *recorded, setting, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words, env=environment)
    assert done.exit_code == 2, done.output
    spoken = " ".join(done.stderr.split())
    assert said in spoken
    assert "with `fabric run --devices N" in spoken
    assert spoken.endswith(f"aurora_lit/replay.py -- ...`{or_alone}")
    assert not (tmp_path / "out").exists()


def test_processes_of_fabric_run_do_not_each_time_a_product(
    recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They must compute in the same precision, and times may differ."""
    fabric_run = {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": "1", "WORLD_SIZE": "2"}
    monkeypatch.setenv("LT_PRECISION", "set anew")
    monkeypatch.delenv("LT_PRECISION")
    monkeypatch.delattr(training_precision_module, "_product_s")
    training_precision_module.training_precision.cache_clear()
    words = ["replay", *recorded, "--traces", str(tmp_path / "none")]
    done = CliRunner().invoke(main, words, env=fabric_run)
    assert "holds no traces" in " ".join(done.stderr.split()), done.exception
    assert os.environ["LT_PRECISION"] == "bf16-mixed"
    training_precision_module.training_precision.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LT_PRECISION", "16-mixed", "--precision 16-mixed: a replay learns in bf16-mixed or 32-true; use one of them"),
        ("LT_PRECISION", "bf16-true", "--precision bf16-true: a replay learns in bf16-mixed or 32-true"),
        ("LT_STRATEGY", "fsdp", "--strategy fsdp: a replay needs the whole draft in each process; use ddp"),
    ],
    ids=["scaled", "rounded", "sharded"],
)
def test_what_fabric_run_cannot_learn_with_is_refused(
    variable: str, value: str, said: str, recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    fabric_run = {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": "1", variable: value}
    done = CliRunner().invoke(main, ["replay", *recorded, "--out", str(tmp_path / "out")], env=fabric_run)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_dropped_batches_are_counted(
    stream: list[Trace], recorded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 16-mixed would drop them all."""
    monkeypatch.setattr(learner_module, "clip_gradients", lambda parameters: torch.tensor(math.inf))
    traces, out = logged(tmp_path / "few", stream[:4]), tmp_path / "out"
    done = CliRunner().invoke(main, ["replay", *recorded, "--traces", str(traces), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "2 of 2 batches were dropped: their loss or gradient was not finite\n" in done.stdout


def test_one_process_in_a_job_of_several_tasks_is_not_refused(recorded: list[str], tmp_path: Path) -> None:
    """As in a batch script, which SLURM starts once."""
    environment = {"SLURM_JOB_NAME": "replay", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    words = ["replay", *recorded, "--traces", str(tmp_path / "none")]
    done = CliRunner().invoke(main, words, env=environment)
    assert "holds no traces" in " ".join(done.stderr.split()), done.output


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_learn_what_one_learns(recorded: list[str], tmp_path: Path) -> None:
    """As they would on two machines, which here are one."""
    script = ROOT / "aurora_lit" / "replay.py"
    fabric = Path(sys.executable).with_name("fabric")

    def replayed(processes: int, machines: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        out = tmp_path / f"by-{processes}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = []
        for machine in range(machines):
            command = [
                str(fabric),
                "run",
                "--devices",
                str(processes // machines),
                "--accelerator",
                "cpu",
                "--strategy",
                "ddp",
                "--precision",
                "32-true",
                "--num-nodes",
                str(machines),
                "--node-rank",
                str(machine),
                "--main-address",
                "127.0.0.1",
                "--main-port",
                str(29500 + os.getpid() % 1000 + processes),
                str(script),
                "--",
                *recorded,
                "--out",
                str(out),
                "learn.ppo_weight=0",
            ]
            started.append(subprocess.Popen(command, env=env, **pipes))
        spoken = ""
        for process in started:
            stdout, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr[-3000:]
            spoken += stdout
        assert spoken.count("drafts passed the gate") == 1, "one process speaks"
        draft = load_draft(out / "draft", TargetHead(load_target(_source(tmp_path), precision="fp32")))
        return json.loads((out / "replay.json").read_text()), draft.state_dict()

    (one, alone), (two, together) = replayed(1, 1), replayed(2, 2)
    assert one["published"] >= 1
    assert (one["traces"], one["steps"], one["positions"]) == (two["traces"], two["steps"], two["positions"])
    for arm in ("static", "learning"):
        assert two["all"][arm]["accepted_length"] == pytest.approx(one["all"][arm]["accepted_length"], abs=0.02)
    moved = torch.cat([t.flatten().float() for t in alone.values()])
    other = torch.cat([t.flatten().float() for t in together.values()])
    start = load_draft(tmp_path / "start", TargetHead(load_target(_source(tmp_path), precision="fp32"))).state_dict()
    began = torch.cat([t.flatten().float() for t in start.values()])
    # Muon orthogonalises in bf16, which makes more of rounding; halves that are not joined are ten times as far off.
    assert (moved - other).norm() < 0.05 * (moved - began).norm()


@pytest.mark.process
@pytest.mark.slow
def test_a_process_that_is_disturbed_learns_as_the_others_and_other_traces_are_an_error(
    folder: Path, recorded: list[str], tmp_path: Path
) -> None:
    (alone,), (first, second) = (replay_with(tmp_path, folder, tmp_path / "traces", processes=n) for n in (1, 2))
    assert first["trials"] > 2
    for name in ("steps", "trials", "version", "scored"):
        assert first[name] == second[name], name
    for part in ("learned", "served"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{part}: {name}"
    assert first["steps"] == alone["steps"]
    began = random_draft(load_target(folder, precision="fp32")).state_dict()
    moved, apart = (
        torch.cat([(t.float() - other[name].float()).flatten() for name, t in alone["learned"].items()]).norm()
        for other in (began, first["learned"])
    )
    assert apart < 0.05 * moved
    assert [len(each["errors"]) for each in (alone, first, second)] == [0, 3, 3]
    assert all("the processes read different traces" in error for error in first["errors"] + second["errors"])


def _source(tmp_path: Path) -> Path:
    return Path(load_config(tmp_path / "replay.yaml", []).target.source)


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
    assert without.copies is None
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
