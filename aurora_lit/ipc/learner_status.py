"""The learner's status page: its work and its state, for HTTP routes, `aurora-lit status` and the server.

The server creates the file in its run folder. A learner opens it writable when it attaches, writes a heartbeat at
least once a second, and writes `pid=0` when it leaves. Readers judge from the heartbeat whether it still runs.
Leaves out how a page works (ipc/page.py) and learning.

    page = LearnerStatusPage.open(run_folder / LEARNER_STATUS_NAME, writable=True)
    page.write(pid=os.getpid(), started_ns=time.monotonic_ns(), activity="reading traces")
    page.beat()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from aurora_lit.ipc.page import Page, counter, gauge, heartbeat_age_s, text

LEARNER_STATUS_NAME = "learner.status"
"""The page's file in the run folder."""
STALLED_AFTER_S = 10.0
"""A learner whose process exists but whose last heartbeat is older counts as stalled."""
_CHECK_EVERY_S = 0.5
"""How often `LearnerCores` reads the whole page; a single field is read every round."""


@dataclass(frozen=True, kw_only=True)
class LearnerStatus:
    """One consistent reading of the page. Counters continue across restarts if the learner resumes its state."""

    heartbeat_ns: int
    """time.monotonic_ns() of the learner's last heartbeat; 0: no learner has attached yet."""
    pid: int
    """0: none has attached, or the last one left regularly."""
    started_ns: int
    """time.monotonic_ns() when it attached."""
    restarts: int = counter("aurora_learner_restarts", "Restarts of the learner.", report="restarts")
    """Written by the server: how often it restarted its learner."""
    steps: int = counter(report="steps")
    """Optimiser steps."""
    positions: int = counter(report="positions")
    """Token positions learned from."""
    steps_before: int
    """Steps that the server's first learner began with: those of servers before."""
    positions_before: int
    """The same of positions."""
    records: int = counter("aurora_learner_traces", "Traces read.", report="traces.read")
    """From the ring."""
    skipped: int = counter("aurora_learner_traces_skipped", "Traces that could not be used.", report="traces.skipped")
    """Torn, overwritten or malformed."""
    looping: int = counter(report="traces.looping")
    """Traces left out because their answer repeats itself in a loop."""
    over_client_share: int = counter(report="traces.over_client_share")
    """How often a trace was deferred because its client had filled its share of a batch."""
    labels_dropped: int = counter(report="traces.labels_dropped")
    """Traces whose domain label was dropped: too many labels, or a reserved name."""
    lag_records: int = gauge(report="traces.queued")
    """Traces in the ring that are not read yet."""
    lag_bytes: int = gauge(report="traces.queued_bytes")
    busy_threads: int
    """CPU threads that it computes with now; 0 while it waits."""
    published: int = counter("aurora_learner_published", "Drafts published.", report="gate.published")
    gate_refused: int = counter(
        "aurora_learner_gate_refused", "Drafts that the gate refused to publish.", report="gate.refused"
    )
    compute_share: float
    """Measured share of the machine's processor time."""
    loss: float
    """Running mean of the total training loss; 0 before the learner's first step."""
    champion_score: float
    """Expected accepted length of the served draft (champion) at the learner's last trial; 0 before the first."""
    challenger_score: float
    """The same for the candidate draft (challenger)."""
    num_shifts: int = counter(report="domains.shifts")
    """Shifts of traffic detected."""
    rate_factor: float = gauge(report="domains.rate_factor")
    """Factor on the base learning rate; 0 until the learner has written it."""
    last_shift: str = text(128, report="domains.last_shift")
    """The last shift, as text."""
    domains: str = text(1024, report="domains.now")
    """Domains of the latest requests, each with its share and how much is left to learn of it, as text."""
    version: str = text(256, report="version")
    """The checkpoint version that its weights started from or were last published as."""
    activity: str = text(128, report="activity")
    """Current activity, as text."""
    error: str = text(1024, report="error")
    """Why the last learner ended, unless it left regularly; what fails at present, such as saving on a full disk."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the learner's last heartbeat."""
        return heartbeat_age_s(self)

    @property
    def state(self) -> Literal["absent", "running", "stalled", "dead"]:
        """absent: none attached, or it left regularly; stalled: no recent heartbeat; dead: it ended by a fault."""
        if self.pid == 0:
            return "absent"
        if not _exists(self.pid):
            return "dead"
        return "running" if self.heartbeat_age_s <= STALLED_AFTER_S else "stalled"


class LearnerStatusPage(Page[LearnerStatus]):
    """The learner's page."""

    record_class = LearnerStatus

    @contextlib.contextmanager
    def computing(self, threads: int) -> Iterator[None]:
        """Report `threads` busy CPU threads inside the context, so that the server does not use their cores."""
        self.write(busy_threads=threads)
        try:
            yield
        finally:
            self.write(busy_threads=0)


class LearnerCores:
    """On how many cores a running learner computes now, which rounds leave to it (serve/engine/thread_budget.py).

    >>> LearnerCores(page)()
    """

    def __init__(self, page: LearnerStatusPage, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._page, self._monotonic_s = page, monotonic_s
        self._next_check_s = 0.0
        self._is_running = False

    def __call__(self) -> int:
        """0 if none does."""
        busy = self._page.peek("busy_threads")
        if busy and self._monotonic_s() >= self._next_check_s:
            self._next_check_s = self._monotonic_s() + _CHECK_EVERY_S
            # A learner that was killed while it computed leaves its threads marked as busy.
            self._is_running = self._page.read().state == "running"
        return busy if self._is_running else 0


def _exists(pid: int) -> bool:
    """True if the process runs; False also for a zombie, which has ended and not been waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
