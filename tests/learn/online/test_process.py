"""A learner's process: its priority, its heartbeat, being killed and resuming, and exiting with its server.

That it exits on SIGTERM is in test_loop_faults.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.learner_harness import ServerStandIn
from support.live_traces import asked_again
from support.tiny_models import random_draft

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatus, LearnerStatusPage
from aurora_lit.ipc.process_lifetime import raise_exit
from aurora_lit.ipc.run_folder import FOLDER_VARIABLE
from aurora_lit.learn.data.training_state import from_bytes
from aurora_lit.learn.online import process
from aurora_lit.learn.online.build import STATE_NAME
from aurora_lit.learn.online.process import niceness
from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace, to_bytes


def test_the_nice_value_gives_the_share_beside_busy_processors() -> None:
    for share, threads, cpus in ((0.04, 1, 2), (0.04, 1, 8), (0.01, 1, 2), (0.1, 2, 4)):
        weight = 1.25 ** -niceness(share=share, threads=threads, cpus=cpus)
        assert threads / cpus * weight / (1 + weight) == pytest.approx(share, rel=0.12), "steps are 25 %"
    assert niceness(share=0.9, threads=1, cpus=64) == 1, "always a lower priority than serving"
    assert niceness(share=0.001, threads=1, cpus=1) == 19


def test_a_sandbox_that_refuses_a_scheduling_class_does_not_end_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    nices: list[int] = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "nice", nices.append)
    monkeypatch.setattr(os, "getsid", lambda _: -1)
    process._lower_priority(1, 7)
    assert nices == [7]


@pytest.fixture
def server(folder: Path, target: Target, tmp_path: Path) -> ServerStandIn:
    return ServerStandIn(tmp_path, folder, random_draft(target))


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_learner_resumes_and_publishes_and_exits_with_its_server(
    server: ServerStandIn, traffic: list[Trace]
) -> None:
    for trace in traffic:
        assert server.ring.push(to_bytes(trace))
    learner = server.start_learner()
    server.wait(learner, lambda: server.page.read().steps >= 6 and (server.store.folder / STATE_NAME).exists())
    assert server.page.read().state == "running"
    assert os.sched_getscheduler(learner.pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, learner.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 1
    autogroup = Path(f"/proc/{learner.pid}/autogroup")
    assert not autogroup.exists() or autogroup.read_text().endswith("nice 1\n"), "its session too"
    learner.kill()
    learner.communicate()
    killed = server.page.read()
    assert killed.state == "dead"
    saved = from_bytes((server.store.folder / STATE_NAME).read_bytes())["steps"]
    assert 1 <= saved <= killed.steps

    learner = server.start_learner()
    server.wait(learner, lambda: server.page.read().pid == learner.pid and server.page.read().activity != "loading")
    assert server.page.read().steps >= saved, "what was saved is not learned again"
    assert (server.run_folder / "reservoir").is_dir()
    assert server.page.read().records == killed.records, "what was read is not read again"
    later = iter(asked_again(traffic, 100))

    def publishes_beside_traffic() -> bool:
        for trace in itertools.islice(later, 2):
            server.ring.push(to_bytes(trace))
        return server.page.read().published > killed.published

    server.wait(learner, publishes_beside_traffic)
    assert (server.store.current() or "").startswith("draft-")
    assert server.page.read().state == "running"
    assert list((server.folder / "logs").rglob("metrics.csv"))
    for left in server.run_folder.iterdir():
        if left.is_file():
            left.unlink()
    (server.run_folder / "reservoir").rename(server.folder / "gone")
    server.run_folder.rmdir()
    output, _ = learner.communicate(timeout=60)
    assert learner.returncode == 0, output[-3000:]
    assert server.page.read().state == "absent"


def test_a_folder_has_one_learner_and_the_next_one_waits_for_its_end(tmp_path: Path) -> None:
    folder, begun = tmp_path / "checkpoints" / "live", threading.Event()

    def next_learner() -> None:
        with process._only_learner(folder):
            begun.set()

    with process._only_learner(folder):
        with pytest.raises(AuroraError, match="another checkpoint.dir"), process._only_learner(folder, wait_s=0.0):
            pass
        waiting = threading.Thread(target=next_learner)
        waiting.start()
        assert not begun.wait(0.1)
    assert begun.wait(10)
    waiting.join()


def test_a_folder_without_locks_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(AuroraError, match=r"No locks available.; set checkpoint\.dir"), process._only_learner(tmp_path):
        pass


def test_what_a_killed_learner_has_started_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    held = process._only_learner(tmp_path)
    held.__enter__()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    held.__exit__(None, None, None)
    # A process that is just being forked may hold it for a moment.
    with process._only_learner(tmp_path, wait_s=5.0):
        pass
    child.communicate(b"\n")


@pytest.mark.parametrize("state", ["running", "stalled"])
def test_a_learner_keeps_its_page_from_a_second_one(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled one may go on, and writes its process id only once. One that was killed a moment ago keeps nothing."""
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(pid=os.getppid())  # of a killed one, that another process has now
    page.beat()
    begun, may_end = threading.Event(), threading.Event()

    def learn(*_: object) -> None:
        begun.set()
        assert may_end.wait(10)

    monkeypatch.setattr(process, "_lower_priority", lambda *_: None)
    monkeypatch.setattr(process, "_learn", learn)
    first = threading.Thread(target=process.run_learner, args=(AuroraConfig(), tmp_path))
    first.start()
    assert begun.wait(10)
    if state == "stalled":
        page.write(heartbeat_ns=1)
    before = page.read()
    assert before.state == state
    with pytest.raises(AuroraError, match=f"attached to this server already .pid {os.getpid()}."):
        process.run_learner(AuroraConfig(), tmp_path)
    assert page.read() == before
    may_end.set()
    first.join()
    assert page.read().state == "absent"


def test_a_learner_that_loads_does_not_tell_share_and_loss_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(pid=1 << 30, steps=7, compute_share=0.04, loss=1.5, error="killed by signal 9")
    monkeypatch.setattr(process, "_lower_priority", lambda *_: None)
    monkeypatch.setattr(process, "_learn", lambda *_: told.append(page.read()))
    told: list[LearnerStatus] = []
    process.run_learner(AuroraConfig(), tmp_path)
    (now,) = told
    assert (now.state, now.activity, now.steps) == ("running", "loading", 7)
    assert (now.compute_share, now.loss, now.error) == (0.0, 0.0, "")


def test_a_signal_raises_nothing_in_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There numpy has answered SystemExit with a RecursionError."""

    class Imported:
        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"{name}: SIGTERM is handled by {signal.getsignal(signal.SIGTERM)}")

    monkeypatch.setitem(sys.modules, "aurora_lit.learn.online.build", Imported())
    before = signal.signal(signal.SIGTERM, raise_exit)
    try:
        with pytest.raises(ImportError, match="SIGTERM is handled") as caught:
            process._learn(load_config(None, []), tmp_path, None, None)  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGTERM) is raise_exit, "again"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "raise_exit" not in str(caught.value)


def test_followers_inherit_the_run_folder_of_their_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    inherited: list[str] = []
    monkeypatch.setattr(process, "_lower_priority", lambda *_: None)
    monkeypatch.setattr(process, "_learn", lambda *_: inherited.append(os.environ[FOLDER_VARIABLE]))
    process.run_learner(load_config(None, ["learn.devices=2"]), tmp_path)
    assert inherited == [str(tmp_path)]


class StoppableLoop:
    is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@pytest.mark.parametrize("why", ["has ended", "is gone"])
def test_learning_goes_on_without_a_run_folder_while_the_engine_worker_lives(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """systemd may delete it when the server's user logs out. Why learning ends is told."""
    monkeypatch.setattr(process, "_WATCH_EVERY_S", 0.01)
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(worker_pid=os.getpid())
    page.beat()
    ended = subprocess.Popen(["true"])
    ended.wait()
    loop: Any = StoppableLoop()
    with process._stop_with_server(loop, tmp_path / "deleted", page):
        time.sleep(0.1)
        assert not loop.is_stopped
        # A worker without a heartbeat may be another process by now.
        page.write(**({"worker_pid": ended.pid} if why == "has ended" else {"heartbeat_ns": 0}))
        until = time.monotonic() + 10
        while not loop.is_stopped and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)
    (told,) = caplog.messages
    assert told.startswith("learning ends: the ")
    assert told.endswith(why)


def test_a_loop_that_is_stuck_gives_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_BEAT_EVERY_S", 0.01)
    page = LearnerStatusPage.create(tmp_path / "page")
    stuck: Any = SimpleNamespace(last_turn_s=time.monotonic())

    def beats(within_s: float = 10.0) -> bool:
        """Whether there is another heartbeat."""
        before, until = page.read().heartbeat_ns, time.monotonic() + within_s
        while page.read().heartbeat_ns == before and time.monotonic() < until:
            time.sleep(0.005)
        return page.read().heartbeat_ns != before

    with process._heartbeat(page, [stuck]):
        assert beats()
        stuck.last_turn_s -= process._MAX_TURN_S
        time.sleep(0.05)
        assert not beats(0.25)
        stuck.last_turn_s = time.monotonic()
        assert beats(), "it has gone on"
