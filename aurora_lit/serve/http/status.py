"""The shared pages as JSON: what GET /v1/aurora/status and `aurora-lit status` show. Pure, but for reading the ring.

Leaves out what only the HTTP process knows (serve/api.py) and Prometheus (metrics.py).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from aurora_lit.errors import RingError
from aurora_lit.ipc.engine_status import Status
from aurora_lit.ipc.learner_status import LearnerStatus
from aurora_lit.ipc.page import heartbeat_age_s
from aurora_lit.ipc.rank_status import read_ranks
from aurora_lit.ipc.ring import RingCounters, read_counters
from aurora_lit.ipc.run_folder import RING_NAME

Json = dict[str, Any]


def ring_counters(run_folder: Path) -> RingCounters | None:
    """The ring's counters as they are now; None where there is no ring."""
    try:
        return read_counters(run_folder / RING_NAME)
    except RingError:
        return None


def engine_json(now: Status, ring: RingCounters | None) -> Json:
    """The engine worker: its life, its work, its draft, its traces."""
    return {
        "worker": {
            "state": now.state.name.lower(),
            "pid": now.worker_pid,
            "error": now.error or None,
            "heartbeat_age_s": round(now.heartbeat_age_s, 3),
            "uptime_s": _since(now.started_ns),
        },
        "queue": {"running": now.running, "waiting": now.waiting},
        "limits": {"max_seq_len": now.max_seq_len, "vocab_size": now.vocab_size},
        "round_ms": {
            "p50": now.round_p50_us / 1e3,
            "p99": now.round_p99_us / 1e3,
            "swapping_p99": now.swap_round_p99_us / 1e3 or None,
        },
        "tokens": {"prompt": now.prompt_tokens, "cached": now.cached_tokens, "generated": now.generated_tokens},
        "speculation": {
            "draft_version": now.draft_version or None,
            "max_draft_tokens": now.max_draft_tokens,
            "rounds": now.rounds,
            "drafts": now.drafts,
            "proposed": now.proposed,
            "accepted": now.accepted,
            "accepted_by_position": now.accepted_by_position,
            "acceptance_rate": now.acceptance_rate,
            "mean_accepted_length": now.mean_accepted_length,
        },
        "draft": {
            "version": now.draft_version or None,
            "swaps": now.swaps,
            "refusals": now.refusals,
            "refused": _event(now.refused_version, now.refused_reason),
            "rollbacks": now.rollbacks,
            "rolled_back": _event(now.rolled_back_version, now.rolled_back_reason),
        },
        "traces": {
            "opted_out": now.opted_out,
            "unrecorded": now.unrecorded,
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
    """The processes that hold parts of the target beside the engine worker; empty where it is whole."""
    return [
        {
            "rank": rank,
            "pid": now.pid,
            "heartbeat_age_s": round(heartbeat_age_s(now), 3),
            "orders": now.orders,
            "draft_version": now.draft_version or None,
            "error": now.error or None,
        }
        for rank, now in read_ranks(run_folder).items()
    ]


def learner_json(now: LearnerStatus) -> Json:
    """The learner: its life, its work, its last gate; numbers are those of the last one when none is there."""
    alive = now.state in ("running", "stalled")
    return {
        "state": now.state,
        "activity": now.activity or None,
        "error": now.error or None,
        "pid": now.pid or None,
        "restarts": now.restarts,
        "heartbeat_age_s": round(now.heartbeat_age_s, 3) if alive else None,
        "uptime_s": _since(now.started_ns) if alive else None,
        "version": now.version or None,
        "steps": now.steps,
        "positions": now.positions,
        "compute_share": _finite(now.compute_share),
        "loss": _finite(now.loss),
        "traces": {
            "read": now.records,
            "skipped": now.skipped,
            "stale": now.stale,
            "looping": now.looping,
            "over_client_share": now.over_client_share,
            "labels_dropped": now.labels_dropped,
            "queued": now.lag_records,
            "queued_bytes": now.lag_bytes,
        },
        "gate": {
            "published": now.published,
            "refused": now.gate_refused,
            "champion": _finite(now.champion_score),
            "challenger": _finite(now.challenger_score),
        },
        "vocabulary": {"entered": now.tokens_entered, "coverage": now.vocabulary_coverage or None},
        "domains": {
            "now": now.domains or None,
            "shifts": now.num_shifts,
            "last_shift": now.last_shift or None,
            "warm_starts": now.warm_starts,
            "rate_factor": now.rate_factor,
            "explore_share": now.explore_share,
            "explore_temperature": now.explore_temperature,
            "entropy_weight": now.entropy_weight,
            "replay_share": now.replay_share,
        },
    }


def _since(moment_ns: int) -> float | None:
    return round((time.monotonic_ns() - moment_ns) / 1e9, 3) if moment_ns else None


def _event(version: str, reason: str) -> Json | None:
    return {"version": version, "reason": reason} if version else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
