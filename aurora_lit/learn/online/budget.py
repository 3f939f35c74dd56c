"""How much processor time learning may use: a token bucket of processor seconds.

The bucket fills with wall time, faster while the server has no request, and empties with the processor time that was
used. Work may begin while the balance is not negative; a long step makes it negative, and the next one waits until it
is not, so the share holds on average whatever a step costs. All of the process counts, reading traces included. A
`ShareLimit` keeps one kind of work, such as trials, to a share of what is used. Leaves out the sleeping itself and
giving way in the middle of a step (learn/online/loop.py), and the process's priority (learn/online/process.py).

    budget = Budget(idle_share=0.25, share=0.04)
    while True:
        if wait_s := budget.wait_s(load()):
            time.sleep(wait_s)
        else:
            step()
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum

from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.machine import available_cores

_FULL_LOAD_PART, _QUEUEING_PART = 1 / 2, 1 / 8
"""Of the share, while nearly every slot is taken, and while requests wait: learning never stops entirely."""
_FULL_LOAD = 0.75
"""Share of taken slots from which the server counts as fully loaded: between two requests a slot is briefly free."""
_SAVED_S = 10.0
"""Largest balance, in seconds of the share: after waiting for traces a learner may take a few steps at once."""
_SMALLEST_S = 1e-6
"""A smaller debt counts as none, in processor seconds."""
_WINDOW_S = 60.0
"""Wall seconds that `measured_share` is measured over."""


class ServerLoad(Enum):
    """How busy the server is."""

    IDLE = 0
    """It has no request, and has had none since the last look."""
    SPARE = 1
    """Slots are free."""
    FULL = 2
    """Nearly every slot is taken: a second of learning costs about a second of serving."""
    QUEUEING = 3
    """Requests are waiting for a slot."""


class LoadWatch:
    """How busy the server is now, by its worker's status page.

    >>> look = LoadWatch(EngineStatusPage.open(run_folder / STATUS_NAME))
    >>> look()
    <ServerLoad.IDLE: 0>
    """

    def __init__(self, status: EngineStatusPage) -> None:
        self._status = status
        self._served: tuple[int, int] | None = None
        """Tokens that had been served at the last look."""

    def __call__(self) -> ServerLoad:
        """Look."""
        now = self._status.read()
        served = (now.generated_tokens, now.prompt_tokens)
        is_quiet, self._served = served == self._served, served
        if now.waiting:
            return ServerLoad.QUEUEING
        if now.running > _FULL_LOAD * now.num_slots:
            return ServerLoad.FULL
        return ServerLoad.IDLE if is_quiet and not now.running else ServerLoad.SPARE


class Budget:
    """Limits this process's processor time to a share of what it may use."""

    def __init__(
        self,
        *,
        idle_share: float,
        share: float,
        cpus: int | None = None,
        wall_s: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        """Start with an empty bucket.

        share: of all processors' time while slots are free. idle_share: while there is no request; never less than the
        first. cpus: how many processors that are; None: as many as this process may use.
        """
        self._cpus = cpus or available_cores()
        self._shares = {
            ServerLoad.IDLE: max(idle_share, share),
            ServerLoad.SPARE: share,
            ServerLoad.FULL: _FULL_LOAD_PART * share,
            ServerLoad.QUEUEING: _QUEUEING_PART * share,
        }
        self._wall_s, self._cpu_s = wall_s, cpu_s
        self._balance_s = 0.0
        self._seen = (wall_s(), cpu_s())
        self._samples = deque([self._seen])

    def wait_s(self, load: ServerLoad) -> float:
        """Seconds until work may begin under this load; 0: now."""
        wall, cpu = self._wall_s(), self._cpu_s()
        rate = self._shares[load] * self._cpus
        earned, spent = rate * (wall - self._seen[0]), cpu - self._seen[1]
        self._balance_s = min(self._balance_s + earned - spent, self._shares[ServerLoad.SPARE] * self._cpus * _SAVED_S)
        self._seen = (wall, cpu)
        self._samples.append(self._seen)
        while len(self._samples) > 2 and self._samples[1][0] <= wall - _WINDOW_S:
            self._samples.popleft()
        if self._balance_s > -_SMALLEST_S:
            return 0.0
        return -self._balance_s / rate

    @property
    def measured_share(self) -> float:
        """Processor time used in the last minute, as a share of all processors' time; 0 at the very start."""
        (first_wall, first_cpu), (wall, cpu) = self._samples[0], self._samples[-1]
        return (cpu - first_cpu) / ((wall - first_wall) * self._cpus) if wall > first_wall else 0.0


class ShareLimit:
    """Keeps one kind of work to a share of this process's own processor time.

    Each time costs what it costs; the next one is due when the process has computed so much else that the share holds.

    >>> saving = ShareLimit(0.03)
    >>> if saving.is_due:
    ...     with saving.measured():
    ...         save()
    """

    def __init__(self, share: float) -> None:
        """Due at once: the first time is not known to cost anything."""
        self._share = share
        self._ended_s, self._cost_s = time.process_time(), 0.0

    @property
    def is_due(self) -> bool:
        """True if the share allows the work again."""
        others_s = time.process_time() - self._ended_s
        return others_s * self._share >= self._cost_s * (1 - self._share)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """What happens inside is the work."""
        began_s = time.process_time()
        try:
            yield
        finally:
            self._ended_s = time.process_time()
            self._cost_s = self._ended_s - began_s
