"""A server under faults for 10 or 100 minutes: exit code 1 if an invariant is broken.

    python -m benchmarks.soak --minutes 10 --seed 0
    python -m benchmarks.soak --minutes 100 --seed 0 --config qwen2.5-coder-0.5b --out soak.json -- target.source=FILE

The server has a key, records traces, keeps its memory on disk, tries a new draft every 30 seconds and has small caches,
which are full soon. A tenth of the time is baseline, three quarters bring faults, in an order drawn by the seed, and
the rest is without: in 100 minutes sixty faults, one each 75 seconds, in 10 minutes one each 25. Eight clients send
requests all the time; their answers must equal what the same server answers without speculation. As root the server
gets a /dev/shm of 512 MiB and a checkpoint disk of 1 GiB of its own; else the faults that need them are left out,
which is said. Prints the faults, the invariants with their figures, and where a text was looked for that must not be
found.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import Json
from aurora_lit.bench.servers import free_port
from aurora_lit.config import draft_folder, load_config
from aurora_lit.errors import AuroraError

from . import canary
from .clients import Clients, ask_oracle, fills_holes, make_pool
from .faults import BY_NAME, FAULTS, Fault, Scene, schedule
from .server import enter_mounts, small_disk, supervised
from .watch import RESTARTED_S, Done, Row, Run, Watch, failed_without_cause, invariants

_BASELINE, _FAULTS = 0.1, 0.75
"""Shares of the time."""
_EVERY_S = 75.0, 25.0
"""From one fault to the next, in 100 minutes or more and in less."""
_SMALL = (
    *("engine.prefix_cache_mb=32", "memory.capacity_mb=8", "learn.reservoir_mb=32", "trace.capacity_mb=32"),
    *("memory.scope=client", "learn.publish_every_s=30", "trace.record_mb=64", "server.page=on"),
)


def main() -> int:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="smollm2", help="preset or file of settings")
    parser.add_argument("--faults", nargs="+", choices=BY_NAME, metavar="NAME", help="these only")
    parser.add_argument("--out", type=Path, help="folder for the figures and the servers' logs")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    enter_mounts("benchmarks.soak")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, and its files deleted
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        try:
            run, found = _run(folder, options)
        finally:
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                for log in folder.glob("server-*.log"):
                    (options.out / log.name).write_bytes(log.read_bytes())
    rows = invariants(run)
    console = Console(width=140)
    for table in (_of_faults(run), canary.report(found), _of_rows(rows)):
        console.print(table)
    _tell_wrong(run)
    if options.out:
        (options.out / "soak.json").write_text(json.dumps(_figures(run, found, rows), indent=1) + "\n")
    return 0 if all(row.holds for row in rows) else 1


def _run(folder: Path, options: argparse.Namespace) -> tuple[Run, dict[str, canary.Found]]:
    since, draws = time.time(), random.Random(options.seed)
    hidden, salt = canary.new_text(draws), canary.new_text(draws)
    disk = folder / "checkpoints"
    where = [f"checkpoint.dir={disk}", "checkpoint.run=soak"]
    kept = [f"trace.record={folder / 'traces'}", f"memory.keep={folder / 'memory'}"]
    settings = [*where, *kept, *_SMALL, *options.settings]
    draft = draft_folder(load_config(Path(options.config), []))
    if draft is None:
        raise AuroraError(f"--config {options.config} names no draft to begin with")
    with (
        small_disk(disk) as has_small_disk,
        supervised(["--config", options.config, *settings], folder, free_port()) as server,
    ):
        server.wait_for_learner(120)
        scene = Scene(server, disk / "soak", draft, has_small_disk)
        names = _possible(scene, options.faults)
        pool = make_pool(seed=options.seed, fills_holes=fills_holes(server))
        what = {"key as text": server.key.encode()}
        for name, text in {"hidden": hidden, "salt": salt}.items():
            what |= canary.needles(name, text, canary.token_ids(server, text))
        _tell(f"{len(pool)} answers without speculation")
        oracle = ask_oracle(server, pool)
        clients = Clients(server, pool, oracle, hidden=hidden, salt=salt, seed=options.seed)
        with Watch(scene) as watch:
            with clients:
                run = _phases(scene, clients, watch, names, options)
            others = "\n".join(clients.texts).encode()
            found = canary.search_all(server, folder, scene.versions, what, others, since=since)
    run.canary = [each for each in canary.faults(found) if "consented" not in each]
    searched = [each for place, each in found.items() if place != "planted"]
    hits = sum(sum(each.hits.values()) for each in searched)
    run.canary_figure = f"{len(searched)} places, {sum(each.size for each in searched):,} bytes, {hits} hits"
    return run, found


def _possible(scene: Scene, chosen: Sequence[str] | None) -> list[str]:
    """Names of the faults that can be made here; says which cannot."""
    found = []
    for fault in FAULTS:
        if chosen and fault.name not in chosen:
            continue
        if reason := fault.missing(scene):
            _tell(f"left out: {fault.name} ({reason})")
        else:
            found.append(fault.name)
    return found


def _phases(scene: Scene, clients: Clients, watch: Watch, names: Sequence[str], options: argparse.Namespace) -> Run:
    total_s, every_s = 60 * options.minutes, _EVERY_S[options.minutes < 100]
    # A client that is new to the server, and a server that is new to its clients, are no baseline.
    time.sleep(min(30.0, total_s / 60))
    began_s = time.monotonic()
    _tell("baseline")
    _sleep_until(began_s + _BASELINE * total_s)
    first_s = (began_s, time.monotonic())
    _at_rest(clients, watch, "after the baseline")
    beside = watch.new_traces()
    faults_end_s = began_s + (_BASELINE + _FAULTS) * total_s
    faults_s, done = time.monotonic(), []
    number = max(len(options.faults or ()), round(_FAULTS * total_s / every_s))
    for place, name in enumerate(schedule(seed=options.seed, number=number, names=names)):
        _sleep_until(faults_s + place * every_s)
        if time.monotonic() > faults_end_s and not options.faults:
            break
        done.append(_make(BY_NAME[name], scene, watch))
    _tell("no faults any more")
    _settle(scene)
    _at_rest(clients, watch, "before the last phase")
    last_s = time.monotonic()
    _sleep_until(last_s + (1 - _BASELINE - _FAULTS) * total_s)
    window_s = (last_s, time.monotonic())
    _at_rest(clients, watch, "at the end")
    beside += watch.new_traces()
    return Run(calls=clients.calls, faults=done, watch=watch, traces=beside, first_s=first_s, last_s=window_s)


def _make(fault: Fault, scene: Scene, watch: Watch) -> Done:
    began_s, lives = time.monotonic(), scene.server.lives
    if fault.spoils:
        watch.is_spoilt.set()
    try:
        note = fault.act(scene)
    except (AuroraError, OSError, psutil.Error) as error:
        note = f"not made: {error}"
    finally:
        watch.is_spoilt.clear()
    ended_s = time.monotonic()
    try:
        healthy_s = scene.server.wait_until_healthy(3 * RESTARTED_S)
    except AuroraError:
        healthy_s = 3 * RESTARTED_S
    restarts = scene.server.lives - lives
    if restarts:
        _settle(scene)
    found = Done(fault.name, began_s, ended_s, healthy_s, restarts, note, watch.new_traces())
    told = f"{fault.name}: {ended_s - began_s:.1f} s, healthy {healthy_s:.1f} s later, {restarts} restarts; {note}"
    _tell("\n    ".join([told, *found.traces]))
    return found


def _settle(scene: Scene) -> None:
    """Wait for the learner, so that the next fault finds it."""
    with suppress(AuroraError, OSError):
        scene.server.wait_for_learner(60)


def _at_rest(clients: Clients, watch: Watch, name: str) -> None:
    with clients.paused():
        watch.at_rest(name)
    _tell(str(watch.rests[-1]))


def _sleep_until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- reports -----------------------------------------------------------------------------------------------------------


def _of_faults(run: Run) -> Table:
    table = Table("fault", "seconds", "healthy after, s", "restarts", "calls that failed", "note", min_width=130)
    for each in run.faults:
        until = each.ended_s + each.healthy_s + 1.0
        failed = sum(
            call.outcome in ("failed", "refused") and call.sent_s < until and call.ended_s > each.began_s
            for call in run.calls
        )
        seconds = f"{each.ended_s - each.began_s:.1f}"
        table.add_row(each.name, seconds, f"{each.healthy_s:.1f}", str(each.restarts), str(failed), each.note)
    return table


def _of_rows(rows: Sequence[Row]) -> Table:
    table = Table("invariant", "figure", "", min_width=130)
    for row in rows:
        table.add_row(row.name, row.figure, "holds" if row.holds else "BROKEN")
    return table


def _tell_wrong(run: Run) -> None:
    different = [call for call in run.calls if call.outcome == "different"]
    lines = [f"{call.client}: {call.detail}" for call in different]
    lost = failed_without_cause(run.calls, run.faults)
    lines += [f"{call.client}, {call.ended_s - call.sent_s:.1f} s: {call.detail}" for call in lost]
    lines += [*run.watch.wrong, *run.canary, *run.traces]
    for line in lines[:50]:
        print(line[:2000], file=sys.stderr)


def _figures(run: Run, found: dict[str, canary.Found], rows: Sequence[Row]) -> Json:
    return {
        "rows": [row._asdict() for row in rows],
        "faults": [each._asdict() for each in run.faults],
        "rests": [{**each._asdict(), "held": each.held._asdict()} for each in run.watch.rests],
        "canary": {place: each._asdict() for place, each in found.items()},
        "calls": [call._asdict() for call in run.calls],
    }


if __name__ == "__main__":
    sys.exit(main())
