"""How much of the machine learning may take: a bucket of processor seconds that fills with time and empties with use.

Work may begin while the bucket is not in debt; a step that takes more than is there leaves a debt that is waited off,
so the share holds on average whatever a step costs. The whole process counts, reading traces included.
What is left out: the sleeping itself (learn/online/loop.py), and priority (learn/online/process.py), which decides who goes first
where this decides how much.

    budget = Budget(share=0.04, full_load_share=0.02, minimum_duty=0.005)
    while True:
        if wait_s := budget.wait_s(load()):
            time.sleep(wait_s)
        else:
            step()
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

_SAVED_S = 10.0
"""Seconds of unused share that are kept: a learner that waited for traces may begin with a few steps at once."""
_SMALLEST_S = 1e-6
"""A debt that is not worth waiting for."""
_WINDOW_S = 60.0
"""Wall seconds that `measured_share` looks back."""


class Load(Enum):
    """What serving has to do."""

    SPARE = 1
    """Slots are free."""
    FULL = 2
    """Nearly every slot is taken: a second of learning costs about one of serving."""
    QUEUEING = 3
    """Requests wait for a slot."""


class Budget:
    """Holds this process's processor time to a share of the machine's."""

    def __init__(
        self,
        *,
        share: float,
        full_load_share: float,
        minimum_duty: float,
        cpus: int | None = None,
        wall_s: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        """share: of all processors, and no more by the others: full_load_share while nearly every slot is taken,
        minimum_duty while requests queue. cpus: None counts the machine's.
        """
        self._cpus = cpus or os.cpu_count() or 1
        self._shares = {
            Load.SPARE: share,
            Load.FULL: min(full_load_share, share),
            Load.QUEUEING: min(minimum_duty, share),
        }
        self._wall_s, self._cpu_s = wall_s, cpu_s
        self._balance_s = 0.0
        self._seen = (wall_s(), cpu_s())
        self._samples = deque([self._seen])

    def wait_s(self, load: Load) -> float:
        """Seconds until work may begin if nothing changes; 0: now. Infinite where there is no share for that load."""
        wall, cpu = self._wall_s(), self._cpu_s()
        rate = self._shares[load] * self._cpus
        earned, spent = rate * (wall - self._seen[0]), cpu - self._seen[1]
        self._balance_s = min(self._balance_s + earned - spent, self._shares[Load.SPARE] * self._cpus * _SAVED_S)
        self._seen = (wall, cpu)
        self._samples.append(self._seen)
        while len(self._samples) > 2 and self._samples[1][0] <= wall - _WINDOW_S:
            self._samples.popleft()
        if self._balance_s > -_SMALLEST_S:
            return 0.0
        return -self._balance_s / rate if rate else float("inf")

    @property
    def measured_share(self) -> float:
        """Processor time used in the last minute, as a share of what all processors had; 0 at the very start."""
        (first_wall, first_cpu), (wall, cpu) = self._samples[0], self._samples[-1]
        return (cpu - first_cpu) / ((wall - first_wall) * self._cpus) if wall > first_wall else 0.0
