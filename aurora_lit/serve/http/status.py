"""The status pages as JSON, for GET /v1/aurora/status and `aurora-lit status`. Pure, except for reading the ring.

Leaves out what only the HTTP process knows (serve/http/spec.py) and Prometheus (serve/http/metrics.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora_lit.errors import RingError
from aurora_lit.ipc.engine_status import EngineStatus, TrafficTotals, read_ranks
from aurora_lit.ipc.learner_status import LearnerStatus
from aurora_lit.ipc.page import declared, heartbeat_age_s
from aurora_lit.ipc.ring import RingCounters, read_counters
from aurora_lit.ipc.run_folder import RING_NAME

Json = dict[str, Any]


def ring_counters(run_folder: Path) -> RingCounters | None:
    """The ring's present counters; None if there is no ring."""
    try:
        return read_counters(run_folder / RING_NAME)
    except RingError:
        return None


def engine_json(status: EngineStatus, ring: RingCounters | None) -> Json:
    """The engine worker: state, work, draft, domains and traces."""
    report = _declared(status)
    report["worker"] |= {
        "state": status.state.name.lower(),
        "pid": status.worker_pid,
        "heartbeat_age_s": round(status.heartbeat_age_s, 3),
        "uptime_s": _since(status.started_ns),
    }
    report["round_ms"]["swapping_p99"] = status.swap_round_p99_us / 1e3 or None
    report["speculation"] |= {
        "draft_version": status.draft_version or None,
        "predicted_over_real_time": status.predicted_round_us / status.round_us if status.round_us else None,
        "acceptance_rate": status.acceptance_rate,
        "mean_accepted_length": status.mean_accepted_length,
    }
    speedup = status.compared_plain_us / status.compared_us if status.compared_us else None
    report["speculation"]["against_plain"]["speedup"] = speedup
    report["draft"] |= {
        "refused": _version_event(status.refused_version, status.refused_reason),
        "rolled_back": _version_event(status.rolled_back_version, status.rolled_back_reason),
        "alarm": _version_event(status.alarm_version, status.alarm_reason),
    }
    report["domains"] |= {
        "version": status.domains_version or None,
        "served": traffic_json(status.domains),
    }
    report["traces"]["ring"] = None if ring is None else {**_declared(ring), "dropped": ring.dropped}
    return report


def traffic_json(traffic: Mapping[str, TrafficTotals]) -> Json:
    """What was served, by domain or by kind."""
    return {
        name: {
            **totals._asdict(),
            "acceptance_rate": totals.acceptance_rate,
            "mean_accepted_length": totals.mean_accepted_length,
        }
        for name, totals in traffic.items()
    }


def ranks_json(run_folder: Path) -> list[Json]:
    """Ranks 1, 2, … of a sharded target; empty if it is not sharded."""
    return [
        {
            "rank": rank,
            "pid": status.pid,
            "heartbeat_age_s": round(heartbeat_age_s(status), 3),
            "orders": status.orders,
            "draft_version": status.draft_version or None,
            "error": status.error or None,
        }
        for rank, status in read_ranks(run_folder).items()
    ]


def learner_json(status: LearnerStatus) -> Json:
    """The learner: state, work and last trial. Without a learner, the last one's remain, but for share and loss."""
    is_running = status.state == "running"
    is_alive = is_running or status.state == "stalled"
    report = _declared(status) | {
        "state": status.state,
        "pid": status.pid or None,
        "heartbeat_age_s": round(status.heartbeat_age_s, 3) if is_alive else None,
        "uptime_s": _since(status.started_ns) if is_alive else None,
        "compute_share": _finite(status.compute_share) if is_running else None,
        "loss": _measured(status.loss) if is_running else None,
    }
    report["gate"] |= {
        "champion": _measured(status.champion_score),
        "challenger": _measured(status.challenger_score),
    }
    return report


def _declared(record: object) -> Json:
    """The fields that declare a place in the report, there."""
    report: Json = {}
    for how, value in declared(record):
        if how.report:
            *sections, key = how.report.split(".")
            at = report
            for section in sections:
                at = at.setdefault(section, {})
            at[key] = value
    return report


def _since(moment_ns: int) -> float | None:
    return round((time.monotonic_ns() - moment_ns) / 1e9, 3) if moment_ns else None


def _version_event(version: str, reason: str) -> Json | None:
    return {"version": version, "reason": reason} if version else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _measured(number: float) -> float | None:
    """A number that is never 0: on the page, 0 means that the learner has not measured it yet."""
    return _finite(number) or None
