"""The status pages as JSON, for GET /v1/aurora/status and `aurora-lit status`. Pure, except for reading the ring.

Leaves out what only the HTTP process knows (serve/http/spec.py) and Prometheus (serve/http/metrics.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from aurora_lit.errors import RingError
from aurora_lit.ipc.engine_status import EngineStatus, read_ranks
from aurora_lit.ipc.learner_status import LearnerStatus
from aurora_lit.ipc.page import heartbeat_age_s
from aurora_lit.ipc.ring import RingCounters, read_counters
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.request import TOKEN_SOURCES
from aurora_lit.settings import PLANS

Json = dict[str, Any]


def ring_counters(run_folder: Path) -> RingCounters | None:
    """The ring's present counters; None if there is no ring."""
    try:
        return read_counters(run_folder / RING_NAME)
    except RingError:
        return None


def engine_json(status: EngineStatus, ring: RingCounters | None) -> Json:
    """The engine worker: state, work, draft, domains and traces."""
    return {
        "worker": {
            "state": status.state.name.lower(),
            "pid": status.worker_pid,
            "error": status.error or None,
            "heartbeat_age_s": round(status.heartbeat_age_s, 3),
            "uptime_s": _since(status.started_ns),
        },
        "queue": {"running": status.running, "waiting": status.waiting},
        "limits": {"max_seq_len": status.max_seq_len, "vocab_size": status.vocab_size},
        "round_ms": {
            "p50": status.round_p50_us / 1e3,
            "p99": status.round_p99_us / 1e3,
            "swapping_p99": status.swap_round_p99_us / 1e3 or None,
        },
        "tokens": {
            "prompt": status.prompt_tokens,
            "cached": status.cached_tokens,
            "generated": status.generated_tokens,
        },
        "speculation": {
            "draft_version": status.draft_version or None,
            "max_draft_tokens": status.max_draft_tokens,
            "rounds": status.rounds,
            "rounds_by_plan": dict(zip(PLANS, status.rounds_by_plan, strict=True)),
            "predicted_over_real_time": status.predicted_round_us / status.round_us if status.round_us else None,
            "drafts": status.drafts,
            "proposed": status.proposed,
            "accepted": status.accepted,
            "accepted_by_position": status.accepted_by_position,
            "generated_by_source": dict(zip(TOKEN_SOURCES, status.generated_by_source, strict=True)),
            "against_plain": {
                "seconds": status.compared_us / 1e6,
                "plain_seconds": status.compared_plain_us / 1e6,
                "speedup": status.compared_plain_us / status.compared_us if status.compared_us else None,
            },
            "acceptance_rate": status.acceptance_rate,
            "mean_accepted_length": status.mean_accepted_length,
        },
        "memory": {
            "tokens": status.memory_tokens,
            "capacity_tokens": status.memory_capacity,
            "evicted_tokens": status.memory_evicted,
            "answers": status.memory_answers,
            "look_ups": status.memory_look_ups,
            "hits": status.memory_hits,
            "proposed": status.memory_proposed,
            "accepted": status.memory_accepted,
        },
        "draft": {
            "version": status.draft_version or None,
            "swaps": status.swaps,
            "refusals": status.refusals,
            "refused": _version_event(status.refused_version, status.refused_reason),
            "rollbacks": status.rollbacks,
            "rolled_back": _version_event(status.rolled_back_version, status.rolled_back_reason),
        },
        "domains": {
            "version": status.domains_version or None,
            "refused": status.domains_refused or None,
            "served": {
                name: {
                    **totals._asdict(),
                    "acceptance_rate": totals.acceptance_rate,
                    "mean_accepted_length": totals.mean_accepted_length,
                }
                for name, totals in status.domains.items()
            },
        },
        "traces": {
            "opted_out": status.opted_out,
            "unrecorded": status.unrecorded,
            "ring": None
            if ring is None
            else {
                "pushed": ring.pushed,
                "read": ring.popped,
                "dropped": {"overwritten": ring.overwritten, "too_large": ring.too_large, "torn": ring.torn},
                "queued": ring.queued_records,
                "queued_bytes": ring.queued_bytes,
                "capacity_bytes": ring.capacity_bytes,
            },
        },
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
    return {
        "state": status.state,
        "activity": status.activity or None,
        "error": status.error or None,
        "pid": status.pid or None,
        "restarts": status.restarts,
        "heartbeat_age_s": round(status.heartbeat_age_s, 3) if is_alive else None,
        "uptime_s": _since(status.started_ns) if is_alive else None,
        "version": status.version or None,
        "steps": status.steps,
        "positions": status.positions,
        "compute_share": _finite(status.compute_share) if is_running else None,
        "loss": _measured(status.loss) if is_running else None,
        "traces": {
            "read": status.records,
            "skipped": status.skipped,
            "stale": status.stale,
            "looping": status.looping,
            "over_client_share": status.over_client_share,
            "labels_dropped": status.labels_dropped,
            "queued": status.lag_records,
            "queued_bytes": status.lag_bytes,
        },
        "gate": {
            "published": status.published,
            "refused": status.gate_refused,
            "champion": _measured(status.champion_score),
            "challenger": _measured(status.challenger_score),
        },
        "domains": {
            "now": status.domains or None,
            "shifts": status.num_shifts,
            "last_shift": status.last_shift or None,
            "rate_factor": status.rate_factor,
            "explore_share": status.explore_share,
        },
    }


def _since(moment_ns: int) -> float | None:
    return round((time.monotonic_ns() - moment_ns) / 1e9, 3) if moment_ns else None


def _version_event(version: str, reason: str) -> Json | None:
    return {"version": version, "reason": reason} if version else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _measured(number: float) -> float | None:
    """A number that is never 0: on the page, 0 means that the learner has not measured it yet."""
    return _finite(number) or None
