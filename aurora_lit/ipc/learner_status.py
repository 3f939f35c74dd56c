"""The learner's page: what it does and has done, for HTTP, `aurora-lit status` and whoever restarts it.

The server creates the file in its run folder; a learner opens it writable when it attaches, beats at least once a
second while it lives, and leaves with `write(pid=0)`. Whether it still lives is judged by readers, from the heartbeat.
Leaves out the page's mechanics (ipc/page.py) and learning.

    block = LearnerBlock.open(run_folder / LEARNER_STATUS_NAME, writable=True)
    block.write(pid=os.getpid(), started_ns=time.monotonic_ns(), activity="reading traces")
    block.beat()
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
"""Silence after which a learner whose process still exists counts as stalled."""


@dataclass(frozen=True, kw_only=True)
class LearnerStatus:
    """One consistent reading of the page. Counters go on across restarts of the learner where it resumes them."""

    heartbeat_ns: int
    """time.monotonic_ns() of the learner's last sign of life; 0: no learner has come yet."""
    pid: int
    """0: none has come, or the last one left in order."""
    started_ns: int
    """time.monotonic_ns() when it attached."""
    restarts: int
    """Written by the server: how often it had to start its learner again."""
    steps: int
    """Optimiser steps."""
    positions: int
    """Token positions learned from."""
    records: int
    """Traces read from the ring."""
    skipped: int
    """Traces that could not be used: torn, overwritten, malformed."""
    stale: int
    """Traces of drafts older than learn.max_staleness versions: supervised loss only."""
    looping: int
    """Traces left out because their answer loops."""
    over_client_share: int
    """Times that a client's traces had to wait because it filled its share of a batch."""
    labels_dropped: int
    """Traces whose client's label was not kept: too many labels, or a name of ours."""
    tokens_entered: int
    """Tokens that came into the draft's vocabulary because traffic uses them."""
    lag_records: int
    """Traces in the ring and not yet read."""
    lag_bytes: int
    busy_threads: int
    """CPU threads that it computes with just now; 0 while it rests."""
    published: int
    """Drafts published."""
    gate_refused: int
    """Drafts that the gate held back."""
    compute_share: float
    """Share of the machine's processor time used, as measured."""
    loss: float
    """Running mean of the total loss."""
    champion_score: float
    """Expected accepted length of the served draft at the last gate."""
    challenger_score: float
    """The same of the draft that wanted to replace it."""
    vocabulary_coverage: float
    """Share of traffic's tokens that the learner's draft can propose, at the last trial; 0 before."""
    num_shifts: int
    """Shifts of traffic noticed."""
    warm_starts: int
    """Times that learning went on from the draft kept of a domain that came back."""
    rate_factor: float
    """What the base learning rate is multiplied by."""
    explore_share: float
    """Share of drafted rounds that it wants to explore."""
    explore_temperature: float
    """Draft temperature of those rounds."""
    entropy_weight: float
    """Weight of the draft's entropy in the loss."""
    replay_share: float
    """Share of a batch that comes from the reservoir."""
    last_shift: str = text(128)
    """The last shift, in words."""
    domains: str = text(1024)
    """Domains of the latest requests, their shares and what is left to learn of each, in words."""
    version: str = text(256)
    """The version its weights started from or were last published as."""
    activity: str = text(128)
    """What it is doing, in words."""
    error: str = text(1024)
    """Why the last one ended, when it did not leave in order."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the learner's last sign of life."""
        return heartbeat_age_s(self)

    @property
    def state(self) -> Literal["absent", "running", "stalled", "dead"]:
        """absent: none has come, or it left in order; stalled: it exists but is silent; dead: it ended otherwise."""
        if self.pid == 0:
            return "absent"
        if not _exists(self.pid):
            return "dead"
        return "running" if self.heartbeat_age_s <= STALLED_AFTER_S else "stalled"


class LearnerBlock(Page[LearnerStatus]):
    """The page of the learner."""

    kind = LearnerStatus

    @contextlib.contextmanager
    def computing(self, threads: int) -> Iterator[None]:
        """Say meanwhile that so many CPU threads are busy, so that the server leaves their cores alone."""
        self.write(busy_threads=threads)
        try:
            yield
        finally:
            self.write(busy_threads=0)


def _exists(pid: int) -> bool:
    """Whether the process is there; one that has ended and waits for its parent to notice is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
