"""How many CPU threads rounds use: the configured number, less the cores that others compute on.

The threads of a round synchronise several times a layer. If another process takes one of their cores, all of them wait
for it, spinning: beside one busy process a round on two cores can take twenty times as long, where on one core it would
take twice as long. What a round computes does not depend on its number of threads (see kernels/), so giving up cores
changes speed only.

    budget = thread_budget(target.device)
    uses_all = budget.before_round()
    budget.begin_pass()                     # of the target
    budget.end_pass()
    budget.give_back()                      # when no request is left
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from aurora_lit.machine import available_cores

_LEAST_SHARE = 0.75
"""Passes that get less than this share of the processor time of their threads compete with another process. Undisturbed
they get 0.9 or more, since threads that wait for a moment spin."""
_JUDGED_S = 0.1
"""Time of the passes that are judged together. Linux knows the processor time of other threads that compute as of the
last tick of the clock, up to 10 ms before: of a pass of 3 ms the process's time may be that of one thread."""
_MOST_GAP_S = 0.01
"""Between passes that follow each other. What a tick tells in it is of the pass before, mostly, and counts."""
_FIRST_REST_S, _MOST_REST_S = 0.5, 8.0
"""For how long it is given up: then all threads are tried again. Each failure in a row doubles the time."""


class Contention:
    """Notices that other processes compute on the cores of passes, and says when to do with one thread.

    >>> contention.observe(wall_s=0.030, cpu_s=0.028, threads=2)
    >>> contention.is_on
    """

    def __init__(self, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = self._cpu_s = 0.0
        """Of the passes since the last judgement; processor time as a share of what their threads could have."""
        self._rest_s, self._until_s = _FIRST_REST_S, 0.0

    @property
    def is_on(self) -> bool:
        """True: use one thread now."""
        return self._monotonic_s() < self._until_s

    def observe(self, *, wall_s: float, cpu_s: float, threads: int) -> None:
        """Add a pass on several threads: its duration, and the processor time of the whole process in it."""
        self._wall_s, self._cpu_s = self._wall_s + wall_s, self._cpu_s + cpu_s / threads
        if self._wall_s < _JUDGED_S:
            return
        if self._cpu_s >= _LEAST_SHARE * self._wall_s:
            self._rest_s = _FIRST_REST_S
        else:
            self._until_s = self._monotonic_s() + self._rest_s
            self._rest_s = min(2 * self._rest_s, _MOST_REST_S)
        self._wall_s = self._cpu_s = 0.0


class ThreadBudget:
    """Sets the number of threads before each round, and sets it back when no request is left."""

    def __init__(
        self,
        *,
        threads: int,
        cores: int | None = None,
        busy_cores: Callable[[], int] = lambda: 0,
        contention: Contention | None = None,
    ) -> None:
        """threads: number for undisturbed rounds. cores: None means all that may be used. busy_cores: how many of them
        a learner computes on now.
        """
        self._configured_threads, self._cores = threads, cores or available_cores()
        self._busy_cores, self._contention = busy_cores, contention or Contention()
        self._started = (0.0, 0.0)
        self._ended = (-math.inf, 0.0, 0.0)

    def before_round(self) -> bool:
        """Set the threads of the next round. True if they are all, so that its time may be compared with others'."""
        threads = self._configured_threads
        if busy := self._busy_cores():
            threads = max(1, min(threads, self._cores - busy))
        threads = 1 if self._contention.is_on else threads
        _use(threads)
        return threads == self._configured_threads

    def begin_pass(self) -> None:
        """Time the pass of the target that begins now."""
        now_s, cpu_s = time.perf_counter(), time.process_time()
        ended_s, ended_cpu_s, ended_own_s = self._ended
        if now_s - ended_s <= _MOST_GAP_S:
            cpu_s = ended_cpu_s + time.thread_time() - ended_own_s  # all but this thread's own since then
        self._started = now_s, cpu_s

    def end_pass(self) -> None:
        """Learn whether the pass had its cores to itself. In the rest of a round most threads wait, and may sleep."""
        now_s, cpu_s = time.perf_counter(), time.process_time()
        if (threads := torch.get_num_threads()) > 1:
            self._contention.observe(wall_s=now_s - self._started[0], cpu_s=cpu_s - self._started[1], threads=threads)
        self._ended = now_s, cpu_s, time.thread_time()

    def give_back(self) -> None:
        """Let other code of this process have the threads again."""
        _use(self._configured_threads)


def thread_budget(device: torch.device, *, busy_cores: Callable[[], int] = lambda: 0) -> ThreadBudget | None:
    """Of an engine on this device, which computes on the threads that are set now.

    None on a GPU: a round needs one thread there, so that others' load says nothing about its time.
    """
    on_cpu = device.type == "cpu"
    return ThreadBudget(threads=torch.get_num_threads(), busy_cores=busy_cores) if on_cpu else None


def _use(threads: int) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
