"""What GET /metrics shows: vLLM's names where vLLM has one, `aurora_` names beside them.

Counters of the engine are read from the status block at scrape time; latencies are observed in the HTTP process, of
which there is one. Leaves out the JSON status page (serve/api.py).

    metrics = ServerMetrics(model="SmolLM2", status=block)
    metrics.first_token.observe(0.2)
    metrics.render()                   # bytes in Prometheus' text format
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aurora_lit.ipc.status import StatusBlock, WorkerState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")

_FIRST_TOKEN_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                          20.0, 40.0, 80.0, 160.0, 640.0)  # fmt: skip
_BETWEEN_TOKENS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
                             0.5, 0.75, 1.0, 2.5, 5.0, 10.0)  # fmt: skip
_REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
                      240.0, 480.0, 960.0)  # fmt: skip


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, *, model: str, status: StatusBlock) -> None:
        """Register everything once; `model` becomes the label model_name on every sample."""
        self._registry = CollectorRegistry()
        labels = {"model_name": model, "engine": "0"}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, tuple(labels), buckets=buckets, registry=self._registry).labels(**labels)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From accepting a request to its first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds",
            "Time between tokens; the tokens of one round share its time evenly.",
            _BETWEEN_TOKENS_BUCKETS_S,
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds", "From accepting a request to its last token.", _REQUEST_BUCKETS_S
        )
        finished = Counter("vllm:request_success", "Sequences that ended, by reason.", (*labels, "finished_reason"),
                           registry=self._registry)  # fmt: skip
        self._finished = {reason: finished.labels(**labels, finished_reason=reason) for reason in FINISH_REASONS}
        self._refused = Counter("aurora_requests_refused", "Requests answered with an error, by HTTP status.",
                                (*labels, "status"), registry=self._registry)  # fmt: skip
        self._labels = labels
        self._registry.register(_EngineCounters(status, labels))

    def finish(self, reason: str) -> None:
        """Count one sequence that ended; reason is one of FINISH_REASONS."""
        self._finished[reason].inc()

    def refuse(self, http_status: int) -> None:
        """Count one request answered with an error."""
        self._refused.labels(**self._labels, status=str(http_status)).inc()

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCounters(Collector):
    """Turns one reading of the status block into samples."""

    def __init__(self, status: StatusBlock, labels: dict[str, str]) -> None:
        self._status, self._labels = status, labels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._status.read()
        names, values = list(self._labels), list(self._labels.values())
        counters = {
            "vllm:prompt_tokens": ("Prompt tokens read.", now.prompt_tokens),
            "vllm:generation_tokens": ("Tokens generated.", now.generated_tokens),
            "vllm:spec_decode_num_drafts": ("Rounds of a request that had a draft.", now.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Draft tokens proposed.", now.proposed),
            "vllm:spec_decode_num_accepted_tokens": ("Draft tokens accepted.", now.accepted),
            "aurora_rounds": ("Engine rounds.", now.rounds),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=names)
            counter.add_metric(values, value)
            yield counter
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by position.",
            labels=[*names, "position"],
        )  # fmt: skip
        for position, count in enumerate(now.accepted_by_position):
            positions.add_metric([*values, str(position)], count)
        yield positions
        gauges = {
            "vllm:num_requests_running": ("Sequences that hold a slot.", now.running),
            "vllm:num_requests_waiting": ("Sequences that wait for a slot.", now.waiting),
            "aurora_worker_ready": ("1 while the engine worker is ready.", int(now.state is WorkerState.READY)),
            "aurora_worker_heartbeat_age_seconds": ("Since the worker's last sign of life.", now.heartbeat_age_s),
            "aurora_mean_accepted_length": ("Tokens a drafted round emits.", now.mean_accepted_length),
            "aurora_acceptance_rate": ("Accepted / proposed draft tokens.", now.acceptance_rate),
        }
        for name, (text, number) in gauges.items():
            if number is not None:
                gauge = GaugeMetricFamily(name, text, labels=names)
                gauge.add_metric(values, number)
                yield gauge
