"""The status page: counters, gauges, heartbeat and texts that the engine worker writes.

One writer (the engine worker), any number of readers (HTTP routes, the main process, the learner, `aurora-lit
status`). Leaves out the page's mechanics (ipc/page.py), what the numbers are exported as (metrics.py,
serve/http/status.py) and who decides that a worker is dead (serve/http/worker_client.py).

Lifecycle: the main process creates the file, the worker opens it writable, the others open it to read.

    block = StatusBlock.create(folder / STATUS_NAME)
    StatusBlock.open(folder / STATUS_NAME, writable=True).write(running=3)     # in the worker
    block.read().running                                                       # 3
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from aurora_lit.ipc.page import Page, counts, heartbeat_age_s, text
from aurora_lit.settings import MOST_PROPOSED

STATUS_NAME = "status"
"""The page's file in the run folder."""


class WorkerState(IntEnum):
    """Where the engine worker is in its life."""

    STARTING = 0
    READY = 1
    FAILED = 2
    """It gave up; `error` says why."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One consistent reading of the page."""

    heartbeat_ns: int
    """time.monotonic_ns() of the worker's last sign of life."""
    state: WorkerState
    worker_pid: int
    """0 before the worker came up."""
    started_ns: int
    """time.monotonic_ns() when the worker became ready."""
    max_seq_len: int
    vocab_size: int
    max_draft_tokens: int
    """Most tokens that a round accepts for a request: drafted or copied ones."""
    running: int
    waiting: int
    rounds: int
    round_p50_us: int
    """Of the last rounds that swapped no draft, in microseconds; 0 before the first."""
    round_p99_us: int
    swap_round_p99_us: int
    """The same of the rounds that swapped one."""
    prompt_tokens: int
    cached_tokens: int
    """Those of prompt_tokens that a slot still held, so that they were not computed."""
    generated_tokens: int
    drafts: int
    """Request-rounds in which at least one token was proposed."""
    proposed: int
    accepted: int
    accepted_by_position: tuple[int, ...] = counts(MOST_PROPOSED)
    """How often the token proposed at this position was accepted; max_draft_tokens entries."""
    swaps: int
    """Drafts that were swapped in since the start."""
    refusals: int
    """Drafts that could not be served."""
    rollbacks: int
    """Drafts taken back because they accepted less."""
    opted_out: int
    """Requests that asked not to be stored."""
    unrecorded: int
    """Traces that trace.record had no room or no time for. The ring counts for itself (ipc/ring.py)."""
    draft_version: str = text(256)
    refused_version: str = text(256)
    """The last draft that could not be served; empty: none."""
    refused_reason: str = text(1024)
    rolled_back_version: str = text(256)
    """The last draft that was taken back; empty: none."""
    rolled_back_reason: str = text(512)
    error: str = text(1024)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker's last sign of life."""
        return heartbeat_age_s(self)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed draft tokens; None before the first proposal."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted by a round that had a draft, bonus token included; None before the first."""
        return 1 + self.accepted / self.drafts if self.drafts else None


class StatusBlock(Page[Status]):
    """The page of the engine worker."""

    kind = Status

    def read(self) -> Status:
        """A consistent reading."""
        now = super().read()
        return replace(now, accepted_by_position=now.accepted_by_position[: now.max_draft_tokens])
