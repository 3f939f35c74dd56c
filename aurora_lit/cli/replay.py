"""`aurora-lit replay`: learns from recorded traces, and reports the accepted length of static and learning draft.

Both are scored alone and with copies beside them: *static*, *memory* (the starting draft with copies), *learning*,
*both* (the draft that learns, with copies).

`fabric run … aurora_lit/replay.py` runs the same command in several processes or on several devices.

Leaves out learning and scoring (learn/offline/loop.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aurora_lit import __version__
from aurora_lit.config import AuroraConfig
from aurora_lit.drafts.checkpoint import check_replaceable, save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import settings_to_serve
from aurora_lit.durable import replace_file
from aurora_lit.errors import AuroraError, CheckpointError, ConfigError
from aurora_lit.ipc.process_lifetime import sigterm_as_exit
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.loop import (
    ARMS,
    OfflineLoop,
    ScoredTrace,
    blocks,
    count_traces,
    read_traces,
    shard_names,
)
from aurora_lit.learn.online.build import load_head_and_draft
from aurora_lit.learn.online.data_parallel import broadcast_plain
from aurora_lit.learn.online.trial import MIN_REQUESTS
from aurora_lit.learn.training_precision import NAMES_OF_PRECISIONS, one_process_fabric, training_precision
from aurora_lit.machine import use_threads
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.progress import Progress

DRAFT_NAME, VERSIONS_NAME, REPORT_NAME = "draft", "versions", "replay.json"


def replay(config: AuroraConfig, *, traces: Path | None, out: Path, **options: Any) -> None:
    """Replay the traces in `traces` (None: trace.record) as `run` does, after loading target head and draft.

    Before that takes time, raises AuroraError if there are no traces, ConfigError in all processes if `out` holds other
    files or an earlier replay's, or cannot be written or locked.
    """
    folder = traces or (Path(config.trace.record).expanduser() if config.trace.record else None)
    if folder is None:
        raise ConfigError("trace.record=null: there are no traces to replay; use --traces DIR")
    fabric = _fabric(config)
    if config.learn.from_scratch and config.draft.checkpoint is not None and fabric.is_global_zero:
        Console(stderr=True).print(
            "learn.from_scratch=true: learning begins untrained, with the shape of draft.checkpoint; to begin with its "
            "weights, set learn.from_scratch=false"
        )
    count_traces(folder)
    error = _cannot_use(out) if fabric.is_global_zero else None
    if (error := broadcast_plain(fabric, error)) is not None:
        raise ConfigError(error)
    use_threads(config.engine.threads, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    target_head, starting = load_head_and_draft(config)
    run(config, traces=folder, out=out, target_head=target_head, starting=starting, fabric=fabric, **options)


@sigterm_as_exit()
def run(
    config: AuroraConfig,
    *,
    traces: Path,
    out: Path,
    target_head: TargetHead,
    starting: Eagle3Draft,
    fabric: Fabric,
    steps_per_trace: float,
    trial_every: int,
    window: int,
) -> dict[str, Any]:
    """Replay the traces in `traces`; write a report and the final draft to the new folder `out`, return the report.

    steps_per_trace: optimiser steps for each trace, as far as traces may be repeated. trial_every: traces between two
    trials of the gate. window: traces in each window of the report. Raises AuroraError if no trace can be used. What
    ends it before, such as Ctrl-C or SIGTERM, is raised again once the report so far is written; there is no final
    draft then.
    """
    total, first = count_traces(traces), fabric.is_global_zero
    with tempfile.TemporaryDirectory() as scratch, Progress("replaying", total, "traces", shown=first) as progress:
        replayed = OfflineLoop(
            config,
            target_head=target_head,
            starting=starting,
            folder=out / VERSIONS_NAME,
            scratch=Path(scratch),
            steps_per_trace=steps_per_trace,
            fabric=fabric,
        )
        # A server may record there meanwhile, and all processes must read the same.
        names = broadcast_plain(fabric, shard_names(traces))
        ended_by: BaseException | None = None
        try:
            for block in blocks(read_traces(traces, names, on_damaged=replayed.skip), trial_every):
                replayed.process_block(block)
                progress.advance(len(block))
            replayed.check_same_traces([])
        except BaseException as error:  # Ctrl-C and SIGTERM too
            if not replayed.scored:
                raise
            ended_by = error
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `fabric run` sends it when another process has failed
    if not replayed.scored:
        raise AuroraError(
            f"all {replayed.skipped} traces in {traces} were skipped: they are of another target than "
            f"{config.target.source}, or damaged; give the server's --config"
        )
    result = report(replayed, window=window) | {
        "aurora_lit": __version__,
        "options": {"traces": str(traces), "steps_per_trace": steps_per_trace, "trial_every": trial_every},
        # Without the server's, which may hold a key.
        "settings": {name: each for name, each in dataclasses.asdict(config).items() if name != "server"},
    }
    if first:
        replace_file(out / REPORT_NAME, (json.dumps(result, indent=2) + "\n").encode())
        console = Console()
        _print_report(console, result, config, total=total)
        if ended_by is not None:  # the served draft may be half replaced: it is not written
            last = f"interrupted; drafts that have passed the gate are in {out / VERSIONS_NAME}"
        else:
            save_draft(replayed.served, out / DRAFT_NAME)
            last = f"{result['published']} of {len(result['trials'])} drafts passed the gate"
            last += "" if result["published"] else ": the final draft is the starting draft"
            last += f"; serve it with {settings_to_serve(out / DRAFT_NAME, config)}"
        console.print(last, soft_wrap=True, markup=False)
    if ended_by is not None:
        raise ended_by
    return result


def _print_report(console: Console, result: dict[str, Any], config: AuroraConfig, *, total: int) -> None:
    """The tables, and what was left out of `total` traces."""
    for title in ("domains", "windows"):
        console.print(table(result, title))
    if skipped := result["skipped"]:
        console.print(f"{skipped} of {total} traces were skipped: of another target, or damaged")
    if dropped := result["poisoned"]:
        taken = dropped + result["steps"]
        console.print(f"{dropped} of {taken} batches were dropped: their loss or gradient was not finite")
    if not result["trials"]:
        console.print(
            f"no trial was held: {result['steps']} steps were taken, and one needs learn.publish_every_steps="
            f"{config.learn.publish_every_steps} and {MIN_REQUESTS} requests that are kept for it; give more "
            "traces, or raise --steps-per-trace",
            soft_wrap=True,
        )


def _cannot_use(out: Path) -> str | None:
    """Make the folder of results. Why it cannot be used is known now, and not after hours; None: it can be."""
    store = DraftStore(out / VERSIONS_NAME, keep=1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        check_replaceable(out / DRAFT_NAME)
        if store.versions() or (out / REPORT_NAME).exists():  # nothing would tell its drafts from those of this one
            return f"--out {out}: an earlier replay has written there; name another folder, or delete that one"
    except (CheckpointError, OSError) as error:
        return f"--out: {error}"
    try:
        store.prune()  # takes the lock that publishing takes
    except CheckpointError:
        return f"--out {out}: its file system has no locks; name a folder on a local disk"
    return None


def report(replayed: OfflineLoop, *, window: int) -> dict[str, Any]:
    """Accepted length of each arm, overall, by domain and by window, and what the learner did."""
    scored = replayed.scored
    domains = sorted({each.domain for each in scored})
    learner = replayed.learner
    return {
        "traces": len(scored),
        "skipped": replayed.skipped,
        "steps": learner.steps,
        "positions": learner.positions,
        "copies": replayed.ngrams is not None,
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
    """Accepted length of each arm, and the gain of all together; `part` is "domains" or "windows"."""
    shown = Table(title=f"accepted length by {part.removesuffix('s')} (each trace is scored, then learned from)")
    for name in (part.removesuffix("s"), "traces", "rounds (static)", *ARMS, "gain"):
        shown.add_column(name, justify="left" if name == "domain" else "right")
    rows = [(str(row.get("domain", row.get("first"))), row) for row in result[part]]
    for name, row in [*rows, ("all", result["all"])]:
        lengths = [row[arm]["accepted_length"] for arm in ARMS]
        shown.add_row(
            escape(name),
            str(row["traces"]),
            f"{row['static']['rounds']:.0f}",
            *(f"{length:.3f}" for length in lengths),
            f"{lengths[-1] / lengths[0]:.3f}×",
        )
    return shown


def _row(scored: Sequence[ScoredTrace]) -> dict[str, Any]:
    found: dict[str, Any] = {"traces": len(scored)}
    for arm in ARMS:
        rounds = sum(getattr(each, arm).count for each in scored)
        tokens = sum(getattr(each, arm).tokens for each in scored)
        found[arm] = {
            "rounds": round(rounds, 2),
            "tokens": round(tokens, 2),
            "accepted_length": round(tokens / rounds, 4) if rounds else 1.0,
        }
    return found


def _fabric(config: AuroraConfig) -> Fabric:
    """Under `fabric run`, the Fabric that it configured and launched; else one of a single process.

    Raises ConfigError if several processes are asked for in another way: each would replay alone, all into one folder.
    The same for a precision or strategy in which `Learner.update` does not learn.
    """
    if os.environ.get("LT_CLI_USED") == "1":
        # As in live learning, but not timed in each of several processes, which must compute in the same.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        precision = os.environ.setdefault("LT_PRECISION", "bf16-mixed" if several else training_precision())
        strategy = os.environ.get("LT_STRATEGY", "auto")
        if precision not in NAMES_OF_PRECISIONS:  # 16-mixed scales the loss, and gradients would be clipped scaled
            raise ConfigError(f"--precision {precision}: a replay learns in bf16-mixed or 32-true; use one of them")
        if strategy not in ("auto", "dp") and not strategy.startswith("ddp"):
            raise ConfigError(f"--strategy {strategy}: a replay needs the whole draft in each process; use ddp")
        return Fabric()
    script = os.path.relpath(Path(__file__).parents[1] / "replay.py")
    remedy = f"start several processes with `fabric run --devices N --strategy ddp {script} -- ...`"
    if (devices := config.learn.devices) > 1:
        raise ConfigError(f"learn.devices={devices}: this is one process; use learn.devices=1, or {remedy}")
    # SLURM_NTASKS does not say that srun has started this process; that it is not the first task does.
    for name, alone in (("WORLD_SIZE", 1), ("SLURM_PROCID", 0)):
        if (value := int(os.environ.get(name, alone))) > alone:
            raise ConfigError(
                f"{name}={value}: another launcher's processes would each replay alone; {remedy}; or, if each is to "
                f"replay alone into its own --out, unset {name}"
            )
    return one_process_fabric()
