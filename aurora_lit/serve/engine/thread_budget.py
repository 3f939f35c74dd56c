"""How many CPU threads rounds use: the configured number, less the cores that others compute on.

The threads of a round synchronise several times a layer. If another process takes one of their cores, all of them wait
for it, spinning: beside one busy process a round on two cores can take twenty times as long, where on one core it would
take twice as long. What a round computes does not depend on its number of threads (see kernels/), so giving up cores
changes speed only.

    budget = ThreadBudget(threads=torch.get_num_threads())
    uses_all = budget.before_round()
    …                                       # the round
    budget.after_round(has_computed=True, goes_on=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from aurora_lit.cores import available_cores

_LEAST_SHARE = 0.75
"""Rounds that get less than this share of the processor time of their threads compete with another process. Undisturbed
they get 0.9 or more, since threads that wait spin."""
_ROUNDS_IN_A_ROW = 3
"""So many such rounds, one after the other, before a core is given up: short disturbances cost less than that."""
_FIRST_REST_S, _MOST_REST_S = 0.5, 8.0
"""For how long it is given up: then all threads are tried again. Each failure in a row doubles the time."""


class Contention:
    """Notices that other processes compute on the cores of rounds, and says when to do with one thread.

    >>> contention.observe(wall_s=0.030, cpu_s=0.028, threads=2)
    >>> contention.is_on
    """

    def __init__(self, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._disturbed, self._rest_s, self._until_s = 0, _FIRST_REST_S, 0.0

    @property
    def is_on(self) -> bool:
        """True: use one thread now."""
        return self._monotonic_s() < self._until_s

    def observe(self, *, wall_s: float, cpu_s: float, threads: int) -> None:
        """Add a round on several threads: its duration, and the processor time of the whole process in it."""
        if cpu_s >= _LEAST_SHARE * threads * wall_s:
            self._disturbed, self._rest_s = 0, _FIRST_REST_S
            return
        self._disturbed += 1
        if self._disturbed >= _ROUNDS_IN_A_ROW:
            self._disturbed = 0
            self._until_s = self._monotonic_s() + self._rest_s
            self._rest_s = min(2 * self._rest_s, _MOST_REST_S)


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
        self._threads = threads
        self._started = (0.0, 0.0)

    def before_round(self) -> bool:
        """Set the threads of the next round. True if they are all, so that its time may be compared with others'."""
        threads = self._configured_threads
        if busy := self._busy_cores():
            threads = max(1, min(threads, self._cores - busy))
        self._use(1 if self._contention.is_on else threads)
        self._started = (time.perf_counter(), time.process_time())
        return self._threads == self._configured_threads

    def after_round(self, *, has_computed: bool, goes_on: bool) -> None:
        """Learn whether the round had its cores to itself, if it has computed. goes_on: another one follows."""
        if has_computed and self._threads > 1:
            wall_s, cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
            self._contention.observe(wall_s=wall_s, cpu_s=cpu_s, threads=self._threads)
        if not goes_on:  # other code of this process has its threads back
            self._use(self._configured_threads)

    def _use(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)
