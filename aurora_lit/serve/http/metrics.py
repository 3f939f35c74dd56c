"""The metrics of GET /metrics, under vLLM's names where vLLM has one and `aurora_` names otherwise.

Counters of engine, ring and learner are read from their pages when scraped. Latencies and kinds of requests, which the
engine does not know, are observed in the HTTP process, of which there is one. Leaves out the JSON status page
(serve/http/status.py).

    metrics = ServerMetrics(model="SmolLM2", status=page, learner=learner_page, ring=lambda: None)
    metrics.first_token.observe(0.2)
    metrics.render()                   # bytes in Prometheus' text format
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aurora_lit.drafts.versions import version_number
from aurora_lit.ipc.engine_status import HEARTBEAT_STALE_S, EngineStatusPage, TrafficTotals, WorkerState
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.ipc.page import declared
from aurora_lit.ipc.ring import RingCounters
from aurora_lit.request import RequestKind
from aurora_lit.serve.http.answer_stream import TextDelta

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
        self.kinds: dict[str, TrafficTotals] = {kind: TrafficTotals(0, 0, 0, 0, 0) for kind in get_args(RequestKind)}
        """What requests of each kind came to."""
        self._registry.register(_EngineCollector(status, self.kinds, labels))
        self._registry.register(LearnerCollector(learner, ring, labels))

    def finish(self, reason: str) -> None:
        """Count one sequence that ended. reason: one of FINISH_REASONS."""
        self._finished[reason].inc()

    def count(self, kind: RequestKind, deltas: Sequence[TextDelta], *, begun: int) -> None:
        """Count some rounds' deltas of one call; begun: the sequences whose answer begins with them."""
        before = self.kinds[kind]
        self.kinds[kind] = TrafficTotals(
            requests=before.requests + begun,
            generated_tokens=before.generated_tokens + sum(len(delta.token_ids) for delta in deltas),
            drafts=before.drafts + sum(delta.num_proposed > 0 for delta in deltas),
            proposed=before.proposed + sum(delta.num_proposed for delta in deltas),
            accepted=before.accepted + sum(delta.num_accepted for delta in deltas),
        )

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
    """Turns one reading of the engine's status page into samples; and the counts by kind, which have their form."""

    def __init__(self, status: EngineStatusPage, kinds: Mapping[str, TrafficTotals], labels: dict[str, str]) -> None:
        self._status, self._kinds, self._labels = status, kinds, labels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        status = self._status.read()
        yield from _declared(status, self._labels)
        derived = {
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
            "aurora_saved_seconds": ("Time that speculation has saved against plain rounds.", status.saved_s),
            "aurora_draft_version": (
                "Number of the serving draft version; 0: the starting draft.",
                version_number(status.draft_version),
            ),
        }
        yield from _families(GaugeMetricFamily, derived, self._labels)
        yield from _by_traffic("domain", status.domains, self._labels)
        yield from _by_traffic("kind", self._kinds, self._labels)


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
        yield from _declared(learner, self._labels)
        # A learner goes on from its saved state. After a kill that is less than the server before had exported, and
        # Prometheus counts the whole of a counter that has fallen as new.
        since_start = {
            "aurora_learner_steps": (
                "Optimiser steps since the server started.",
                learner.steps - learner.steps_before,
            ),
            "aurora_learner_positions": (
                "Token positions learned from since the server started.",
                learner.positions - learner.positions_before,
            ),
        }
        yield from _families(CounterMetricFamily, since_start, self._labels)
        derived = {
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
        }
        yield from _families(GaugeMetricFamily, derived, self._labels)
        if ring is not None:
            yield from _declared(ring, self._labels)
            yield _by_label(
                "aurora_traces_dropped", "Traces lost in the ring, by cause.", "cause", ring.dropped, self._labels
            )


def _declared(record: object, labels: dict[str, str]) -> Iterable[Metric]:
    """One family for each field that declares a metric."""
    for how, value in declared(record):
        if not how.metric:
            continue
        if how.label:
            counts = value if how.values else {str(index): count for index, count in enumerate(value)}
            yield _by_label(how.metric, how.help, how.label, counts, labels)
        else:
            kind = GaugeMetricFamily if how.is_gauge else CounterMetricFamily
            yield from _families(kind, {how.metric: (how.help, value)}, labels)


def _families(
    kind: type[CounterMetricFamily | GaugeMetricFamily], numbers: Numbers, labels: dict[str, str]
) -> Iterable[Metric]:
    """One family for each number."""
    for name, (text, number) in numbers.items():
        if number is not None:
            family = kind(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), number)
            yield family


def _by_traffic(label: str, traffic: Mapping[str, TrafficTotals], labels: dict[str, str]) -> Iterable[Metric]:
    """One counter for each field of TrafficTotals, with a sample for each domain or kind; and mean accepted lengths."""
    for field, text in {
        "requests": "Sequences whose answer has begun",
        "generated_tokens": "Tokens generated",
        "drafts": "Rounds of a sequence with proposals",
        "proposed": "Tokens proposed, of a tree all nodes",
        "accepted": "Proposed tokens that were accepted",
    }.items():
        counts = {name: getattr(totals, field) for name, totals in traffic.items()}
        yield _by_label(f"aurora_{label}_{field}", f"{text}, by {label}.", label, counts, labels)
    lengths = GaugeMetricFamily(
        f"aurora_{label}_mean_accepted_length",
        f"Tokens emitted per sequence and round with proposals, by {label}.",
        labels=[*labels, label],
    )
    for name, totals in traffic.items():
        if totals.mean_accepted_length is not None:
            lengths.add_metric([*labels.values(), name], totals.mean_accepted_length)
    yield lengths


def _by_label(name: str, text: str, label: str, counts: Mapping[str, int], labels: dict[str, str]) -> Metric:
    """One counter with a sample for each value of another label."""
    family = CounterMetricFamily(name, text, labels=[*labels, label])
    for value, count in counts.items():
        family.add_metric([*labels.values(), value], count)
    return family
