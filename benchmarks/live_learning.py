"""A server that learns, one whose draft is frozen, and one with the learned drafts and the memory, in turn, over HTTP.

    python -m benchmarks.templated_prompts --out traffic --requests 1500
    python -m benchmarks.live_learning --phases traffic/billing.jsonl traffic/support.jsonl traffic/alerts.jsonl

Every prompt goes to all three servers, one after the other in changing order, so that each is alone while it answers.
The first two have no traffic memory, so that drafts alone are compared; the third has it, and serves what the first one
publishes. Traffic is of one file after the other, each for `--seconds`, then of the first one once more, for a fifth of
that. Answers are seeded and must be equal, which is checked; temperatures alternate from prompt to prompt.

A row is a fifth of a phase, of one temperature: geometric means of the ratios of tokens a second over the frozen
server, with 95 % intervals (Student's t on their logarithms), and tokens a round. After each phase: what the learner
has done, and with how much processor time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.server_process import free_port, running_server
from aurora_lit.config import load_config
from aurora_lit.learn.pretrain.prompts import read_prompts
from benchmarks.paired import Arm, Outcome, interval, run

_SERVERS = {
    "learning": ["memory.capacity_mb=0"],
    "frozen": ["memory.capacity_mb=0", "learn.enabled=false", "checkpoint.run=frozen"],
    "both": ["learn.enabled=false"],
}
_PARTS = 5
Json = dict[str, Any]


def status(port: int) -> Json:
    """A server's status, and its learner's processor seconds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/aurora/status", timeout=60) as response:
        found: Json = json.load(response)
    if pid := found["learner"]["pid"]:
        times = psutil.Process(pid).cpu_times()
        found["learner"]["processor_s"] = times.user + times.system
        found["learner"]["resident_mb"] = psutil.Process(pid).memory_info().rss >> 20
    return found


def row(turns: list[dict[str, Outcome]]) -> Json:
    """Ratios over the frozen server, and tokens a round of each."""
    found: Json = {"turns": len(turns), "unequal": sum(len({each.texts[0] for each in t.values()}) > 1 for t in turns)}
    for name in ("learning", "both"):
        ratios = [turn[name].tokens_per_s / turn["frozen"].tokens_per_s for turn in turns]
        found[name] = interval(ratios)
    for name in _SERVERS:
        tokens, rounds = (sum(getattr(turn[name], field) for turn in turns) for field in ("tokens", "rounds"))
        found[f"{name}_tokens_a_round"] = tokens / rounds
    return found


def main() -> int:
    """Measure and print; exit code 1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", type=Path, required=True, help="JSONL files of prompts")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each phase")
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=lambda text: None if text == "default" else float(text),
        default=[0.0, None],
        help="default: requests do not name one",
    )
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("live-learning.json"))
    parser.add_argument("overrides", nargs="*", help="key=value for all servers, after `--`")
    options = parser.parse_args()
    temperatures = itertools.cycle(options.temperatures)
    rows: list[Json] = []
    with ExitStack() as stack:
        drafts = stack.enter_context(tempfile.TemporaryDirectory())
        ports = {}
        for name, settings in _SERVERS.items():
            config = load_config(None, [f"checkpoint.dir={drafts}", *settings, *options.overrides])
            config = replace(config, server=replace(config.server, port=free_port()))
            stack.enter_context(running_server(config, options.out.with_suffix(f".{name}.log")))
            ports[name] = config.server.port
        names = list(ports)
        phases = [(path, options.seconds, _PARTS) for path in options.phases]
        for number, (path, seconds, parts) in enumerate([*phases, (phases[0][0], options.seconds / _PARTS, 1)]):
            prompts = itertools.cycle([prompt.messages[0] for prompt in read_prompts(path)])
            began = time.monotonic()
            for part in range(parts):
                turns: dict[float | None, list[dict[str, Outcome]]] = defaultdict(list)
                while time.monotonic() < began + seconds * (part + 1) / parts:
                    prompt, temperature = next(prompts), next(temperatures)
                    names.append(names.pop(0))
                    turn = {
                        name: run(
                            ports[name],
                            [prompt],
                            Arm(True, temperature, True),
                            max_tokens=options.max_tokens,
                            seed=len(turns[temperature]),
                            setting="",
                        )
                        for name in names
                    }
                    turns[temperature].append(turn)
                for temperature, of_temperature in turns.items():
                    if len(of_temperature) < 2:
                        continue
                    named = "default" if temperature is None else temperature
                    about = {"phase": number, "traffic": path.stem, "part": part, "temperature": named}
                    rows.append({**about, **row(of_temperature)})
                    print(json.dumps(rows[-1]), flush=True)
            print(json.dumps({"learner": status(ports["learning"])["learner"]}), flush=True)
        report = {name: status(port) for name, port in ports.items()}
    options.out.write_text(
        json.dumps({"overrides": options.overrides, "rows": rows, "status": report}, indent=2) + "\n"
    )
    report_console().print(_table(rows))
    return int(any(each["unequal"] for each in rows))


def _table(rows: list[Json]) -> Table:
    heads = ("traffic", "part", "temperature", "turns", "learning / frozen", "both / frozen", "tokens a round")
    table = Table(*heads, caption="tokens a round: learning, frozen, both")
    for each in rows:
        ratios = ["{:.3f} ({:.3f}–{:.3f})".format(*each[name]) for name in ("learning", "both")]
        lengths = ", ".join(f"{each[f'{name}_tokens_a_round']:.2f}" for name in _SERVERS)
        table.add_row(
            each["traffic"], str(each["part"]), str(each["temperature"]), str(each["turns"]), *ratios, lengths
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
