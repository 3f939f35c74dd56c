"""The commands: `answers`, `prepare`, `compare` (see `python -m benchmarks.memory_replay --help`)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import benchmarks.memory_replay
from aurora_lit.bench.prompts import repeated_share
from aurora_lit.bench.reporting import progress_bar, report_console
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError

from .answers import SETTINGS, make_answers
from .environment import ARCTIC, prepare
from .proposers import ARMS, SHARED_ARMS
from .reliability import reliability_table
from .replay import Recorded, Replayed, read_answers, replay_all
from .report import cost_table, curve_table, token_table

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run one of them."""
    arguments = _arguments()
    console = report_console()
    try:
        if arguments.command == "answers":
            config = load_config(arguments.config, [*SETTINGS, *arguments.overrides])
            with progress_bar(Console(stderr=True)) as progress:
                paths = make_answers(
                    config,
                    arguments.prompts,
                    arguments.out,
                    temperature=arguments.temperature,
                    requests=arguments.requests,
                    max_tokens=arguments.max_tokens,
                    seed=arguments.seed,
                    progress=progress,
                )
            print(*paths, sep="\n")
        elif arguments.command == "prepare":
            print(prepare(arguments.work.expanduser().absolute() / "arctic"))
        else:
            _compare(arguments, console)
    except AuroraError as error:
        console.print(f"[red]{error}[/]")
        return 1
    return 0


def _compare(arguments: argparse.Namespace, console: Console) -> None:
    found = sorted(arguments.answers.absolute().glob("*.jsonl"))
    paths = [path for path in found if not arguments.domains or path.stem.rpartition("-")[0] in arguments.domains]
    if not paths:
        raise AuroraError(f"no answers in {arguments.answers}; `python -m benchmarks.memory_replay answers` makes them")
    files = [read_answers(path) for path in paths]
    replays = list(replay_all(SHARED_ARMS if arguments.shared else ARMS, files, shared=arguments.shared))
    if arguments.arctic is not None:
        replays += _replay_arctic(arguments.arctic, paths, shared=arguments.shared)
    for temperature in sorted({replayed.temperature for replayed in replays}):
        own = [replayed for replayed in replays if replayed.temperature == temperature]
        repeated = {f[0].domain: _repeated(f) for f in files if f[0].temperature == temperature}
        console.print(token_table(own, repeated), curve_table(own), cost_table(own), sep="\n")
    if arguments.reliability:
        for temperature in sorted({requests[0].temperature for requests in files}):
            console.print(f"temperature {temperature:g}")
            console.print(reliability_table([f for f in files if f[0].temperature == temperature]))
    if arguments.out is not None:
        report = {"arctic": ARCTIC, "replays": [asdict(replayed) for replayed in replays]}
        arguments.out.write_text(json.dumps(report) + "\n", encoding="utf-8")


def _repeated(requests: list[Recorded]) -> float:
    return repeated_share([recorded.answer for recorded in requests])


def _replay_arctic(python: Path, paths: list[Path], *, shared: bool) -> list[Replayed]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "replays.json"
        command = [python, "-m", "benchmarks.memory_replay.arctic", "--out", out, "--answers", *paths]
        done = subprocess.run([*map(str, command), *(["--shared"] if shared else [])], cwd=_ROOT)
        if done.returncode:
            raise AuroraError(f"{python} could not replay; `python -m benchmarks.memory_replay prepare` makes one")
        return [Replayed.from_json(fields) for fields in json.loads(out.read_text(encoding="utf-8"))]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=benchmarks.memory_replay.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    answers = commands.add_parser("answers", help="let the target answer prompts")
    answers.add_argument("--prompts", nargs="+", type=Path, required=True)
    answers.add_argument("--out", type=Path, required=True, help="folder")
    answers.add_argument("--requests", type=int, default=220, help="of each file")
    answers.add_argument("--temperature", type=float, default=0.0)
    answers.add_argument("--max-tokens", type=int, default=128, help="of an answer")
    answers.add_argument("--seed", type=int, default=0)
    answers.add_argument("--config", type=Path)
    answers.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    environment = commands.add_parser("prepare", help="make the environment for arctic-inference")
    environment.add_argument("--work", type=Path, required=True, help="folder; the environment is in WORK/arctic")
    compare = commands.add_parser("compare", help="replay answers and print tables")
    compare.add_argument("--answers", type=Path, required=True, help="folder of `answers`")
    compare.add_argument("--domains", nargs="+", default=[], help="only these")
    compare.add_argument("--arctic", type=Path, help="interpreter with arctic-inference; left out: without it")
    compare.add_argument("--shared", action="store_true", help="one memory for all domains, whose requests take turns")
    compare.add_argument("--reliability", action="store_true", help="also print how reliable copies are")
    compare.add_argument("--out", type=Path, help="file for all counts, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
