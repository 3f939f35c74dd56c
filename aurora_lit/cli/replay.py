"""`aurora-lit replay`: the learner over recorded traces, and what it is worth along the stream.

`fabric run … aurora_lit/replay.py` starts the same command in several processes or on several devices. What is left out: learning and scoring (learn/offline/replay.py). Imports nothing heavy: the command line loads this file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aurora_lit.cli.options import FOLDER, configured
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import ConfigError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from aurora_lit.learn.data.target_head import TargetHead
    from aurora_lit.learn.offline.replay import Replay, ScoredTrace
    from aurora_lit.modules.draft.eagle3 import Draft

DRAFT_NAME, VERSIONS_NAME, REPORT_NAME = "draft", "versions", "replay.json"
_ARMS = ("static", "learning")


@click.command()
@click.option("--traces", type=FOLDER, help="Folder that a server recorded into. Default: trace.record.")
@click.option("--out", type=FOLDER, default=Path("replay-results"), show_default=True, help="Report and draft.")
@click.option("--steps-per-trace", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Of learning.")
@click.option("--trial-every", type=click.IntRange(min=1), default=32, show_default=True, help="Traces between trials.")
@click.option("--window", type=click.IntRange(min=1), default=64, show_default=True, help="Traces of a reading.")
@configured
def replay(config: AuroraConfig, traces: Path | None, **options: Any) -> None:
    """Learn from recorded traces offline; writes a draft to serve, and its accepted length as JSON."""
    folder = traces or (Path(config.trace.record) if config.trace.record else None)
    if folder is None:
        raise ConfigError("trace.record=null: there are no traces to replay; use --traces DIR")
    from aurora_lit.learn.online.build import load_head_and_draft

    fabric = _fabric()
    target_head, starting = load_head_and_draft(config)
    run(config, traces=folder, target_head=target_head, starting=starting, fabric=fabric, **options)


def run(
    config: AuroraConfig,
    *,
    traces: Path,
    out: Path,
    target_head: TargetHead,
    starting: Draft,
    fabric: Fabric,
    steps_per_trace: float,
    trial_every: int,
    window: int,
) -> dict[str, Any]:
    """Replay the traces in `traces`; returns what it writes to `out`, beside the draft that serves at the end."""
    from aurora_lit.drafts.checkpoint import save_draft
    from aurora_lit.learn.offline.replay import Replay, blocks, count_traces, read_traces

    total = count_traces(traces)
    first = fabric.is_global_zero
    with tempfile.TemporaryDirectory() as scratch, _progress(shown=first) as bar:
        replayed = Replay(
            config,
            target_head=target_head,
            starting=starting,
            folder=out / VERSIONS_NAME,
            scratch=Path(scratch),
            steps_per_trace=steps_per_trace,
            fabric=fabric,
        )
        task = bar.add_task("replaying", total=total)
        for block in blocks(read_traces(traces), trial_every):
            replayed.process_block(block)
            bar.advance(task, len(block))
    result = report(replayed, window=window)
    if first:
        save_draft(replayed.served, out / DRAFT_NAME)
        (out / REPORT_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console = Console()
        for title in ("domains", "windows"):
            console.print(table(result, title))
        console.print(
            f"{result['published']} of {len(result['trials'])} drafts passed the gate"
            + ("" if result["published"] else ": what serves at the end is the draft it began with")
            + f"; serve it with draft.checkpoint={out / DRAFT_NAME}"
        )
    return result


def report(replayed: Replay, *, window: int) -> dict[str, Any]:
    """What both drafts were worth, by domain and over the stream, and how the learner came along."""
    scored = replayed.scored
    domains = sorted({each.domain for each in scored})
    learner = replayed.learner
    return {
        "traces": len(scored),
        "skipped": replayed.skipped,
        "steps": learner.steps,
        "positions": learner.positions,
        "poisoned": learner.num_nonfinite,
        "published": sum(trial.passed for trial in replayed.trials),
        "all": _row(scored),
        "domains": [{"domain": name or "unknown"} | _row([s for s in scored if s.domain == name]) for name in domains],
        "windows": [
            {"first": start, "version": scored[start].version} | _row(scored[start : start + window])
            for start in range(0, len(scored), window)
        ],
        "trials": [trial.record | {"passed": trial.passed} for trial in replayed.trials],
    }


def table(result: dict[str, Any], part: str) -> Table:
    """Accepted length of both drafts: `part` is "domains" or "windows"."""
    shown = Table(title=f"accepted length by {part.removesuffix('s')}: learned from after it was scored")
    for name in (part.removesuffix("s"), "traces", "rounds (static)", *_ARMS, "gain"):
        shown.add_column(name, justify="left" if name == "domain" else "right")
    rows = [(str(row.get("domain", row.get("first"))), row) for row in result[part]]
    for name, row in [*rows, ("all", result["all"])]:
        lengths = [row[arm]["accepted_length"] for arm in _ARMS]
        shown.add_row(
            name,
            str(row["traces"]),
            f"{row['static']['rounds']:.0f}",
            *(f"{length:.3f}" for length in lengths),
            f"{lengths[1] / lengths[0]:.3f}×",
        )
    return shown


def _row(scored: Sequence[ScoredTrace]) -> dict[str, Any]:
    found: dict[str, Any] = {"traces": len(scored)}
    for arm in _ARMS:
        rounds = sum(getattr(each, arm).count for each in scored)
        tokens = sum(getattr(each, arm).tokens for each in scored)
        found[arm] = {
            "rounds": round(rounds, 2),
            "tokens": round(tokens, 2),
            "accepted_length": round(tokens / rounds, 4) if rounds else 1.0,
        }
    return found


def _fabric() -> Fabric:
    """The one that `fabric run` describes and has launched, or else one of a single process."""
    from lightning.fabric import Fabric

    if os.environ.get("LT_CLI_USED") == "1":
        os.environ.setdefault("LT_PRECISION", "bf16-mixed")  # as live; --precision has been there before
        return Fabric()
    return Fabric(accelerator="auto", devices=1, precision="bf16-mixed")


def _progress(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
