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

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from aurora_lit.ipc.page import Page, counter, counters, gauge, heartbeat_age_s, text
from aurora_lit.request import MAX_DOMAIN_CHARACTERS, PLANS, Source
from aurora_lit.settings import MAX_DOMAINS, MAX_PROPOSAL_LENGTH

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


class TrafficTotals(NamedTuple):
    """What requests of one domain or kind came to since the start."""

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


@dataclass(kw_only=True)
class EngineCounters:
    """What an engine counts since it was created.

    A counter is declared here and counted in the engine; the status page, metrics and reports follow.
    """

    prompt_tokens: int = counter("vllm:prompt_tokens", "Prompt tokens processed.", report="tokens.prompt")
    looked_up_tokens: int = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
    """Those of prompt_tokens whose prompts were looked for in the slots; 0 beside vLLM."""
    cached_tokens: int = counter(
        "vllm:prefix_cache_hits", "Prompt tokens found there, so not computed.", report="tokens.cached"
    )
    generated_tokens: int = counter("vllm:generation_tokens", "Tokens generated.", report="tokens.generated")
    rounds: int = counter(report="speculation.rounds")
    """In which a sequence decoded."""
    rounds_by_plan: list[int] = counters(
        len(PLANS),
        "aurora_rounds",
        "Rounds in which a sequence decoded, by what was proposed.",
        label="plan",
        values=PLANS,
        report="speculation.rounds_by_plan",
    )
    round_us: int = counter("aurora_round_seconds", "Time of rounds without prompt tokens.", per=1e6)
    predicted_round_us: int = counter(
        "aurora_predicted_round_seconds",
        "What their passes of the target were expected to take, and what drafting took.",
        per=1e6,
    )
    """As expected when they were planned."""
    drafts: int = counter(
        "vllm:spec_decode_num_drafts", "Rounds of a sequence with proposals.", report="speculation.drafts"
    )
    """From any source."""
    proposed: int = counter(
        "vllm:spec_decode_num_draft_tokens",
        "Draft tokens proposed; of a tree, all nodes.",
        report="speculation.proposed",
    )
    accepted: int = counter(
        "vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", report="speculation.accepted"
    )
    accepted_by_position: list[int] = counters(
        MAX_PROPOSAL_LENGTH,
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Accepted draft tokens by position.",
        label="position",
        report="speculation.accepted_by_position",
    )
    generated_by_source: list[int] = counters(
        len(Source),
        "aurora_generated_tokens",
        "Tokens generated, by where they came from.",
        label="source",
        values=tuple(source.label for source in Source),
        report="speculation.generated_by_source",
    )
    compared_us: int = counter(
        "aurora_compared_seconds",
        "Time of rounds that can be compared with plain ones.",
        per=1e6,
        report="speculation.against_plain.seconds",
    )
    """Those without prompt tokens and without tokens that a grammar forced, of kinds whose plain rounds have been timed
    (serve/speculation/floor.py)."""
    compared_plain_us: int = counter(
        "aurora_compared_plain_seconds",
        "What their tokens would have taken in plain rounds.",
        per=1e6,
        report="speculation.against_plain.plain_seconds",
    )
    """Of as many sequences."""
    memory_answers: int = counter(
        "aurora_memory_answers", "Answers that the traffic memory has remembered.", report="memory.answers"
    )
    memory_look_ups: int = counter(
        "aurora_memory_look_ups", "Searches of it for a sequence's last tokens.", report="memory.look_ups"
    )
    """Rounds of single sequences that could read it."""
    memory_hits: int = counter("aurora_memory_hits", "Those that found something likely enough.", report="memory.hits")
    memory_proposed: int = counter(
        "aurora_memory_proposed_tokens", "Tokens that it alone proposed.", report="memory.proposed"
    )
    memory_accepted: int = counter(
        "aurora_memory_accepted_tokens", "Those that were accepted.", report="memory.accepted"
    )

    def count_round(self, plan: str) -> None:
        """Add a round in which a sequence decoded; `plan`: one of PLANS."""
        self.rounds += 1
        self.rounds_by_plan[PLANS.index(plan)] += 1

    def count(
        self,
        *,
        generated: int,
        proposed: int,
        accepted_from: Sequence[Source],
        remembered: int = 0,
    ) -> None:
        """Add a round of one sequence. `accepted_from`: as in `Output`; `remembered`: proposed by the memory alone."""
        accepted = len(accepted_from)
        self.generated_tokens += generated
        self.generated_by_source[Source.TARGET] += generated - accepted
        self.drafts += proposed > 0
        self.proposed += proposed
        self.accepted += accepted
        self.memory_proposed += remembered
        for position, source in enumerate(accepted_from):
            self.accepted_by_position[position] += 1
            self.generated_by_source[source] += 1
            self.memory_accepted += source is Source.MEMORY


@dataclass(kw_only=True)
class EngineStatus(EngineCounters):
    """One consistent reading of the engine worker's page."""

    heartbeat_ns: int
    """time.monotonic_ns() of the worker's last heartbeat."""
    state: WorkerState
    worker_pid: int
    """0 before the worker has started."""
    started_ns: int
    """time.monotonic_ns() when the worker became ready."""
    num_slots: int
    """Most requests that run together."""
    running: int = gauge("vllm:num_requests_running", "Sequences that hold a slot.", report="queue.running")
    waiting: int = gauge("vllm:num_requests_waiting", "Sequences that wait for a slot.", report="queue.waiting")
    max_seq_len: int = gauge(report="limits.max_seq_len")
    vocab_size: int = gauge(report="limits.vocab_size")
    max_draft_tokens: int = gauge(report="speculation.max_draft_tokens")
    """Most tokens that a round can accept for a sequence, from any source; so many entries accepted_by_position has."""
    round_p50_us: int = gauge(report="round_ms.p50", per=1e3)
    """Median of the last rounds that swapped no draft, in microseconds; 0 before the first."""
    round_p99_us: int = gauge(report="round_ms.p99", per=1e3)
    swap_round_p99_us: int
    """The same for rounds that swapped a draft."""
    prefix_bytes: int = gauge(
        "aurora_prefix_cache_bytes", "Size of what is kept of prompts without a slot.", report="prefix_cache.bytes"
    )
    """Keys, values and states (serve/engine/prefix_cache.py); 0 beside vLLM."""
    memory_capacity: int = gauge(
        "aurora_memory_capacity_tokens", "Tokens that it can hold.", report="memory.capacity_tokens"
    )
    """Of the traffic memory; 0: there is none."""
    memory_tokens: int = gauge("aurora_memory_tokens", "Tokens that the traffic memory holds.", report="memory.tokens")
    memory_evicted: int = counter(
        "aurora_memory_evicted_tokens", "Tokens forgotten to make room.", report="memory.evicted_tokens"
    )
    draft_version: str = text(256, report="draft.version")
    draft_gain: str = text(256, report="draft.gain")
    """What the last swap brought (serve/worker/swap_gain.py); empty: not known yet, or beside vLLM."""
    swaps: int = counter("aurora_draft_swaps", "Drafts swapped in.", report="draft.swaps")
    refusals: int = counter("aurora_draft_refusals", "Drafts that could not be served.", report="draft.refusals")
    rollbacks: int = counter(
        "aurora_draft_rollbacks",
        "Drafts rolled back because fewer of their tokens were accepted.",
        report="draft.rollbacks",
    )
    refused_version: str = text(256)
    """The last draft that was refused; empty: none."""
    refused_reason: str = text(1024)
    rolled_back_version: str = text(256)
    """The last draft that was rolled back; empty: none."""
    rolled_back_reason: str = text(512)
    alarms: int = counter(
        "aurora_draft_alarms",
        "Drafts that serve on although fewer of their tokens were accepted for one client alone.",
        report="draft.alarms",
    )
    alarm_version: str = text(256)
    """The last of them; empty: none."""
    alarm_reason: str = text(512)
    domains_version: int = gauge(
        "aurora_domains_version", "Number of the publication that requests are assigned domains by; 0: there is none."
    )
    domain_numbers: list[int] = counters(_MAX_DOMAIN_ROWS * len(TrafficTotals._fields))
    """The fields of TrafficTotals for each of `domain_names`, one row after the other."""
    domain_names: str = text(_MAX_DOMAIN_ROWS * _MAX_NAME_BYTES // 8 * 8)
    """Domains that requests were served as, one a line."""
    domains_refused: str = text(1024, report="domains.refused")
    """Why the newest publication of domains is not used; empty: it is, or there is none."""
    opted_out: int = counter(
        "aurora_traces_opted_out", "Sequences with store: false, so without a trace.", report="traces.opted_out"
    )
    unrecorded: int = counter(
        "aurora_traces_unrecorded", "Traces that could not be written to trace.record.", report="traces.unrecorded"
    )
    """Beside vLLM, requests that were not recorded since traces held all the memory or too many were unread. The ring
    has its own counters (ipc/ring.py)."""
    error: str = text(1024, report="worker.error")

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
    def saved_s(self) -> float:
        """Seconds that speculation has saved against plain rounds; negative: lost. docs/metrics.md has the formula."""
        return (self.compared_plain_us - self.compared_us) / 1e6

    @property
    def domains(self) -> dict[str, TrafficTotals]:
        """What was served, by domain."""
        names, width = self.domain_names.splitlines(), len(TrafficTotals._fields)
        rows = (self.domain_numbers[width * index : width * (index + 1)] for index in range(len(names)))
        return {name: TrafficTotals(*row) for name, row in zip(names, rows, strict=True)}


class EngineStatusPage(Page[EngineStatus]):
    """The engine worker's page."""

    record_class = EngineStatus

    def read(self) -> EngineStatus:
        """A consistent reading."""
        now = super().read()
        del now.accepted_by_position[now.max_draft_tokens :]
        return now


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
