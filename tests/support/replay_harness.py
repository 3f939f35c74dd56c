"""A replay of recorded traces with settings for tests: small batches, three draft steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.loop import OfflineLoop
from aurora_lit.learn.offline.scoring import RoundTotals
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request
from aurora_lit.traces.record import Trace
from support.live_traces import some_requests

K = 3
"""Proposals of every round."""
_SETTINGS = ("engine.max_draft_tokens=3", "domain.detect=false", "engine.lookup=false", "memory.capacity_mb=0")


def replay_config(*changes: str, **learn: Any) -> AuroraConfig:
    """Nothing is copied without `changes`, which are settings as on the command line."""
    config = load_config(None, [*_SETTINGS, *changes])
    fields = {
        "publish_every_steps": 10,
        "learning_rate": 4e-3,
        "gate_requests": 12,
    }
    return replace(config, learn=replace(config.learn, **{**fields, **learn}))


def asked(times: int = 6) -> list[Request]:
    """A few prompts of two domains, asked so often."""
    requests = [*some_requests(8), *some_requests(4, seed=1, domain="code")]
    return [replace(r, request_id=f"{n}-{r.request_id}") for n in range(times) for r in requests]


def make_replay(
    target: Target,
    draft: Eagle3Draft,
    folder: Path,
    *changes: str,
    steps_per_trace: float = 1.0,
    fabric: Fabric | None = None,
    gated: bool = True,
    keep_versions: bool = True,
    **learn: Any,
) -> OfflineLoop:
    folder.mkdir(exist_ok=True)
    replay = OfflineLoop(
        replay_config(*changes, **learn),
        target_head=TargetHead(target),
        starting=draft,
        folder=folder / "versions",
        scratch=folder,
        steps_per_trace=steps_per_trace,
        fabric=fabric,
        gated=gated,
        keep_versions=keep_versions,
    )
    replay._intake.max_repeated_share = 1.0
    return replay


def scored_rounds(trace: Trace) -> RoundTotals:
    """The live engine's rounds that a replay knows too: those with proposals that end before the trace does."""
    known_R = (trace.num_proposed_R > 0) & (trace.round_root_R <= len(trace.token_ids_T) - 1 - K)
    return RoundTotals(count=float(known_R.sum()), tokens=float((1 + trace.num_accepted_R[known_R]).sum()))


def in_order(traces: Sequence[Trace]) -> list[Trace]:
    return sorted(traces, key=lambda trace: (trace.request_id, trace.first_position))
