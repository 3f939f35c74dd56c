"""The metrics of GET /metrics, under vLLM's names where vLLM has one and `aurora_` names otherwise.

Counters of engine, ring and learner are read from their pages when scraped; latencies are observed in the HTTP process,
of which there is one. Leaves out the JSON status page (serve/http/status.py).

    metrics = ServerMetrics(model="SmolLM2", status=page, learner=learner_page, ring=lambda: None)
    metrics.first_token.observe(0.2)
    metrics.render()                   # bytes in Prometheus' text format
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aurora_lit.drafts.versions import version_number
from aurora_lit.ipc.engine_status import HEARTBEAT_STALE_S, DomainTotals, EngineStatusPage, WorkerState
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.ipc.ring import RingCounters
from aurora_lit.request import TOKEN_SOURCES
from aurora_lit.settings import PLANS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
_USUAL_REFUSALS = (400, 429, 500, 503)
"""Exported from the start, as 0: of a counter that begins with its first burst, Prometheus sees no increase."""

_FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_BETWEEN_TOKENS_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_REQUEST_BUCKETS_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(
        self,
        *,
        model: str,
        status: EngineStatusPage,
        learner: LearnerStatusPage,
        ring: Callable[[], RingCounters | None],
    ) -> None:
        """Register all metrics. model: becomes the label model_name of every sample."""
        self._registry = CollectorRegistry()
        self._histograms: dict[str, Histogram] = {}
        labels = {"model_name": model, "engine": "0"}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, tuple(labels), buckets=buckets, registry=self._registry)
            self._histograms[name.removeprefix("vllm:").removesuffix("_seconds")] = family
            return family.labels(**labels)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From accepting a request to its first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds",
            "Time between tokens; those that arrive together share the time since the last ones evenly.",
            _BETWEEN_TOKENS_BUCKETS_S,
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds", "From accepting a request to its last token.", _REQUEST_BUCKETS_S
        )
        finished = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason.",
            (*labels, "finished_reason"),
            registry=self._registry,
        )
        self._finished = {reason: finished.labels(**labels, finished_reason=reason) for reason in FINISH_REASONS}
        self._refused = Counter(
            "aurora_requests_refused",
            "Requests that got an error response, by HTTP status.",
            (*labels, "status"),
            registry=self._registry,
        )
        for http_status in _USUAL_REFUSALS:
            self._refused.labels(**labels, status=str(http_status))
        self._labels = labels
        self._registry.register(_EngineCollector(status, labels))
        self._registry.register(LearnerCollector(learner, ring, labels))

    def finish(self, reason: str) -> None:
        """Count one sequence that ended. reason: one of FINISH_REASONS."""
        self._finished[reason].inc()

    def refuse(self, http_status: int) -> None:
        """Count one request that got an error response."""
        self._refused.labels(**self._labels, status=str(http_status)).inc()

    def latencies(self) -> dict[str, tuple[float, int]]:
        """Of each histogram the sum of its observations in seconds, and their number."""
        found = {}
        for name, family in self._histograms.items():
            values = {s.name.rpartition("_")[2]: s.value for metric in family.collect() for s in metric.samples}
            found[name] = (round(values["sum"], 4), int(values["count"]))
        return found

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


Numbers = Mapping[str, tuple[str, float | None]]
"""Name → (help text, number). None: unknown now, so left out."""


class _EngineCollector(Collector):
    """Turns one reading of the engine's status page into samples."""

    def __init__(self, status: EngineStatusPage, labels: dict[str, str]) -> None:
        self._status, self._labels = status, labels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        status = self._status.read()
        counters = {
            "vllm:prompt_tokens": ("Prompt tokens processed.", status.prompt_tokens),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", status.looked_up_tokens),
            "vllm:prefix_cache_hits": ("Prompt tokens found there, so not computed.", status.cached_tokens),
            "vllm:generation_tokens": ("Tokens generated.", status.generated_tokens),
            "vllm:spec_decode_num_drafts": ("Rounds of a sequence with proposals.", status.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Draft tokens proposed; of a tree, all nodes.", status.proposed),
            "vllm:spec_decode_num_accepted_tokens": ("Draft tokens accepted.", status.accepted),
            "aurora_round_seconds": ("Time of rounds without prompt tokens.", status.round_us / 1e6),
            "aurora_predicted_round_seconds": (
                "What their passes of the target were expected to take, and what drafting took.",
                status.predicted_round_us / 1e6,
            ),
            "aurora_compared_seconds": (
                "Time of rounds that can be compared with plain ones.",
                status.compared_us / 1e6,
            ),
            "aurora_compared_plain_seconds": (
                "What their tokens would have taken in plain rounds.",
                status.compared_plain_us / 1e6,
            ),
            "aurora_memory_answers": ("Answers that the traffic memory has remembered.", status.memory_answers),
            "aurora_memory_look_ups": ("Searches of it for a sequence's last tokens.", status.memory_look_ups),
            "aurora_memory_hits": ("Those that found something likely enough.", status.memory_hits),
            "aurora_memory_proposed_tokens": ("Tokens that it alone proposed.", status.memory_proposed),
            "aurora_memory_accepted_tokens": ("Those that were accepted.", status.memory_accepted),
            "aurora_memory_evicted_tokens": ("Tokens forgotten to make room.", status.memory_evicted),
            "aurora_draft_swaps": ("Drafts swapped in.", status.swaps),
            "aurora_draft_refusals": ("Drafts that could not be served.", status.refusals),
            "aurora_draft_rollbacks": (
                "Drafts rolled back because fewer of their tokens were accepted.",
                status.rollbacks,
            ),
            "aurora_traces_opted_out": ("Sequences with store: false, so without a trace.", status.opted_out),
            "aurora_traces_unrecorded": ("Traces that could not be written to trace.record.", status.unrecorded),
        }
        yield from _families(CounterMetricFamily, counters, self._labels)
        yield _by_label(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by position.",
            "position",
            {str(position): count for position, count in enumerate(status.accepted_by_position)},
            self._labels,
        )
        yield _by_label(
            "aurora_rounds",
            "Rounds in which a sequence decoded, by what was proposed.",
            "plan",
            dict(zip(PLANS, status.rounds_by_plan, strict=True)),
            self._labels,
        )
        yield _by_label(
            "aurora_generated_tokens",
            "Tokens generated, by where they came from.",
            "source",
            dict(zip(TOKEN_SOURCES, status.generated_by_source, strict=True)),
            self._labels,
        )
        gauges = {
            "vllm:num_requests_running": ("Sequences that hold a slot.", status.running),
            "vllm:num_requests_waiting": ("Sequences that wait for a slot.", status.waiting),
            "aurora_worker_ready": (
                "1 while the engine worker is ready and shows a heartbeat.",
                int(status.state is WorkerState.READY and status.heartbeat_age_s <= HEARTBEAT_STALE_S),
            ),
            "aurora_worker_heartbeat_age_seconds": (
                "Seconds since the worker's last heartbeat.",
                status.heartbeat_age_s,
            ),
            "aurora_mean_accepted_length": (
                "Tokens emitted per sequence and round with proposals.",
                status.mean_accepted_length,
            ),
            "aurora_acceptance_rate": ("Accepted / proposed draft tokens.", status.acceptance_rate),
            "aurora_memory_tokens": ("Tokens that the traffic memory holds.", status.memory_tokens),
            "aurora_memory_capacity_tokens": ("Tokens that it can hold.", status.memory_capacity),
            "aurora_draft_version": (
                "Number of the serving draft version; 0: the starting draft.",
                version_number(status.draft_version),
            ),
            "aurora_domains_version": (
                "Number of the publication that requests are assigned domains by; 0: there is none.",
                status.domains_version,
            ),
        }
        yield from _families(GaugeMetricFamily, gauges, self._labels)
        yield from _by_domain(status.domains, self._labels)


class LearnerCollector(Collector):
    """Turns one reading of the ring and of the learner's page into samples."""

    def __init__(
        self, learner: LearnerStatusPage, ring: Callable[[], RingCounters | None], labels: dict[str, str]
    ) -> None:
        """labels: of every sample."""
        self._learner, self._ring, self._labels = learner, ring, labels

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry then collects nothing when this is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The samples of now."""
        learner, ring = self._learner.read(), self._ring()
        is_running = learner.state == "running"
        yield from _families(
            CounterMetricFamily,
            {
                "aurora_learner_restarts": ("Restarts of the learner.", learner.restarts),
                # A learner goes on from its saved state. After a kill that is less than the server before had exported,
                # and Prometheus counts the whole of a counter that has fallen as new.
                "aurora_learner_steps": (
                    "Optimiser steps since the server started.",
                    learner.steps - learner.steps_before,
                ),
                "aurora_learner_positions": (
                    "Token positions learned from since the server started.",
                    learner.positions - learner.positions_before,
                ),
                "aurora_learner_traces": ("Traces read.", learner.records),
                "aurora_learner_traces_skipped": ("Traces that could not be used.", learner.skipped),
                "aurora_learner_published": ("Drafts published.", learner.published),
                "aurora_learner_gate_refused": ("Drafts that the gate refused to publish.", learner.gate_refused),
            },
            self._labels,
        )
        yield from _families(
            GaugeMetricFamily,
            {
                "aurora_learner_running": ("1 while a learner runs.", int(is_running)),
                "aurora_learner_failing": (
                    "1 while something fails in it, such as saving, or after it ended by a fault.",
                    int(bool(learner.error)),
                ),
                "aurora_learner_heartbeat_age_seconds": (
                    "Seconds since the learner's last heartbeat.",
                    learner.heartbeat_age_s if learner.pid else None,
                ),
                "aurora_learner_compute_share": (
                    "Measured share of processor time.",
                    learner.compute_share if is_running else None,
                ),
                # 0: it has not taken a step yet.
                "aurora_learner_loss": ("Running mean of the loss.", (learner.loss or None) if is_running else None),
            },
            self._labels,
        )
        if ring is None:
            return
        yield from _families(
            CounterMetricFamily, {"aurora_traces_pushed": ("Traces written to the ring.", ring.pushed)}, self._labels
        )
        yield _by_label(
            "aurora_traces_dropped",
            "Traces lost in the ring, by cause.",
            "cause",
            {cause: getattr(ring, cause) for cause in ("overwritten", "too_large", "torn")},
            self._labels,
        )
        yield from _families(
            GaugeMetricFamily,
            {
                "aurora_traces_queued": ("Traces in the ring that are not read yet.", ring.queued_records),
                "aurora_traces_queued_bytes": ("Bytes in the ring that are not read yet.", ring.queued_bytes),
            },
            self._labels,
        )


def _families(
    kind: type[CounterMetricFamily | GaugeMetricFamily], numbers: Numbers, labels: dict[str, str]
) -> Iterable[Metric]:
    """One family for each number."""
    for name, (text, number) in numbers.items():
        if number is not None:
            family = kind(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), number)
            yield family


def _by_domain(domains: Mapping[str, DomainTotals], labels: dict[str, str]) -> Iterable[Metric]:
    """One counter for each field of DomainTotals, with a sample for each domain; and the mean accepted lengths."""
    for field, text in {
        "requests": "Sequences whose answer has begun, by domain.",
        "generated_tokens": "Tokens generated, by domain.",
        "drafts": "Rounds of a sequence with proposals, by domain.",
        "proposed": "Tokens proposed, by domain; of a tree, all nodes.",
        "accepted": "Proposed tokens that were accepted, by domain.",
    }.items():
        counts = {name: getattr(totals, field) for name, totals in domains.items()}
        yield _by_label(f"aurora_domain_{field}", text, "domain", counts, labels)
    lengths = GaugeMetricFamily(
        "aurora_domain_mean_accepted_length",
        "Tokens emitted per sequence and round with proposals, by domain.",
        labels=[*labels, "domain"],
    )
    for name, totals in domains.items():
        if totals.mean_accepted_length is not None:
            lengths.add_metric([*labels.values(), name], totals.mean_accepted_length)
    yield lengths


def _by_label(name: str, text: str, label: str, counts: Mapping[str, int], labels: dict[str, str]) -> Metric:
    """One counter with a sample for each value of another label."""
    family = CounterMetricFamily(name, text, labels=[*labels, label])
    for value, count in counts.items():
        family.add_metric([*labels.values(), value], count)
    return family
