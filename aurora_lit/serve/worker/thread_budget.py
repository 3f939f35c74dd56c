"""How many CPU threads rounds have: as many as are configured, but for the cores that the learner computes on just now.

The threads of a round meet several times a layer. So where a learner takes one of their cores for a while, all of them
wait, and the core that is still theirs idles: on two cores each second of learning would cost two. What a round
computes does not depend on its threads (see the kernels), so leaving that core alone changes speed only.

    cores = ThreadBudget(engine.policy, page, threads=0)
    cores.follow()                          # between rounds
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from aurora_lit.ipc.learner_status import LearnerBlock
from aurora_lit.serve.speculation.planner import SpeculationPlanner

_LOOK_CLOSER_EVERY_S = 0.5
"""A learner that was killed at work still says that it works, so whether it lives is asked about so often."""


class ThreadBudget:
    """See the file's docstring."""

    def __init__(
        self,
        policy: SpeculationPlanner,
        page: LearnerBlock,
        *,
        threads: int,
        cores: int | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """threads: of rounds without a learner. cores: None counts the machine's."""
        self._policy, self._page, self._monotonic_s = policy, page, monotonic_s
        self._threads, self._cores = threads, cores or os.cpu_count() or 1
        self._now = threads
        self._next_s = 0.0
        self._alive = False

    def follow(self) -> None:
        """Run the next round on the cores that are free by now."""
        busy = self._page.peek("busy_threads")
        if busy and self._monotonic_s() >= self._next_s:
            self._next_s = self._monotonic_s() + _LOOK_CLOSER_EVERY_S
            self._alive = self._page.read().state == "running"
        threads = max(1, min(self._threads, self._cores - busy)) if busy and self._alive else self._threads
        if threads != self._now:
            self._now = threads
            torch.set_num_threads(threads)
            # Costs are those of rounds on all threads, or what is chosen would look dear beside what is not.
            self._policy.times_count = threads == self._threads
