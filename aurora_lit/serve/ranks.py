"""The ranks of a sharded target: what ranks 1, 2, … run, and how the main process watches all of them.

`engine.devices` processes are started (engine_process.py). Worker 0 is rank 0 and runs the engine; each other one runs
`run_rank` and never serves a request. Each writes a heartbeat several times a second from a thread of its own, so that
a long forward pass does not look like a stopped process. The server ends if one of them ends or its heartbeat stops.
Leaves out what ranks compute together (distributed.py, models/sharded_target.py) and ending the server
(serve/server.py).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aurora_lit.errors import RankError
from aurora_lit.ipc.engine_status import EngineStatusPage, RankStatusPage, WorkerState, rank_path

if TYPE_CHECKING:
    from aurora_lit.distributed import Order  # only for types: the main process does not import torch

STALLED_AFTER_S = 2.0
"""A rank whose last heartbeat is older counts as stopped."""
HEARTBEAT_S = 0.25
_log = logging.getLogger(__name__)


class Shard(Protocol):
    """One rank's part of the target; models/sharded_target.py has the real one."""

    def run_worker_loop(self, *, after: Callable[[Order], None]) -> None:
        """Carry out the orders of rank 0 until it orders to stop. after: runs after each order."""


def run_rank(rank: int, run_folder: Path, load: Callable[[], Shard]) -> None:
    """Run rank 1, 2, … in its worker process; does not return."""
    # Rank 0 orders the stop, after it has finished the running requests.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    page = RankStatusPage.open(rank_path(run_folder, rank), writable=True)
    page.write(pid=os.getpid())
    threading.Thread(target=keep_beating, args=(page,), daemon=True).start()
    try:
        shard = load()
        shard.run_worker_loop(after=_OrderReport(page))
    except Exception as error:
        _log.exception("rank %d failed", rank)
        page.write(error=f"{type(error).__name__}: {error}")
        os._exit(1)  # a regular exit would wait for the other ranks
    os._exit(0)


def keep_beating(page: RankStatusPage) -> None:
    """Write heartbeats for ever."""
    while True:
        page.beat()
        time.sleep(HEARTBEAT_S)


class _OrderReport:
    """Writes the number of orders and the announced draft to the rank's page."""

    def __init__(self, page: RankStatusPage) -> None:
        self._page, self._num_orders, self._num_versions = page, 0, 0

    def __call__(self, order: Order) -> None:
        self._num_orders += 1
        if order.num_versions != self._num_versions:
            self._num_versions = order.num_versions
            self._page.write(orders=self._num_orders, num_versions=order.num_versions, draft_version=order.version)
        else:
            self._page.write(orders=self._num_orders)


class RankWatch:
    """The main process's watch over the engine's processes; one `poll` takes HEARTBEAT_S or less.

    >>> while (loss := watch.poll()) is None: ...
    """

    def __init__(self, processes: Sequence[BaseProcess], status: EngineStatusPage, run_folder: Path) -> None:
        """processes: by rank."""
        self._processes, self._status = processes, status
        self._pages = [RankStatusPage.open(rank_path(run_folder, rank)) for rank in range(1, len(processes))]
        self._heartbeats_ns = [0] * len(processes)
        self._polls_without_heartbeat = [0] * len(processes)

    def poll(self) -> str | None:
        """Why the engine cannot go on; None while all its processes run."""
        ended_sentinels = wait([process.sentinel for process in self._processes], timeout=HEARTBEAT_S)
        if ended_sentinels:
            for process in self._processes:
                if process.sentinel in ended_sentinels:
                    process.join()  # the sentinel fires a moment before the process has ended
            return self._describe_loss(ended_sentinels)
        status = self._status.read()
        # A worker without further ranks is watched in serve/http/worker_client.py. While loading, heartbeats may stop.
        if len(self._processes) == 1 or status.state is not WorkerState.READY:
            return None
        heartbeats_ns = [status.heartbeat_ns, *(page.read().heartbeat_ns for page in self._pages)]
        for rank, heartbeat_ns in enumerate(heartbeats_ns):
            # Counted in polls, not by the clock: if the whole machine was suspended, so was this process.
            is_new = heartbeat_ns != self._heartbeats_ns[rank]
            self._polls_without_heartbeat[rank] = 0 if is_new else self._polls_without_heartbeat[rank] + 1
            self._heartbeats_ns[rank] = heartbeat_ns
            if self._polls_without_heartbeat[rank] * HEARTBEAT_S > STALLED_AFTER_S:
                return f"{self._name(rank)} gave no sign of life for {STALLED_AFTER_S} s"
        return None

    def kill(self) -> None:
        """Kill all processes, stopped ones included."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _describe_loss(self, ended_sentinels: Collection[object]) -> str:
        """Name the process that ended first; the others end because of it, each with an error of its own."""
        if len(self._processes) > 1:
            time.sleep(0.1)  # the end of a killed process may be seen after that of one that lost its connection to it
            own = self._status.read()
            if own.state is WorkerState.FAILED and own.error and not own.error.startswith(RankError.__name__):
                return own.error  # rank 0 has ended the others
        # A process whose end another thread is just learning of still counts as alive.
        ended = [
            rank
            for rank, process in enumerate(self._processes)
            if process.sentinel in ended_sentinels or not process.is_alive()
        ]
        codes = {rank: self._processes[rank].exitcode or 0 for rank in ended}
        errors = {rank: self._pages[rank - 1].read().error if rank else self._status.read().error for rank in ended}
        first = min(ended, key=lambda rank: (min(codes[rank], 0), errors[rank].startswith(RankError.__name__), rank))
        if codes[first] < 0:
            return f"{self._name(first)} was killed (signal {-codes[first]})"
        if first == 0 and errors[0]:
            return errors[0]
        return f"{self._name(first)} ended: {errors[first] or f'exit code {codes[first]}'}"

    def _name(self, rank: int) -> str:
        if len(self._processes) == 1:
            return "the engine worker"
        return f"rank {rank} of the engine's {len(self._processes)} processes"
