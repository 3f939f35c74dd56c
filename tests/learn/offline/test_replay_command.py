"""`aurora-lit replay`: its report and draft, what it refuses before any work, how it ends, and several processes."""

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from support import ROOT
from support.live_traces import serve
from support.replay_harness import asked, replay_config, scored_rounds
from support.replay_ranks import replay_with
from support.tiny_models import random_draft

from aurora_lit.cli import replay as replay_command
from aurora_lit.cli.main import main
from aurora_lit.config import load_config, to_yaml
from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.learn import training_precision as training_precision_module
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.loop import ARMS, OfflineLoop
from aurora_lit.learn.offline.scoring import RoundTotals
from aurora_lit.learn.online import learner as learner_module
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace


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


class Command:
    """The command on the recorded traces, or on a few others, which writes to `out`."""

    def __init__(self, recorded: list[str], folder: Path) -> None:
        self.recorded, self.folder, self.out = recorded, folder, folder / "out"

    def __call__(
        self,
        *words: str,
        traces: Sequence[Trace] | None = None,
        out: Path | None = None,
        env: Mapping[str, str] | None = None,
        code: int = 0,
    ) -> Result:
        if traces is not None:  # a shard for each, so that they may be of different targets
            with closing(TraceLogWriter(self.folder / "few", kind="live", shard_positions=1)) as log:
                for trace in traces:
                    log.append(trace)
            words = ("--traces", str(self.folder / "few"), *words)
        done = CliRunner().invoke(main, ["replay", *self.recorded, "--out", str(out or self.out), *words], env=env)
        assert done.exit_code == code, done.output
        return done

    def refused(self, *words: str, **options: Any) -> str:
        """What is said of a call that is refused with exit code 2, on one line."""
        return " ".join(self(*words, **options, code=2).stderr.split())

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "replay.json").read_text()))


@pytest.fixture
def replay(recorded: list[str], tmp_path: Path) -> Command:
    return Command(recorded, tmp_path)


@pytest.fixture
def refuses(replay: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the command says that refuses before any work."""
    monkeypatch.delattr(replay_command, "load_head_and_draft")
    return replay.refused


def test_the_command_writes_a_draft_and_a_report(
    target: Target, stream: list[Trace], replay: Command, tmp_path: Path
) -> None:
    done, report = replay("--window", "50"), replay.report
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
    static = sum(map(scored_rounds, serve(target, random_draft(target), asked())), RoundTotals())
    assert report["all"]["static"]["accepted_length"] == pytest.approx(static.accepted_length, abs=1e-4)
    assert report["copies"] is False, "the settings say so"
    assert (report["all"]["memory"], report["all"]["both"]) == (report["all"]["static"], report["all"]["learning"])
    assert report["published"] >= 1
    assert "no trial was held" not in done.stdout
    assert report["windows"][-1]["learning"]["accepted_length"] > static.accepted_length + 0.2
    draft = load_draft(replay.out / "draft", TargetHead(target))
    live = sum(map(scored_rounds, serve(target, draft, asked(1))), RoundTotals())
    assert live.accepted_length > static.accepted_length + 0.2
    for word in ("chat", *ARMS):
        assert word in done.output
    assert str(replay.out / "draft") in done.output.replace("\n", "")


def test_it_is_said_how_the_draft_is_served(
    target: Target, stream: list[Trace], replay: Command, tmp_path: Path
) -> None:
    """Where a version is published, or learning began from scratch, under another run: a server would begin with the
    version, and say little of the draft it was given. Brackets in a path are no markup."""
    done = replay("learn.from_scratch=true", traces=stream[:3])
    assert "learning begins untrained" in " ".join(done.stderr.split())
    assert f"draft.checkpoint={replay.out / 'draft'} learn.from_scratch=false checkpoint.run=NEW\n" in done.stdout
    for out, more in (("[b]unpublished", ""), ("[b]published", " checkpoint.run=NEW")):
        done = replay(f"checkpoint.dir={tmp_path}", "--traces", str(tmp_path / "few"), out=tmp_path / out)
        assert f"serve it with draft.checkpoint={tmp_path / out / 'draft'}{more}\n" in done.stdout
        DraftStore(tmp_path / "live").publish(random_draft(target), record={})


def test_skipped_traces_are_counted_and_it_is_an_error_if_all_are(
    stream: list[Trace], replay: Command, tmp_path: Path, of_another_target: Callable[[Trace], Trace]
) -> None:
    foreign = [of_another_target(trace) for trace in stream[:2]]
    said = replay.refused(traces=foreign)
    assert "all 2 traces" in said
    assert "give the server's --config" in said
    assert not (replay.out / "replay.json").exists()
    done = replay(traces=stream[2:3], out=tmp_path / "some")
    assert "2 of 3 traces were skipped" in done.stdout
    assert "no trial was held: 0 steps were taken, and one needs learn.publish_every_steps=10 and 6 " in done.stdout


def test_traces_of_damaged_files_are_skipped_and_the_files_named(
    stream: list[Trace], replay: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = TraceLogWriter(tmp_path / "few", kind="live", shard_positions=1)
    for trace in stream[:4]:
        log.append(trace)
    truncated, empty, foreign, _ = sorted((tmp_path / "few").glob("*.safetensors"))
    truncated.write_bytes(truncated.read_bytes()[:-40])
    empty.write_bytes(b"")
    save_file({"x": torch.zeros(1)}, foreign)
    assert "3 of 4 traces were skipped" in replay("--traces", str(tmp_path / "few")).stdout
    assert (replay.report["traces"], replay.report["skipped"]) == (1, 3)
    for path in (truncated, empty, foreign):
        assert f"{path} cannot be read, and its traces are skipped: " in caplog.text


def test_dropped_batches_are_counted(stream: list[Trace], replay: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 16-mixed would drop them all."""
    monkeypatch.setattr(learner_module, "clip_gradients", lambda parameters: torch.tensor(math.inf))
    done = replay(traces=stream[:4])
    assert "2 of 2 batches were dropped: their loss or gradient was not finite\n" in done.stdout


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
    replay: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process_block, before = OfflineLoop.process_block, signal.getsignal(signal.SIGTERM)
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def interrupt(self: OfflineLoop, block: Sequence[Trace]) -> None:
        if self.scored:
            assert list(scratch.iterdir()), "where traces are remembered"
            end()
        process_block(self, block)

    monkeypatch.setattr(OfflineLoop, "process_block", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    done = replay("--trial-every", "2", traces=stream[:3], code=code)
    assert (end is fail) == isinstance(done.exception, ZeroDivisionError)
    assert f"drafts that have passed the gate are in {replay.out / 'versions'}\n" in done.stdout
    assert replay.report["traces"] == 2
    assert not (replay.out / "draft").exists()
    assert list(scratch.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_replay_writes_its_report_though_it_is_told_to_end(
    stream: list[Trace], replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one of several processes has failed, `fabric run` ends the others, which fail too."""
    process_block, report, ended = OfflineLoop.process_block, replay_command.report, list[int]()

    def lose_the_others(self: OfflineLoop, block: Sequence[Trace]) -> None:
        if self.scored:
            raise RuntimeError("Connection closed by peer")
        process_block(self, block)

    def told_to_end(replayed: OfflineLoop, *, window: int) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        return report(replayed, window=window)

    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        monkeypatch.setattr(OfflineLoop, "process_block", lose_the_others)
        monkeypatch.setattr(replay_command, "report", told_to_end)
        done = replay("--trial-every", "2", traces=stream[:3], code=1)
        assert isinstance(done.exception, RuntimeError), done.output
        assert not ended, "the process would not be there any more"
        assert replay.report["traces"] == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_folders_that_cannot_be_used_are_an_error_before_any_work(
    refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", Path("/proc/self")):  # cannot be made; holds no file that is made
        assert str(out) in refuses(out=out)
    out = tmp_path / "files"
    (out / "draft").mkdir(parents=True)
    (out / "draft" / "mine").touch()
    assert f"--out: {out / 'draft'} holds files, but no draft" in refuses(out=out)
    assert not (out / "versions").exists()
    # An earlier replay's: its drafts could not be told from this one's.
    for number, left in enumerate(("replay.json", "versions/draft-000001/config.json")):
        out = tmp_path / f"earlier-{number}"
        (out / left).parent.mkdir(parents=True)
        (out / left).touch()
        said = f"--out {out}: an earlier replay has written there; name another folder, or delete that one"
        assert said in refuses(out=out)
        assert (out / left).exists()
    assert "holds no traces" in refuses("--traces", str(tmp_path / "none"))
    assert "--traces" in refuses("trace.record=null")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)  # the first draft that passes could not be published
    said = f"--out {tmp_path / 'out'}: its file system has no locks; name a folder on a local disk"
    assert said in refuses()


@pytest.mark.parametrize(
    ("environment", "setting", "said", "or_alone"),
    [
        ({"WORLD_SIZE": "2"}, "learn.devices=1", "WORLD_SIZE=2: another launcher's processes would each", "WORLD_SIZE"),
        ({"SLURM_PROCID": "3"}, "learn.devices=1", "SLURM_PROCID=3: another launcher's processes", "SLURM_PROCID"),
        ({}, "learn.devices=4", "learn.devices=4: this is one process; use learn.devices=1, or start several", None),
    ],
    ids=["torchrun", "srun", "a setting"],
)
def test_processes_that_would_each_replay_alone_are_refused(
    environment: dict[str, str], setting: str, said: str, or_alone: str | None, replay: Command
) -> None:
    spoken = replay.refused(setting, env=environment)
    assert said in spoken
    assert "with `fabric run --devices N" in spoken
    alone = f"; or, if each is to replay alone into its own --out, unset {or_alone}" if or_alone else ""
    assert spoken.endswith(f"aurora_lit/replay.py -- ...`{alone}")
    assert not replay.out.exists()


def test_one_process_in_a_job_of_several_tasks_is_not_refused(replay: Command, tmp_path: Path) -> None:
    """As in a batch script, which SLURM starts once."""
    environment = {"SLURM_JOB_NAME": "replay", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert "holds no traces" in replay.refused("--traces", str(tmp_path / "none"), env=environment)


FABRIC_RUN = {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": "1"}


def test_processes_of_fabric_run_do_not_each_time_a_product(
    replay: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They must compute in the same precision, and times may differ."""
    monkeypatch.setenv("LT_PRECISION", "set anew")
    monkeypatch.delenv("LT_PRECISION")
    monkeypatch.delattr(training_precision_module, "_product_s")
    training_precision_module.training_precision.cache_clear()
    assert "holds no traces" in replay.refused("--traces", str(tmp_path / "none"), env=FABRIC_RUN | {"WORLD_SIZE": "2"})
    assert os.environ["LT_PRECISION"] == "bf16-mixed"
    training_precision_module.training_precision.cache_clear()


def test_what_fabric_run_cannot_learn_with_is_refused(replay: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    cases = {  # scaled, rounded, sharded
        ("LT_PRECISION", "16-mixed"): "--precision 16-mixed: a replay learns in bf16-mixed or 32-true; use one of them",
        ("LT_PRECISION", "bf16-true"): "--precision bf16-true: a replay learns in bf16-mixed or 32-true",
        ("LT_STRATEGY", "fsdp"): "--strategy fsdp: a replay needs the whole draft in each process; use ddp",
    }
    for (variable, value), said in cases.items():
        assert said in replay.refused(env=FABRIC_RUN | {variable: value})
        assert not replay.out.exists()


def source(tmp_path: Path) -> Path:
    return Path(load_config(tmp_path / "replay.yaml", []).target.source)


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_learn_what_one_learns(recorded: list[str], tmp_path: Path) -> None:
    """As they would on two machines, which here are one."""
    fabric, script = Path(sys.executable).with_name("fabric"), ROOT / "aurora_lit" / "replay.py"

    def replayed(processes: int, machines: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        out = tmp_path / f"by-{processes}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        how = ["--accelerator", "cpu", "--strategy", "ddp", "--precision", "32-true", "--main-address", "127.0.0.1"]
        how += ["--devices", str(processes // machines), "--num-nodes", str(machines)]
        how += ["--main-port", str(29500 + os.getpid() % 1000 + processes)]
        started = []
        for machine in range(machines):
            command = [str(fabric), "run", *how, "--node-rank", str(machine), str(script), "--", *recorded]
            command += ["--out", str(out)]
            started.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes))
        spoken = ""
        for process in started:
            stdout, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr[-3000:]
            spoken += stdout
        assert spoken.count("drafts passed the gate") == 1, "one process speaks"
        draft = load_draft(out / "draft", TargetHead(load_target(source(tmp_path), precision="fp32")))
        return json.loads((out / "replay.json").read_text()), draft.state_dict()

    (one, alone), (two, together) = replayed(1, 1), replayed(2, 2)
    assert one["published"] >= 1
    assert (one["traces"], one["steps"], one["positions"]) == (two["traces"], two["steps"], two["positions"])
    for arm in ("static", "learning"):
        assert two["all"][arm]["accepted_length"] == pytest.approx(one["all"][arm]["accepted_length"], abs=0.02)
    moved = torch.cat([t.flatten().float() for t in alone.values()])
    other = torch.cat([t.flatten().float() for t in together.values()])
    start = load_draft(tmp_path / "start", TargetHead(load_target(source(tmp_path), precision="fp32"))).state_dict()
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
