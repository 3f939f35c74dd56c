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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from aurora_lit.ipc.page import Page, heartbeat_age_s, text

LEARNER_STATUS_NAME = "learner.status"
"""The page's file in the run folder."""
STALLED_AFTER_S = 10.0
"""A learner whose process exists but whose last heartbeat is older counts as stalled."""


@dataclass(frozen=True, kw_only=True)
class LearnerStatus:
    """One consistent reading of the page. Counters continue across restarts if the learner resumes its state."""

    heartbeat_ns: int
    """time.monotonic_ns() of the learner's last heartbeat; 0: no learner has attached yet."""
    pid: int
    """0: none has attached, or the last one left regularly."""
    started_ns: int
    """time.monotonic_ns() when it attached."""
    restarts: int
    """Written by the server: how often it restarted its learner."""
    steps: int
    """Optimiser steps."""
    positions: int
    """Token positions learned from."""
    steps_before: int
    """Steps that the server's first learner began with: those of servers before."""
    positions_before: int
    """The same of positions."""
    records: int
    """Traces read from the ring."""
    skipped: int
    """Traces that could not be used: torn, overwritten or malformed."""
    stale: int
    """Traces of drafts older than learn.max_staleness versions; only the supervised loss uses them."""
    looping: int
    """Traces left out because their answer repeats itself in a loop."""
    over_client_share: int
    """How often a trace was deferred because its client had filled its share of a batch."""
    labels_dropped: int
    """Traces whose domain label was dropped: too many labels, or a reserved name."""
    lag_records: int
    """Traces in the ring that are not read yet."""
    lag_bytes: int
    busy_threads: int
    """CPU threads that it computes with now; 0 while it waits."""
    published: int
    """Drafts published."""
    gate_refused: int
    """Drafts that the gate refused to publish."""
    compute_share: float
    """Measured share of the machine's processor time."""
    loss: float
    """Running mean of the total training loss; 0 before the learner's first step."""
    champion_score: float
    """Expected accepted length of the served draft (champion) at the learner's last trial; 0 before the first."""
    challenger_score: float
    """The same for the candidate draft (challenger)."""
    num_shifts: int
    """Shifts of traffic detected."""
    rate_factor: float
    """Factor on the base learning rate; 0 until the learner has written it."""
    explore_share: float
    """Share of rounds with proposals in which the server should explore."""
    last_shift: str = text(128)
    """The last shift, as text."""
    domains: str = text(1024)
    """Domains of the latest requests, each with its share and how much is left to learn of it, as text."""
    version: str = text(256)
    """The checkpoint version that its weights started from or were last published as."""
    activity: str = text(128)
    """Current activity, as text."""
    error: str = text(1024)
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


def _exists(pid: int) -> bool:
    """True if the process runs; False also for a zombie, which has ended and not been waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
