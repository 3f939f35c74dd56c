"""A learner's process: attach to a running server, build what learning needs, run the loop, leave in order.

torch is imported only after the process has stepped behind all others, since threads inherit their priority from the
one that starts them. What is left out: the loop (learn/online/loop.py).

    run_learner(config, run_folder)         # returns when the server is gone, or after SIGTERM
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, StatusBlock
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerBlock
from aurora_lit.ipc.run_folder import RING_NAME

if TYPE_CHECKING:
    from aurora_lit.learn.online.loop import OnlineLoop

_AUTOGROUP = Path("/proc/self/autogroup")
_BEAT_EVERY_S = 0.5
_LONGEST_TURN_S, _LONGEST_LOADING_S = 60.0, 600.0
"""A turn of the loop, or the loading before it, that takes longer has got stuck: the heartbeat stops."""


def run_learner(config: AuroraConfig, run_folder: Path) -> None:
    """Learn from the server that owns `run_folder` until it ends. Raises AuroraError when that cannot be begun."""
    learn = config.learn
    if follows(config):
        _follow(config)
        return
    threads = learn.threads * learn.devices
    _step_behind(learn.threads, niceness(share=learn.compute_share, threads=threads, cpus=os.cpu_count() or 1))
    page, status = _open_pages(run_folder)
    page.write(pid=os.getpid(), started_ns=time.monotonic_ns(), activity="loading", error="", busy_threads=threads)
    page.beat()
    try:
        _learn(config, run_folder, page, status)
    except BaseException as error:
        page.write(error=f"{type(error).__name__}: {error}")
        raise
    page.write(pid=0, activity="left")


def follows(config: AuroraConfig) -> bool:
    """Whether this is one of several processes that learn together, and not the first: Fabric has numbered it then."""
    return config.learn.devices > 1 and os.environ.get("LOCAL_RANK", "0") != "0"


def _follow(config: AuroraConfig) -> None:
    """Learn with the first process, whose copy this is, until that says to end; priority is inherited from it."""
    from aurora_lit.learn.online.build import run_follower

    for number in (signal.SIGTERM, signal.SIGINT):  # sent to all of a terminal or a service
        signal.signal(number, signal.SIG_IGN)
    run_follower(config)


def _learn(config: AuroraConfig, run_folder: Path, page: LearnerBlock, status: StatusBlock) -> None:
    from aurora_lit.learn.online.build import build_loop

    loops: list[OnlineLoop] = []
    with _beating(page, loops), build_loop(config, run_folder, run_folder / RING_NAME, page, status) as loop:
        loops.append(loop)
        with _stopped_by_signals(loop), _stopped_with_server(loop, run_folder, status):
            loop.run()


def niceness(*, share: float, threads: int, cpus: int) -> int:
    """The nice value that gives `threads` about `share` of the processors while all of them are busy otherwise.

    Linux weighs a nice value by 1.25 to its power (sched(7)), and a processor's time is shared by weight.
    """
    of_one = min(0.5, share * cpus / threads)
    return min(19, max(1, round(math.log((1 - of_one) / of_one, 1.25))))


def _step_behind(threads: int, nice: int) -> None:
    """Run on few threads, and behind all others: but not SCHED_IDLE, which gets nothing while engines spin.

    Linux shares processors among sessions first (autogroups, sched(7)), and nice values count within a session only:
    two busy sessions get half each. So a session of our own steps back as a whole.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(nice)
    if os.getsid(0) == os.getpid():  # not that of a terminal
        with contextlib.suppress(OSError):  # not Linux, or built without
            _AUTOGROUP.write_text(str(nice))


def _open_pages(run_folder: Path) -> tuple[LearnerBlock, StatusBlock]:
    """Our own page, and the engine worker's to read."""
    try:
        page = LearnerBlock.open(run_folder / LEARNER_STATUS_NAME, writable=True)
        status = StatusBlock.open(run_folder / STATUS_NAME)
    except (OSError, ValueError) as error:
        raise AuroraError(f"{run_folder} is not the run folder of a server of this version: {error}") from error
    other = page.read()
    if other.state == "running":  # its page is not ours to write on
        raise AuroraError(f"a learner is attached to this server already (pid {other.pid}); end it first")
    return page, status


@contextlib.contextmanager
def _beating(page: LearnerBlock, loops: list[OnlineLoop]) -> Iterator[None]:
    """Beat from a thread of its own, since a step may take long on a loaded machine; not for a loop that got stuck."""
    silent_from_s = time.monotonic() + _LONGEST_LOADING_S

    def beat() -> None:
        if time.monotonic() < (loops[0].last_turn_s + _LONGEST_TURN_S if loops else silent_from_s):
            page.beat()

    with _repeated(beat, every_s=_BEAT_EVERY_S, name="heartbeat"):
        yield


@contextlib.contextmanager
def _stopped_by_signals(loop: OnlineLoop) -> Iterator[None]:
    """SIGTERM and SIGINT end the loop in order."""
    before = {number: signal.signal(number, lambda *_: loop.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stopped_with_server(loop: OnlineLoop, run_folder: Path, status: StatusBlock) -> Iterator[None]:
    """The loop ends when the run folder is gone, or the engine worker is."""

    def watch() -> None:
        worker = status.read().worker_pid
        if not run_folder.is_dir() or (worker and not psutil.pid_exists(worker)):
            loop.stop()

    with _repeated(watch, every_s=1.0, name="server watch"):
        yield


@contextlib.contextmanager
def _repeated(action: Callable[[], None], *, every_s: float, name: str) -> Iterator[None]:
    """Do something again and again in a thread of its own, which has ended when this is left."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            action()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
