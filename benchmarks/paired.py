"""Speculation on against off, over HTTP, in pairs inside one server.

    python benchmarks/paired.py --prompts chat.jsonl code.jsonl sql.jsonl summarize.jsonl --pairs 60
    python benchmarks/paired.py --prompts ... --temperatures 0 1 --clients 1 8 --out paired -- target.precision=bf16
    python benchmarks/paired.py --config qwen2.5-coder-0.5b --prompts ... --by-file -- memory.scope=off

A pair is the same requests sent twice, once with the request's field `speculate` true and once with false, in changing
order; with several clients each sends one of them at the same time. Requests are seeded, so both answers of a pair are
equal, which is checked. A pair's ratio is that of tokens a second, from the first request to the last answer, the
reading of prompts included. The table gives the geometric mean of the ratios with its 95 % interval (Student's t on
their logarithms), and how many rounds proposed anything while speculation was on. The learner is off unless an
override enables it.

Each half has a `cache_salt` of its own, or the second half of a pair would find the first one's prompt in the prefix
cache, and its answer in the traffic memory. That is empty when a setting begins, and fills with the answers of both
halves, each for itself: both pay for recording, which `store: false` would spare one of them.

Other comparisons: `--against off-greedy` has temperature T without speculation against temperature 0 without it;
`--against plain-neighbour` counts all clients but the last one, whose requests ask for log-probabilities and penalties
in the first half only; `--against no-learner` has a learner, which is stopped (SIGSTOP) in the second half; and with
`--other draft.checkpoint=FOLDER` both speculate and remember, but the second half goes to a second server with these
settings, while the first one waits. `--other-code FOLDER` runs that server from another checkout, which must know the
settings that are given after `--` and keeps its own defaults.

With `--stream` the table also has the 99th percentile of the pauses between two chunks of an answer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from rich.table import Table

from aurora_lit.bench.load import Json, ask, body_of, interval, percentile_ms, send_all, status
from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config, resolved_memory
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.learn.pretrain.prompts import Prompt, read_prompts

_SETTLE_S = 15.0
"""Before anything is measured: a server that has just started times its operations while it is idle, in a first start
for long. Beside that the other one would be slow, and would keep costs that are wrong."""
_NEIGHBOUR = {"logprobs": True, "top_logprobs": 5, "frequency_penalty": 0.3, "presence_penalty": 0.3}


class Arm(NamedTuple):
    """How the requests of one half of a pair are sent."""

    speculate: bool
    temperature: float | None
    """None: the field is left out, so the server's default holds."""
    remembers: bool
    """True: it is recorded and remembered; if it speculates, it may copy from the answers of earlier pairs."""
    server: int = 0
    """Index of the server that they are sent to."""
    streams: bool = False
    neighbour: Literal["", "plain", "logprobs and penalties"] = ""
    """What the last client asks for, whose answers are then not counted."""
    learns: bool = True
    """False: the server's learner is stopped meanwhile."""


class Outcome(NamedTuple):
    """One half of a pair."""

    tokens: int
    tokens_per_s: float
    texts: list[str]
    rounds: int
    speculating_rounds: int
    pauses_s: list[float]


def request_of(prompt: Prompt, arm: Arm, *, max_tokens: int, seed: int, salt: str, **more: Any) -> Json:
    """A request of an arm. `more`: further fields of it."""
    return body_of(
        prompt,
        max_tokens=max_tokens,
        temperature=arm.temperature,
        seed=seed,
        speculate=arm.speculate,
        cache_salt=salt,
        store=arm.remembers,
        stream=arm.streams or None,
        **more,
    )


def rounds_by_plan(url: str) -> dict[str, int]:
    """The server's counters of rounds."""
    plans: dict[str, int] = status(url)["speculation"]["rounds_by_plan"]
    return plans


@contextmanager
def stopped_learner(url: str) -> Iterator[None]:
    """Inside, the server's learner does not run. Raises AuroraError if there is none.

    It is stopped between two turns: while it computes, rounds leave it a core.
    """
    pid = status(url)["learner"]["pid"]
    if not pid:
        raise AuroraError("the server has no learner; leave learn.enabled=false out")
    arguments = [Path(argument) for argument in psutil.Process(pid).cmdline()]
    (page,) = [path / LEARNER_STATUS_NAME for path in arguments if (path / LEARNER_STATUS_NAME).exists()]
    busy_threads = functools.partial(LearnerStatusPage.open(page).peek, "busy_threads")
    os.kill(pid, signal.SIGSTOP)
    try:
        while busy_threads():
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def run(url: str, prompts: Sequence[Prompt], arm: Arm, *, max_tokens: int, seed: int, setting: str) -> Outcome:
    """Send every prompt at the same time. `setting`: names what shares a memory."""
    more: list[Json] = [{} for _ in prompts]
    if arm.neighbour:
        more[-1] = {"ignore_eos": True, **(_NEIGHBOUR if arm.neighbour != "plain" else {})}
    how: Json = {"max_tokens": max_tokens, "seed": seed, "salt": f"{setting}-{arm}"}
    bodies = [request_of(prompt, arm, **how, **fields) for prompt, fields in zip(prompts, more, strict=True)]
    before = rounds_by_plan(url)
    started = time.monotonic()
    answers = send_all(functools.partial(ask, url), bodies, clients=len(bodies))
    if arm.neighbour:
        answers.pop()
    seconds = max(answer.ended_s for answer in answers) - started
    plans = {name: count - before[name] for name, count in rounds_by_plan(url).items()}
    rounds = sum(plans.values())
    tokens = sum(answer.tokens for answer in answers)
    pauses_s = [after - earlier for answer in answers for earlier, after in itertools.pairwise(answer.chunks_s)]
    texts = [answer.text for answer in answers]
    return Outcome(tokens, tokens / seconds, texts, rounds, rounds - plans["plain"], pauses_s)


def measure(
    urls: Sequence[str], asked: Iterator[Prompt], arms: tuple[Arm, Arm], clients: int, options: Any
) -> dict[str, Any]:
    """All pairs of one setting, after some that are not counted; the ratio is that of the first arm over the second."""
    ratios: list[float] = []
    unequal = 0
    sides: tuple[list[Outcome], list[Outcome]] = [], []
    setting = secrets.token_hex(8)
    for pair in range(-options.warm_up, options.pairs):
        prompts = list(itertools.islice(asked, clients))
        order = arms if pair % 2 == 0 else arms[::-1]
        seed = pair + options.warm_up
        halves = {}
        for arm in order:
            url = urls[arm.server]
            with ExitStack() as meanwhile:
                if not arm.learns:
                    meanwhile.enter_context(stopped_learner(url))
                halves[arm] = run(url, prompts, arm, max_tokens=options.max_tokens, seed=seed, setting=setting)
        if pair < 0:
            continue
        one, other = halves[arms[0]], halves[arms[1]]
        ratios.append(one.tokens_per_s / other.tokens_per_s)
        sides[0].append(one)
        sides[1].append(other)
        unequal += one.texts != other.texts if arms[0].temperature == arms[1].temperature else 0
    mean, low, high = interval(ratios)
    return {
        "ratio": mean,
        "low": low,
        "high": high,
        "tokens_per_s": [statistics.median(half.tokens_per_s for half in side) for side in sides],
        "tokens_a_round": [sum(half.tokens for half in side) / sum(half.rounds for half in side) for side in sides],
        "speculating": sum(half.speculating_rounds for half in sides[0]) / sum(half.rounds for half in sides[0]),
        "unequal_pairs": unequal,
        "pairs": len(ratios),
        "pause_p99_ms": [percentile_ms([pause for half in side for pause in half.pauses_s], 99) for side in sides],
    }


def _characters(prompt: Prompt) -> int:
    return len(prompt.raw or "".join(str(turn.get("content") or "") for turn in prompt.chat))


def arms_of(options: argparse.Namespace, temperature: float | None) -> tuple[Arm, Arm]:
    """How the two halves of each pair are sent."""
    arm = Arm(True, temperature, True, streams=options.stream)
    if options.other or options.other_code:
        return arm, arm._replace(server=1)
    plain = arm._replace(speculate=False)
    return {
        "off": (arm, plain),
        "off-greedy": (plain._replace(remembers=False), plain._replace(temperature=0.0, remembers=False)),
        "plain-neighbour": (arm._replace(neighbour="logprobs and penalties"), arm._replace(neighbour="plain")),
        "no-learner": (arm, arm._replace(learns=False)),
    }[options.against]


def main() -> int:
    """Measure and print; exit code 1 if the two answers of a pair differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="file or name of the deployment")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSONL files, taken in turn")
    parser.add_argument("--by-file", action="store_true", help="measure each file by itself")
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=lambda text: None if text == "default" else float(text),
        default=[0.0, 0.7, 1.0],
        help="default: requests do not name one",
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=4, help="pairs before each setting that are not counted")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-prompt-characters", type=int, default=3000)
    second = parser.add_mutually_exclusive_group()
    second.add_argument("--against", choices=["off", "off-greedy", "plain-neighbour", "no-learner"], default="off")
    second.add_argument("--other", nargs="+", default=[], metavar="KEY=VALUE", help="settings of a second server")
    second.add_argument("--other-code", type=Path, metavar="FOLDER", help="checkout that a second server runs from")
    parser.add_argument("--stream", action="store_true", help="ask for streams")
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    if options.against == "plain-neighbour" and min(options.clients) < 2:
        parser.error("--against plain-neighbour needs at least two --clients: the last one is not counted")
    if options.against == "off-greedy" and 0.0 in options.temperatures:
        parser.error("--against off-greedy compares with temperature 0; name others with --temperatures")
    has_learner = options.against == "no-learner"
    scratch = tempfile.TemporaryDirectory()  # for logs and what a learner writes
    overrides = [f"checkpoint.dir={scratch.name}/drafts", f"learn.enabled={has_learner}"]
    configs = [load_config(options.config, [*overrides, *options.overrides])]
    has_second = bool(options.other or options.other_code)
    if has_second:
        # Drafts in a folder of its own, or a server without a learner would serve what the other's has learned.
        own = [*overrides, f"checkpoint.dir={scratch.name}/second"]
        configs.append(load_config(options.config, [*own, *options.overrides, *options.other]))
    configs = [replace(config, server=replace(config.server, port=free_port())) for config in configs]
    most_characters = options.max_prompt_characters
    read = [[p for p in read_prompts(path) if _characters(p) <= most_characters] for path in options.prompts]
    together = {"all": [prompt for group in zip(*read, strict=False) for prompt in group]}
    groups = (
        {path.stem: each for path, each in zip(options.prompts, read, strict=True)} if options.by_file else together
    )
    most = max(options.clients) * (options.pairs + options.warm_up)
    remembers = any(resolved_memory(config).capacity_mb for config in configs)
    for name, prompts in groups.items():
        if not prompts or (remembers and len(prompts) < most):
            parser.error(
                f"{name}: {len(prompts)} prompts are too few for {most} in a setting: one that came again would find "
                "its own answer in the memory; name longer files, or fewer --pairs, or add memory.scope=off"
            )
    asked = {name: itertools.cycle(prompts) for name, prompts in groups.items()}
    columns = ["ratio", "95 % interval", "tokens/s", "tokens a round", "speculating", "unequal", "pairs"]
    columns += ["pause p99, ms"] * options.stream
    table = Table("prompts", "temperature", "clients", *columns)
    rows, urls = [], []
    with ExitStack() as servers:
        servers.enter_context(scratch)
        for number, config in enumerate(configs):
            log = Path(options.out or Path(scratch.name) / "server").with_suffix(f".{number}.log")
            code = options.other_code if number else None
            urls.append(servers.enter_context(running_server(config, log, code=code)))
        time.sleep(_SETTLE_S)
        for name, temperature, clients in itertools.product(groups, options.temperatures, options.clients):
            arms = arms_of(options, temperature)
            found = measure(urls, asked[name], arms, clients, options)
            rows.append({"prompts": name, "temperature": temperature, "clients": clients, **found})
            one, other = found["tokens_per_s"]
            named = "default" if temperature is None else temperature
            cells = [name, named, clients, f"{found['ratio']:.3f}", f"{found['low']:.3f}–{found['high']:.3f}"]
            cells += [f"{one:.0f} / {other:.0f}", "{:.2f} / {:.2f}".format(*found["tokens_a_round"])]
            cells += [f"{found['speculating']:.0%}", found["unequal_pairs"], found["pairs"]]
            if options.stream:
                cells.append(" / ".join("none" if ms is None else f"{ms:.0f}" for ms in found["pause_p99_ms"]))
            table.add_row(*map(str, cells))
            print(*cells, sep="  ", flush=True)
    report_console().print(table)
    if options.out:
        options.out.write_text(
            json.dumps({"overrides": options.overrides, "other": options.other, "rows": rows}, indent=2) + "\n"
        )
    return int(any(row["unequal_pairs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
