"""The status pages of the engine's processes: one of the engine worker, one of each further rank of a sharded target.

Each page has one writer and any number of readers (HTTP routes, the main process, the learner, `aurora-lit status`).
Leaves out how a page works (ipc/page.py), how the numbers are shown (serve/http/metrics.py, serve/http/status.py) and
who decides that a process is dead (serve/http/worker_client.py, serve/ranks.py).

Lifecycle: the main process creates the file, the worker opens it writable, the others open it to read.

    page = EngineStatusPage.create(folder / STATUS_NAME)
    EngineStatusPage.open(folder / STATUS_NAME, writable=True).write(running=3)     # in the worker
    page.read().running                                                             # 3
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from aurora_lit.ipc.page import Page, counts, heartbeat_age_s, text
from aurora_lit.request import MAX_DOMAIN_CHARACTERS, TOKEN_SOURCES
from aurora_lit.settings import MAX_DOMAINS, MAX_PROPOSAL_LENGTH, PLANS

STATUS_NAME = "status"
"""The engine worker's page in the run folder."""
HEARTBEAT_STALE_S = 10.0
"""A worker whose last heartbeat is older hangs or is dead, whatever its page says: only the worker writes the state."""
_RANK_PREFIX = "rank-"
UNKNOWN_DOMAIN, OTHER_DOMAINS = "unknown", "other"
"""Names under which requests without a domain are counted, and those whose domain has no row of its own."""
MAX_LABELS = 16
"""Labels of clients that are counted apart."""
_MAX_DOMAIN_ROWS = MAX_LABELS + MAX_DOMAINS + 2
_MAX_NAME_BYTES = 4 * MAX_DOMAIN_CHARACTERS + 1  # UTF-8, and a line break after it


class WorkerState(IntEnum):
    """State of the engine worker."""

    STARTING = 0
    READY = 1
    FAILED = 2
    """It ended with an error; `error` holds the reason."""


class DomainTotals(NamedTuple):
    """What requests of one domain came to since the start."""

    requests: int
    """Whose answer has begun."""
    generated_tokens: int
    drafts: int
    """Rounds of a sequence with proposals."""
    proposed: int
    accepted: int

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed tokens; None before the first proposal."""
        return _ratio(self.accepted, self.proposed)

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted per sequence and round with proposals, bonus token included; None before the first."""
        return _ratio(self.drafts + self.accepted, self.drafts)


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """One consistent reading of the engine worker's page."""

    heartbeat_ns: int
    """time.monotonic_ns() of the worker's last heartbeat."""
    state: WorkerState
    worker_pid: int
    """0 before the worker has started."""
    started_ns: int
    """time.monotonic_ns() when the worker became ready."""
    max_seq_len: int
    vocab_size: int
    max_draft_tokens: int
    """Most tokens that a round can accept for a sequence, from any source."""
    num_slots: int
    """Most requests that run together."""
    running: int
    waiting: int
    rounds: int
    """In which a sequence decoded."""
    rounds_by_plan: tuple[int, ...] = counts(len(PLANS))
    """These by what was proposed, in the order of settings.PLANS."""
    round_us: int
    """What those without prompt tokens took, in microseconds."""
    predicted_round_us: int
    """What their passes of the target were expected to take when they were planned, and what drafting took."""
    round_p50_us: int
    """Median of the last rounds that swapped no draft, in microseconds; 0 before the first."""
    round_p99_us: int
    swap_round_p99_us: int
    """The same for rounds that swapped a draft."""
    prompt_tokens: int
    looked_up_tokens: int
    """The part of prompt_tokens whose prompts were looked for in the prefix cache; 0 beside vLLM."""
    cached_tokens: int
    """The part of prompt_tokens found in the KV cache of a slot, so not computed again."""
    generated_tokens: int
    drafts: int
    """How often at least one token was proposed for a sequence in a round."""
    proposed: int
    accepted: int
    accepted_by_position: tuple[int, ...] = counts(MAX_PROPOSAL_LENGTH)
    """How often the token proposed at each position was accepted; max_draft_tokens entries."""
    generated_by_source: tuple[int, ...] = counts(len(TOKEN_SOURCES))
    """generated_tokens by where they came from, in the order of request.TOKEN_SOURCES."""
    compared_us: int
    """What rounds took that can be compared with plain ones, in microseconds: those without prompt tokens and
    without tokens that a grammar forced, of kinds whose plain rounds have been timed."""
    compared_plain_us: int
    """What their tokens would have taken in plain rounds of as many sequences."""
    memory_capacity: int
    """Tokens that the traffic memory can hold; 0: there is none."""
    memory_tokens: int
    """Tokens that it holds."""
    memory_evicted: int
    """Tokens that it has forgotten to make room."""
    memory_answers: int
    """Answers that it has remembered."""
    memory_look_ups: int
    """How often a sequence's last tokens were searched for in it."""
    memory_hits: int
    """How often it held something likely enough to be proposed."""
    memory_proposed: int
    """Tokens that it alone proposed."""
    memory_accepted: int
    swaps: int
    """Drafts swapped in since the start."""
    refusals: int
    """Drafts refused because they could not be served."""
    rollbacks: int
    """Drafts rolled back because fewer of their tokens were accepted."""
    opted_out: int
    """Requests with `store: false`, of which no trace is made."""
    unrecorded: int
    """Traces that could not be written to the folder trace.record; beside vLLM, requests that were not recorded since
    traces held all the memory or too many were unread. The ring has its own counters (ipc/ring.py)."""
    domains_version: int
    """Number of the publication that requests are assigned domains by; 0: there is none."""
    domain_numbers: tuple[int, ...] = counts(_MAX_DOMAIN_ROWS * len(DomainTotals._fields))
    """The fields of DomainTotals for each of `domain_names`, one row after the other."""
    domain_names: str = text(_MAX_DOMAIN_ROWS * _MAX_NAME_BYTES // 8 * 8)
    """Domains that requests were served as, one a line."""
    domains_refused: str = text(1024)
    """Why the newest publication of domains is not used; empty: it is, or there is none."""
    draft_version: str = text(256)
    refused_version: str = text(256)
    """The last draft that was refused; empty: none."""
    refused_reason: str = text(1024)
    rolled_back_version: str = text(256)
    """The last draft that was rolled back; empty: none."""
    rolled_back_reason: str = text(512)
    error: str = text(1024)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker's last heartbeat."""
        return heartbeat_age_s(self)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed draft tokens; None before the first proposal."""
        return _ratio(self.accepted, self.proposed)

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted per sequence and round with proposals, bonus token included; None before the first."""
        return _ratio(self.drafts + self.accepted, self.drafts)

    @property
    def domains(self) -> dict[str, DomainTotals]:
        """What was served, by domain."""
        names, width = self.domain_names.splitlines(), len(DomainTotals._fields)
        rows = (self.domain_numbers[width * index : width * (index + 1)] for index in range(len(names)))
        return {name: DomainTotals(*row) for name, row in zip(names, rows, strict=True)}


class EngineStatusPage(Page[EngineStatus]):
    """The engine worker's page."""

    record_class = EngineStatus

    def read(self) -> EngineStatus:
        """A consistent reading."""
        now = super().read()
        return replace(now, accepted_by_position=now.accepted_by_position[: now.max_draft_tokens])


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One consistent reading of the page of rank 1, 2, …: a process that holds a part of a sharded target."""

    heartbeat_ns: int
    """time.monotonic_ns() of its last heartbeat; 0 before the first."""
    pid: int
    """0 before it has started."""
    orders: int
    """Orders of rank 0 that it has carried out."""
    num_versions: int
    """Drafts that rank 0 has announced; an order that expects another number is refused."""
    draft_version: str = text(256)
    """The draft that proposes now."""
    error: str = text(1024)
    """The error that ended it; empty while there is none."""


class RankStatusPage(Page[RankStatus]):
    """The page of one rank; written by that rank."""

    record_class = RankStatus


def _ratio(number: int, of: int) -> float | None:
    return number / of if of else None


def rank_path(run_folder: Path, rank: int) -> Path:
    """The file of a rank's page."""
    return run_folder / f"{_RANK_PREFIX}{rank}.status"


def read_ranks(run_folder: Path) -> dict[int, RankStatus]:
    """All rank pages of a server, by rank; empty if the target is not sharded."""
    paths = run_folder.glob(f"{_RANK_PREFIX}*.status")
    numbers = sorted(int(path.stem.removeprefix(_RANK_PREFIX)) for path in paths)
    return {rank: RankStatusPage.open(rank_path(run_folder, rank)).read() for rank in numbers}
