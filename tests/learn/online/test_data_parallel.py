"""Several processes learn together: as one would, with equal weights, and none keeps running alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from support.fake_device import fake_device
from support.learner_harness import ServerStandIn
from support.learning_ranks import STEPS, learn_with
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft

from aurora_lit import distributed
from aurora_lit.config import load_config, to_yaml
from aurora_lit.ipc.run_folder import CONFIG_NAME
from aurora_lit.learn.online import data_parallel
from aurora_lit.learn.online.data_parallel import launch_fabric
from aurora_lit.learn.training_precision import training_precision
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.settings import LearnSettings
from aurora_lit.traces.record import to_bytes


@pytest.fixture
def server(folder: Path, target: Target, tmp_path: Path) -> ServerStandIn:
    return ServerStandIn(tmp_path, folder, random_draft(target))


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_learn_what_one_learns_through_restarts_and_new_vocabularies(
    folder: Path, tmp_path: Path
) -> None:
    (alone,), (first, second) = (learn_with(tmp_path, folder, processes=n) for n in (1, 2))
    assert alone["steps"] == first["steps"] == second["steps"] == STEPS
    for part in ("draft", "average"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{part}: {name}"
    assert torch.equal(first["draft"]["d2t"], alone["draft"]["d2t"])
    began = random_draft(load_target(folder, precision="fp32"), seed=7, draft_vocab_size=32).state_dict()

    def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([weights[name].flatten() for name in weights if name not in ("d2t", "t2d", "lm_head.weight")])

    # Sums are rounded in another order, and to bf16.
    moved = (flat(alone["draft"]) - flat(began)).norm()
    assert (flat(alone["draft"]) - flat(first["draft"])).norm() < 0.1 * moved
    for name in ("loss", "value_loss"):  # of the whole batch, though each process computes the loss of a part
        assert first[name] == pytest.approx(alone[name], rel=0.1)


def test_followers_are_started_in_a_slurm_job_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has one task, in which the learner starts its own processes."""
    for name, value in {"JOB_NAME": "serve", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    monkeypatch.setattr(Fabric, "launch", lambda fabric: None)
    fabric = launch_fabric(LearnSettings(devices=2), tmp_path)
    assert fabric.world_size == 2
    assert isinstance(fabric.strategy, DDPStrategy)
    assert fabric.strategy.cluster_environment is not None
    assert not fabric.strategy.cluster_environment.creates_processes_externally


def test_followers_compute_in_the_precision_of_the_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They inherit its environment: a product that each of them times might say something else."""
    inherited: list[str | None] = []
    monkeypatch.setattr(Fabric, "launch", lambda fabric: inherited.append(os.environ.get("LT_PRECISION")))
    monkeypatch.setenv("LT_PRECISION", "set anew")
    monkeypatch.delenv("LT_PRECISION")
    launch_fabric(LearnSettings(devices=2), tmp_path)
    assert inherited == [training_precision()]


@pytest.mark.parametrize(("platform", "interface"), [("linux", "lo"), ("darwin", "lo0"), ("another", None)])
def test_on_a_mac_too_processes_talk_over_loopback_only(
    platform: str, interface: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a name gloo takes the address of the machine's own, on which others can connect."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "set anew")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    monkeypatch.setattr(Fabric, "launch", lambda fabric: None)
    monkeypatch.setattr(distributed, "sys", SimpleNamespace(platform=platform))
    launch_fabric(LearnSettings(devices=2), tmp_path)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


@pytest.mark.parametrize("safe", [True, False])
def test_followers_import_from_the_working_directory_if_the_leader_does(
    safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their command, which Fabric makes, is without the leader's -P."""
    inherited: list[str] = []
    monkeypatch.setattr(Fabric, "launch", lambda fabric: inherited.append(os.environ["PYTHONSAFEPATH"]))
    leader = SimpleNamespace(flags=SimpleNamespace(safe_path=safe))
    monkeypatch.setattr(data_parallel, "sys", leader)
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")  # which else would stay set for the tests after this one
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    launch_fabric(LearnSettings(devices=2), tmp_path)
    assert inherited == ["1" if safe else ""]


def test_a_message_of_many_pieces_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner's state is not on a GPU as a whole."""
    monkeypatch.setattr(data_parallel, "_PIECE_BYTES", 8)
    with fake_device() as device:
        for message in (bytes(range(21)), bytes(range(16)), b""):
            sent: list[torch.Tensor] = []
            monkeypatch.setattr(data_parallel.dist, "broadcast", lambda x, sent=sent, **_: sent.append(x.clone()))
            assert data_parallel._broadcast(message, None, device) == message
            assert {piece.device for piece in sent} == {device}
            length, *pieces = (piece.numel() for piece in sent)
            assert (length, sum(pieces), max(pieces, default=0) <= 8) == (1, len(message), True)
            arriving = iter(sent)
            monkeypatch.setattr(
                data_parallel.dist, "broadcast", lambda x, arriving=arriving, **_: x.copy_(next(arriving))
            )
            assert data_parallel._broadcast(None, None, device) == message


def start_learner(server: ServerStandIn) -> subprocess.Popen[str]:
    """As a server starts its own."""
    config = load_config(None, [*server.overrides, "learn.devices=2"])
    (server.run_folder / CONFIG_NAME).write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "aurora_lit", "learn", "--run-folder", server.run_folder, "--parent", str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def listens_on(process: psutil.Process) -> set[str]:
    """The addresses at which it takes connections."""
    return {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}


def has_exited(process: psutil.Process) -> bool:
    """True of a zombie too, which init has not reaped yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.process
@pytest.mark.slow
def test_the_command_learns_with_its_follower_and_both_exit_on_sigterm(server: ServerStandIn, target: Target) -> None:
    for trace in serve(target, random_draft(target), some_requests(10, max_tokens=18)) * 4:  # too short to loop
        assert server.ring.push(to_bytes(trace))
    learner = start_learner(server)
    server.wait(learner, lambda: server.page.read().steps >= 6)
    (follower,) = psutil.Process(learner.pid).children()
    assert os.getpriority(os.PRIO_PROCESS, follower.pid) == os.getpriority(os.PRIO_PROCESS, learner.pid)
    assert listens_on(psutil.Process(learner.pid)) | listens_on(follower) <= {"127.0.0.1", "::1"}, "not on the network"
    os.killpg(learner.pid, signal.SIGTERM)  # as a service manager does
    output, _ = learner.communicate(timeout=60)
    assert learner.returncode == 0, output[-3000:]
    assert server.page.read().state == "absent"
    assert has_exited(follower)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["leader", "follower"])
def test_when_one_process_is_killed_the_other_exits(server: ServerStandIn, target: Target, killed: str) -> None:
    learner = start_learner(server)
    server.wait(learner, lambda: server.page.read().activity == "waiting for traces")
    (follower,) = psutil.Process(learner.pid).children()
    (learner if killed == "leader" else follower).kill()
    learner.communicate(timeout=30)
    assert learner.returncode
    deadline = time.monotonic() + 10
    while not has_exited(follower):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.page.read().state == "dead"
