"""How many CPU threads rounds use: the configured number, less the cores that others compute on.

The threads of a round synchronise several times a layer. If another process takes one of their cores, all of them wait
for it, spinning: beside one busy process a round on two cores can take twenty times as long, where on one core it would
take twice as long. What a round computes does not depend on its number of threads (see kernels/), so giving up cores
changes speed only.

    budget = ThreadBudget(engine.planner, page, threads=torch.get_num_threads())
    budget.before_round()
    engine.round()
    budget.after_round()
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from aurora_lit.cores import available_cores
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.speculation.planner import SpeculationPlanner

_CHECK_EVERY_S = 0.5
"""How often the learner's whole page is read; a single field is read every round."""
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
    """Sets the number of threads before each round."""

    def __init__(
        self,
        planner: SpeculationPlanner,
        page: LearnerStatusPage,
        *,
        threads: int,
        cores: int | None = None,
        contention: Contention | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """threads: number for undisturbed rounds without a learner. cores: None means all that may be used."""
        self._planner, self._page, self._monotonic_s = planner, page, monotonic_s
        self._configured_threads, self._cores = threads, cores or available_cores()
        self._contention = contention or Contention()
        self._threads = threads
        self._next_check_s = 0.0
        self._is_learner_running = False
        self._started = (0.0, 0.0)

    def before_round(self) -> None:
        """Set the threads of the next round."""
        busy = self._page.peek("busy_threads")
        if busy and self._monotonic_s() >= self._next_check_s:
            self._next_check_s = self._monotonic_s() + _CHECK_EVERY_S
            # A learner that was killed while it computed leaves its threads marked as busy.
            self._is_learner_running = self._page.read().state == "running"
        threads = self._configured_threads
        if busy and self._is_learner_running:
            threads = max(1, min(threads, self._cores - busy))
        if self._contention.is_on:
            threads = 1
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)
            # The planner compares costs of rounds on all threads; slower rounds would distort them.
            self._planner.updates_costs = threads == self._configured_threads
        self._started = (time.perf_counter(), time.process_time())

    def after_round(self) -> None:
        """Learn whether the round had its cores to itself."""
        if self._threads > 1:
            wall_s, cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
            self._contention.observe(wall_s=wall_s, cpu_s=cpu_s, threads=self._threads)
