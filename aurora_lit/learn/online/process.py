"""A learner's process: attach to a running server, build the learner, run its loop, exit cleanly.

The process lowers its priority before it imports torch, since threads inherit the priority of the thread that starts
them. Leaves out the loop (learn/online/loop.py).

    run_learner(config, run_folder)         # returns when the server is gone, or after SIGTERM
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from aurora_lit.config import AuroraConfig, versions_folder
from aurora_lit.drafts.store import lock
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatus, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.process_lifetime import sigterm_ends_at_once
from aurora_lit.ipc.run_folder import FOLDER_VARIABLE, RING_NAME
from aurora_lit.machine import PINNING, available_cores

if TYPE_CHECKING:
    from aurora_lit.learn.online.loop import OnlineLoop

_AUTOGROUP = Path("/proc/self/autogroup")
_KEPT_PRODUCTS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
"""Shapes of matrix products whose generated code oneDNN keeps, half a megabyte each; by default a thousand."""
_BEAT_EVERY_S, _WATCH_EVERY_S = 0.5, 1.0
_MAX_TURN_S, _MAX_LOADING_S = 60.0, 600.0
"""A turn of the loop, or loading, that takes longer counts as stuck: the heartbeat stops."""
LOCK_NAME = "learner.lock"
"""In the folder of the versions: held by the one learner that may publish there."""
_LOCK_WAIT_S = 60.0
"""How long a learner waits for another one of its folder, which may be of a server that drains or was just killed."""
_MAX_SILENCE_S = 60.0
"""Without a run folder, and without a heartbeat for so long, the engine worker's process id may be another's by now."""
_log = logging.getLogger(__name__)


def run_learner(config: AuroraConfig, run_folder: Path) -> None:
    """Learn from the server that owns `run_folder` until it ends. Raises AuroraError if learning cannot start."""
    learn = config.learn
    if is_follower(config):
        _follow(config, run_folder)
        return
    threads = learn.threads * learn.devices
    _lower_priority(learn.threads, niceness(share=learn.compute_share, threads=threads, cpus=available_cores()))
    page, status = _open_pages(run_folder)
    with _only_writer(run_folder / LEARNER_STATUS_NAME, page):
        page.write(
            pid=os.getpid(),
            started_ns=time.monotonic_ns(),
            activity="loading",
            error="",
            busy_threads=threads,
            compute_share=0.0,
            loss=0.0,
        )
        page.beat()
        if learn.devices > 1:  # another server may be the newest one when the followers start
            os.environ[FOLDER_VARIABLE] = str(run_folder.resolve())
        try:
            _learn(config, run_folder, page, status)
        except BaseException as error:
            page.write(error=f"{type(error).__name__}: {error}")
            raise
        page.write(pid=0, activity="left")


def is_follower(config: AuroraConfig) -> bool:
    """True in a follower of data-parallel learning: Fabric has numbered the process then."""
    return config.learn.devices > 1 and os.environ.get("LOCAL_RANK", "0") != "0"


def _follow(config: AuroraConfig, run_folder: Path) -> None:
    """Take the leader's steps until it is done; the priority is inherited from the leader."""
    from aurora_lit.learn.online.build import run_follower

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # they are sent to the leader too, which ends this process
    run_follower(config, run_folder)


def _learn(config: AuroraConfig, run_folder: Path, page: LearnerStatusPage, status: EngineStatusPage) -> None:
    with sigterm_ends_at_once():  # an exception while libraries are imported ends in odd errors of theirs
        from aurora_lit.learn.online.build import build_loop

    loops: list[OnlineLoop] = []
    with (
        _heartbeat(page, loops),
        _only_learner(versions_folder(config)),
        build_loop(config, run_folder, run_folder / RING_NAME, page, status) as loop,
    ):
        loops.append(loop)
        with _stop_on_signals(loop), _stop_with_server(loop, run_folder, status):
            loop.run()


@contextlib.contextmanager
def _only_learner(folder: Path, *, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Inside the context no other learner learns into this folder: two would overwrite each other's state and drafts.

    The kernel frees the lock however this process ends, and its children do not inherit it. Raises AuroraError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)  # closed in children
    try:
        gives_up_s, has_told = time.monotonic() + wait_s, False
        while not _try_lock(descriptor, folder):
            if time.monotonic() >= gives_up_s:
                raise AuroraError(
                    f"another learner learns into {folder}; end it, or set another checkpoint.dir or checkpoint.run"
                )
            if not has_told:
                _log.warning("another learner learns into %s; waiting up to %.0f s for its end", folder, wait_s)
                has_told = True
            time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, folder: Path) -> bool:
    try:
        lock(descriptor, folder, wait=False)
    except BlockingIOError:
        return False
    return True


def niceness(*, share: float, threads: int, cpus: int) -> int:
    """The nice value that gives `threads` about `share` of `cpus` processors when other processes keep them all busy.

    Linux shares a processor by weights, which fall by a factor of 1.25 a nice level (sched(7)).
    """
    of_one = min(0.5, share * cpus / threads)
    return min(19, max(1, round(math.log((1 - of_one) / of_one, 1.25))))


def _lower_priority(threads: int, nice: int) -> None:
    """Use few threads, at low priority. Not SCHED_IDLE, which gets no time while the engine's idle threads spin.

    Linux shares processors among sessions first (autogroups, sched(7)), and nice values count only within a session:
    two busy sessions get half each. So if this process leads its session, the session is niced as a whole.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name in PINNING:  # bound to a core, this would share one with the engine's thread, however many are idle
        os.environ.pop(name, None)
    os.environ.setdefault(*_KEPT_PRODUCTS)
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox that refuses it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(nice)
    if os.getsid(0) == os.getpid():  # not a terminal's session
        with contextlib.suppress(OSError):  # not Linux, or a kernel without autogroups
            _AUTOGROUP.write_text(str(nice))


def _open_pages(run_folder: Path) -> tuple[LearnerStatusPage, EngineStatusPage]:
    """The learner's status page to write, and the engine worker's to read."""
    try:
        page = LearnerStatusPage.open(run_folder / LEARNER_STATUS_NAME, writable=True)
        status = EngineStatusPage.open(run_folder / STATUS_NAME)
    except (OSError, ValueError) as error:
        raise AuroraError(f"{run_folder} is not the run folder of a server of this version: {error}") from error
    return page, status


@contextlib.contextmanager
def _only_writer(path: Path, page: LearnerStatusPage) -> Iterator[None]:
    """Inside the context no other learner writes the server's page. Raises AuroraError if one may, stalled or not."""
    descriptor = os.open(path, os.O_RDWR)  # closed in children
    try:
        if not _try_lock(descriptor, path.parent):
            raise AuroraError(f"a learner is attached to this server already (pid {page.read().pid}); end it first")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _heartbeat(page: LearnerStatusPage, loops: list[OnlineLoop]) -> Iterator[None]:
    """Write heartbeats from a thread, since a step may take long on a loaded machine, unless the loop is stuck."""
    loading_deadline_s = time.monotonic() + _MAX_LOADING_S

    def beat() -> None:
        if time.monotonic() < (loops[0].last_turn_s + _MAX_TURN_S if loops else loading_deadline_s):
            page.beat()

    with _repeat(beat, every_s=_BEAT_EVERY_S, name="heartbeat"):
        yield


@contextlib.contextmanager
def _stop_on_signals(loop: OnlineLoop) -> Iterator[None]:
    """SIGTERM and SIGINT stop the loop after its current turn."""
    before = {number: signal.signal(number, lambda *_: loop.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stop_with_server(loop: OnlineLoop, run_folder: Path, status: EngineStatusPage) -> Iterator[None]:
    """Stop the loop when the server has ended."""

    def watch() -> None:
        reason = _why_server_has_ended(run_folder, status.read())
        if reason and not loop.is_stopped:
            _log.warning("learning ends: %s", reason)
            loop.stop()

    with _repeat(watch, every_s=_WATCH_EVERY_S, name="server watch"):
        yield


def _why_server_has_ended(run_folder: Path, worker: EngineStatus) -> str:
    """How it is known; "" while it runs.

    While the engine worker lives, a missing folder says nothing: with RemoveIPC=yes, systemd deletes what a user has in
    shared memory when the user logs out, and what is mapped stays.
    """
    if worker.worker_pid and not psutil.pid_exists(worker.worker_pid):
        return f"the engine worker (process {worker.worker_pid}) has ended"
    is_alive = worker.worker_pid and worker.heartbeat_age_s < _MAX_SILENCE_S
    return "" if is_alive or run_folder.is_dir() else f"the run folder {run_folder} is gone"


@contextlib.contextmanager
def _repeat(action: Callable[[], None], *, every_s: float, name: str) -> Iterator[None]:
    """Call `action` repeatedly in a thread, which ends with this context."""
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
