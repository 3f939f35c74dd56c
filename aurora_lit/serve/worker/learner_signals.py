"""What the engine takes over from the learner's status page between rounds: exploration and free CPU cores.

Leaves out exploring itself (serve/speculation/proposer.py) and how the learner chooses what to ask for
(modules/domains/lr_schedule.py).

    exploration = ExplorationFollower(engine.proposer, page)
    thread_budget = ThreadBudget(engine.planner, page, threads=torch.get_num_threads())
    exploration.follow()                # both between rounds
    thread_budget.follow()
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from aurora_lit.cores import available_cores
from aurora_lit.ipc.learner_status import STALLED_AFTER_S, LearnerStatusPage
from aurora_lit.serve.speculation.planner import SpeculationPlanner
from aurora_lit.serve.speculation.proposer import Proposer

_CHECK_EVERY_S = 0.5
"""How often the whole page is read; a single field is read every round."""


class ExplorationFollower:
    """Sets the proposer's exploration as a running learner asks for, otherwise as configured."""

    def __init__(
        self, proposer: Proposer, page: LearnerStatusPage, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        """The proposer's present settings count as the configured ones."""
        self._proposer, self._page, self._monotonic_s = proposer, page, monotonic_s
        self._configured = proposer.explore_share, proposer.explore_temperature
        self._next_check_s = 0.0

    def follow(self) -> None:
        """Take over what the page says now; reads it twice a second at most."""
        now_s = self._monotonic_s()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_EVERY_S
        learner = self._page.read()
        # The temperature is 0 until a learner has written its first report.
        is_asked = learner.pid and learner.heartbeat_age_s <= STALLED_AFTER_S and learner.explore_temperature > 0
        share, temperature = (learner.explore_share, learner.explore_temperature) if is_asked else self._configured
        self._proposer.explore_share, self._proposer.explore_temperature = share, temperature


class ThreadBudget:
    """Sets the number of CPU threads of rounds: the configured one, less the cores that the learner computes on.

    The threads of a round synchronise several times a layer. If the learner takes one of their cores, all of them wait
    for it: on two cores, each second of learning would cost rounds two seconds of processor time. What a round computes
    does not depend on its number of threads (see kernels/), so giving up a core changes speed only.
    """

    def __init__(
        self,
        planner: SpeculationPlanner,
        page: LearnerStatusPage,
        *,
        threads: int,
        cores: int | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """threads: number for rounds without a learner. cores: None means all that may be used."""
        self._planner, self._page, self._monotonic_s = planner, page, monotonic_s
        self._configured_threads, self._cores = threads, cores or available_cores()
        self._threads = threads
        self._next_check_s = 0.0
        self._is_learner_running = False

    def follow(self) -> None:
        """Set the threads of the next round."""
        busy = self._page.peek("busy_threads")
        if busy and self._monotonic_s() >= self._next_check_s:
            self._next_check_s = self._monotonic_s() + _CHECK_EVERY_S
            # A learner that was killed while it computed leaves its threads marked as busy.
            self._is_learner_running = self._page.read().state == "running"
        threads = self._configured_threads
        if busy and self._is_learner_running:
            threads = max(1, min(threads, self._cores - busy))
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)
            # The planner compares costs of rounds on all threads; slower rounds would distort them.
            self._planner.updates_costs = threads == self._configured_threads
