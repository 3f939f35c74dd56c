"""`aurora-lit bench policy replay`: every policy in every setting of a recording; what the planner loses, and where.

Policies: plain decoding; the planner, which is serving's own; the best fixed shape in hindsight; a bandit; two informed
choices, by promises that were learned; the oracle. All of them answer the same requests with the same noise; several
orders of the requests show what chance makes of it. With --parts also the planner without one of its parts, or with one
thing that it only estimates known exactly: what a difference to the planner costs or would gain.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as Report

from aurora_lit.bench.policy.choices import (
    BanditPolicy,
    ChoosingPolicy,
    FixedPolicy,
    accepted_by_shape,
    arms,
    draft_shapes,
)
from aurora_lit.bench.policy.predictor import explained, promises
from aurora_lit.bench.policy.recording import SETTINGS_NAME, Recording, TimedRounds
from aurora_lit.bench.policy.simulator import PlainPolicy, PlannerPolicy, Policy, Replay, Table, replay
from aurora_lit.bench.policy.world import World
from aurora_lit.bench.reporting import report_console, write_report
from aurora_lit.config import AuroraConfig
from aurora_lit.serve.speculation.costs import DraftShape

PLANNER, ORACLE, FIXED = "planner", "oracle", "best fixed"
INFORMED, INFORMED_DRAFT = "informed", "informed, sees draft"


def run(
    config: AuroraConfig, *, recording: Path, clients: Sequence[int], orders: int, parts: bool, out: Path
) -> dict[str, Any]:
    """Replay all policies; print a table and write policy.json to `out`."""
    recorded = Recording.load(recording)
    accepted_NS = accepted_by_shape(recorded)
    expected = {
        name: promises(recorded, accepted_NS, sees_draft=sees)
        for name, sees in ((INFORMED, False), (INFORMED_DRAFT, True))
    }
    results: dict[str, Any] = {name: explained(promise_NS, accepted_NS) for name, promise_NS in expected.items()}
    console = report_console()
    console.print("variance of accepted tokens explained:", {name: round(share, 3) for name, share in results.items()})
    settings = []
    for number in clients:
        timed = TimedRounds.load(recording, number)
        for memory_mb in (config.memory.capacity_mb, 0):
            setting = Setting(config, recorded, timed, memory_mb=memory_mb, orders=orders)
            found = setting.compare(accepted_NS, expected, parts=parts)
            found |= {"memory": bool(memory_mb), **setting.check(found[PLANNER]["speed"])}
            settings.append(found)
            _print(console, found)
    recorded_with = recording / SETTINGS_NAME
    results = {"explained": results, "settings": settings}
    if recorded_with.exists():  # which `config` need not be
        results["recorded_with"] = json.loads(recorded_with.read_text(encoding="utf-8"))
    write_report(out / "policy.json", config=config, draft_version="", results=results)
    return results


class Setting:
    """One number of clients, with or without memory."""

    def __init__(
        self, config: AuroraConfig, recording: Recording, timed: TimedRounds, *, memory_mb: int, orders: int
    ) -> None:
        """`orders`: of the requests; the first is the recording's."""
        self.recording, self.timed = recording, timed
        self._how = {"memory_bytes": memory_mb << 20, "max_catch_up_s": config.engine.max_round_ms / 1000}
        self._orders = []
        for seed in range(orders):
            answers = list(recording.answers)
            if seed:
                random.Random(seed).shuffle(answers)
            self._orders.append(dataclasses.replace(recording, answers=answers))

    def replays(self, make: Callable[[Table], Policy], *, orders: int | None = None) -> list[Replay]:
        """One policy in each order."""
        found = []
        for seed, recording in enumerate(self._orders[:orders]):
            table = Table(recording, World(self.timed, seed=seed), **self._how)  # type: ignore[arg-type]
            found.append(replay(table, make(table)))
        return found

    def compare(self, accepted_NS: np.ndarray, expected: dict[str, np.ndarray], *, parts: bool) -> dict[str, Any]:
        """All policies."""
        table = Table(self.recording, World(self.timed), **self._how)  # type: ignore[arg-type]
        speed_of_arm = {arm: self.replays(partial(FixedPolicy, arm=arm), orders=1)[0].speed for arm in arms(table)}
        best = max(speed_of_arm, key=speed_of_arm.__getitem__)
        makers: dict[str, Callable[[Table], Policy]] = {
            PLANNER: PlannerPolicy,
            "plain": lambda _table: PlainPolicy(),
            FIXED: partial(FixedPolicy, arm=best),
            "bandit": BanditPolicy,
            ORACLE: partial(ChoosingPolicy, promise_NS=accepted_NS, knows_answer=True),
        }
        for name, promise_NS in expected.items():
            makers[name] = partial(ChoosingPolicy, promise_NS=promise_NS, knows_answer=False)
        if parts:
            first = draft_shapes(self.recording).index(DraftShape(1))
            makers |= {
                "without floor": partial(PlannerPolicy, floor=False),
                "without tries": partial(PlannerPolicy, tries=False),
                "known costs": partial(PlannerPolicy, known_costs=True),
            }
            for name, promise_NS in expected.items():
                rate_N = promise_NS[:, first].clip(0.02, 0.98).tolist()
                makers[f"rates of {name}"] = partial(PlannerPolicy, known_rate_N=rate_N)
        found: dict[str, Any] = {"clients": self.timed.batch_size, "fixed": str(best)}
        speeds: dict[str, list[float]] = {}
        for name, make in makers.items():
            replays = self.replays(make)
            speeds[name] = [each.speed for each in replays]
            over = [speed / planner for speed, planner in zip(speeds[name], speeds[PLANNER], strict=True)]
            found[name] = {
                "speed": statistics.mean(speeds[name]),
                "over planner": statistics.mean(over),
                "lowest": min(over),
                "highest": max(over),
                "tokens a round": statistics.mean(r.tokens / r.rounds / self.timed.batch_size for r in replays),
                "columns a round": statistics.mean(r.columns / r.rounds / self.timed.batch_size for r in replays),
                "by domain": {
                    domain: sum(r.by_domain[domain][0] for r in replays) / sum(r.by_domain[domain][1] for r in replays)
                    for domain in sorted(replays[0].by_domain)
                },
            }
        return found

    def check(self, simulated: float) -> dict[str, float]:
        """How well the simulation predicts what was measured."""
        own, world = [each for each in self.timed.rounds if not each.drawn], World(self.timed)
        live = sum(each.tokens for each in own) / sum(world.measured_s(each) for each in own)
        return {
            "error": world.error(),
            "live speed": live,
            "simulated over live": simulated / live,
            "prompt share": self.timed.prompt_share,
        }


def _print(console: Any, found: dict[str, Any]) -> None:
    report = Report(
        title=f"{found['clients']} clients, memory {'on' if found['memory'] else 'off'}; time of the planner's rounds, "
        f"expected over measured: {1 + found['error']:.3f}; best fixed: {found['fixed']}"
    )
    for column in ("policy", "tokens/s", "over planner", "lowest", "highest", "tokens a round", "columns a round"):
        report.add_column(column, justify="left" if column == "policy" else "right")
    domains = sorted(found[PLANNER]["by domain"])
    for domain in domains:
        report.add_column(domain, justify="right")
    for name, each in found.items():
        if isinstance(each, dict):
            numbers = (f"{each[key]:.3f}" for key in ("over planner", "lowest", "highest"))
            counts = (f"{each[key]:.2f}" for key in ("tokens a round", "columns a round"))
            by_domain = (f"{each['by domain'][domain]:.1f}" for domain in domains)
            report.add_row(name, f"{each['speed']:.1f}", *numbers, *counts, *by_domain)
    console.print(report)
