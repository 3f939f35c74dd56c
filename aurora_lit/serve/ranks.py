"""The processes that hold a part of the target beside the engine worker, and the watch over all of them.

LitServe starts `engine.devices` workers. Worker 0 is rank 0 and runs the engine; each other one runs `run_rank` and
never serves a request. The main process watches them all: each says several times a second that it lives, from a
thread of its own, so that a long pass is no silence and a stopped process is. One that ends or falls silent takes the
whole server with it. What is left out: what ranks do together (distributed.py, models/sharded_target.py), ending the server
(serve/server.py).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aurora_lit.errors import RankError
from aurora_lit.ipc.engine_status import StatusBlock, WorkerState
from aurora_lit.ipc.rank_status import RankBlock, rank_path

if TYPE_CHECKING:
    from aurora_lit.distributed import Order  # the main process needs no torch

STALLED_AFTER_S = 2.0
"""Silence after which a rank counts as stopped."""
HEARTBEAT_S = 0.25
_log = logging.getLogger(__name__)


class Part(Protocol):
    """A rank's part of the target, as models/sharded_target.py has it."""

    def follow(self, *, after: Callable[[Order], None]) -> None:
        """Do what rank 0 orders until it says stop."""


def run_rank(rank: int, run_folder: Path, load: Callable[[], Part]) -> None:
    """The life of ranks 1, 2, … in their worker process; does not return."""
    # Rank 0 says when to stop, after it has finished what runs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    page = RankBlock.open(rank_path(run_folder, rank), writable=True)
    page.write(pid=os.getpid())
    threading.Thread(target=keep_beating, args=(page,), daemon=True).start()
    try:
        part = load()
        part.follow(after=_Noting(page, part))
    except Exception as error:
        _log.exception("rank %d failed", rank)
        page.write(error=f"{type(error).__name__}: {error}")
        os._exit(1)  # leaving in order would wait for the others
    os._exit(0)


def keep_beating(page: RankBlock) -> None:
    """Say for ever that this process lives."""
    while True:
        page.beat()
        time.sleep(HEARTBEAT_S)


class _Noting:
    """Notes each order on the page."""

    def __init__(self, page: RankBlock, part: Part) -> None:
        self._page, self._part, self._orders, self._versions = page, part, 0, 0

    def __call__(self, order: Order) -> None:
        self._orders += 1
        if order.num_versions != self._versions:
            self._versions = order.num_versions
            self._page.write(orders=self._orders, num_versions=order.num_versions, draft_version=order.version)
        else:
            self._page.write(orders=self._orders)


class RankWatch:
    """What the main process sees of the engine's processes; one look takes HEARTBEAT_S or less.

    >>> while (loss := watch.look()) is None: ...
    """

    def __init__(self, processes: Sequence[BaseProcess], status: StatusBlock, run_folder: Path) -> None:
        """`processes` by rank."""
        self._processes, self._status = processes, status
        self._pages = [RankBlock.open(rank_path(run_folder, rank)) for rank in range(1, len(processes))]
        self._beats = [0] * len(processes)
        self._silent = [0] * len(processes)
        self.orderly = False
        """Whether what ended has ended in order, as on SIGTERM."""

    def look(self) -> str | None:
        """What is wrong; None: all live."""
        ending = wait([process.sentinel for process in self._processes], timeout=HEARTBEAT_S)
        if ending:
            for process in self._processes:
                if process.sentinel in ending:
                    process.join()  # it closes its files a moment before it has ended
            return self._say()
        now = self._status.read()
        if len(self._processes) == 1 or now.state is not WorkerState.READY:
            return None  # clients judge a lone worker's silence (serve/http/worker_client.py); one that loads may be silent
        beats = [now.heartbeat_ns, *(page.read().heartbeat_ns for page in self._pages)]
        for rank, beat in enumerate(beats):
            # In looks, not by the clock: when the whole machine stood still, so did this process.
            self._silent[rank] = 0 if beat != self._beats[rank] else self._silent[rank] + 1
            self._beats[rank] = beat
            if self._silent[rank] * HEARTBEAT_S > STALLED_AFTER_S:
                return f"{self._name(rank)} gave no sign of life for {STALLED_AFTER_S} s"
        return None

    def kill(self) -> None:
        """End them all, also those that are stopped."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _say(self) -> str:
        """Name the one that ended first: the others end of its loss, with an error of their own."""
        if len(self._processes) > 1:
            time.sleep(0.1)  # a killed one may be seen a moment after one that missed it
        ended = [rank for rank, process in enumerate(self._processes) if not process.is_alive()]
        codes = {rank: self._processes[rank].exitcode or 0 for rank in ended}
        self.orderly = not any(codes.values())
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
