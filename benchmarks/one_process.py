"""Settings of speculation compared on one target in one process, prompt by prompt.

    python -m benchmarks.one_process --prompts bills.jsonl --arm plain=engine.speculate=false --arm default=
    python -m benchmarks.one_process --prompts bills.jsonl --arm shipped= --arm learned=draft.checkpoint=FOLDER

Two servers with the same settings differ by several per cent, decoding plainly too: their processes lie elsewhere in
memory, on other cores, beside other work. Here all arms share one target's weights, and each has an engine of its own
on them: slots, draft, memory, planner and measured costs. Every prompt is answered by all arms, in random order, before
the next one; another temperature goes on where the last one ended, so that no answer is remembered from there. Answers
are seeded and must be equal, which is checked. What HTTP and a learner add is left out, for which there are
benchmarks/paired.py and benchmarks/live_learning.py.

A row is an arm at a temperature: the geometric mean of its tokens a second over the first arm's, with a 95 % interval
(Student's t on the logarithms), prompts included. Naming the same settings twice shows what is chance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from aurora_lit.bench.load import interval
from aurora_lit.bench.prompts import BenchPrompt, answer_prompts, load_prompts, params_for
from aurora_lit.bench.reporting import report_console
from aurora_lit.config import load_config
from aurora_lit.errors import ConfigError
from aurora_lit.machine import use_threads
from aurora_lit.progress import Progress
from aurora_lit.request import PLANS, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.serve.worker.load_models import load_serving_target


class Turn(NamedTuple):
    """What one arm made of the prompts that it got at the same time."""

    tokens: list[list[int]]
    """Of each answer."""
    seconds: float
    """From the first submission to the last token, prompts included."""
    plans: list[int]
    """Rounds, by PLANS."""

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Prompts included."""
        return self.num_tokens / self.seconds


def build_arms(
    arms: Mapping[str, list[str]], overrides: Sequence[str], *, config: Path | None = None
) -> tuple[dict[str, Engine], Any]:
    """An engine for each arm, on one target, and the tokenizer. Raises ConfigError if arms have different targets."""
    configs = {name: load_config(config, [*overrides, *own]) for name, own in arms.items()}
    first = next(iter(configs.values()))
    use_threads(first.engine.threads)
    target, engines, tokenizer = load_serving_target(first), {}, None
    for name, config in configs.items():
        if config.target != first.target:
            raise ConfigError(f"--arm {name}: arms share one target; name target.* after `--`, for all of them")
        engines[name], tokenizer = build_engine(config, target=target)
    return engines, tokenizer


def answer(engine: Engine, prompts: Sequence[BenchPrompt], params: SamplingParams) -> Turn:
    """Answer prompts that arrive at the same time."""
    before = list(engine.counters.rounds_by_plan)
    found = answer_prompts(engine, prompts, params)
    plans = [now - then for now, then in zip(engine.counters.rounds_by_plan, before, strict=True)]
    return Turn([each.token_ids for each in found.answers], found.seconds, plans)


def row(turns: Sequence[Mapping[str, Turn]], arm: str) -> dict[str, Any]:
    """What an arm comes to beside the first one."""
    first = next(iter(turns[0]))
    own = [turn[arm] for turn in turns]
    tokens, rounds = sum(each.num_tokens for each in own), sum(sum(each.plans) for each in own)
    ratios = [turn[arm].tokens_per_s / turn[first].tokens_per_s for turn in turns]
    return {
        "arm": arm,
        "ratio": (1.0, 1.0, 1.0) if arm == first else interval(ratios),
        "tokens_per_s": tokens / sum(each.seconds for each in own),
        "tokens_a_round": tokens / rounds,
        "plans": {name: sum(each.plans[i] for each in own) / rounds for i, name in enumerate(PLANS)},
        "unequal": sum(turn[arm].tokens != turn[first].tokens for turn in turns),
        "turns": len(turns),
    }


def parse_arm(text: str) -> tuple[str, list[str]]:
    """`NAME=KEY=VALUE,KEY=VALUE`; nothing after the first = for the defaults."""
    name, _, settings = text.partition("=")
    return name, [each for each in settings.split(",") if each]


def main() -> int:
    """Measure and print; exit code 1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSONL files, taken in turn")
    parser.add_argument("--config", type=Path, help="a preset's name or a YAML file; without it that of SmolLM2")
    parser.add_argument("--skip", type=int, default=0, help="prompts to begin after")
    parser.add_argument(
        "--arm", dest="arms", action="append", required=True, metavar="NAME=KEY=VALUE,…", help="twice or more"
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--clients", type=int, default=1, help="prompts that arrive at the same time")
    parser.add_argument("--turns", type=int, default=100, help="counted ones of each temperature")
    parser.add_argument("--warm-up", type=int, default=10, help="turns of each temperature that are not counted")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeat", action="store_true", help="ask prompts again where there are too few")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for all arms, after `--`")
    options = parser.parse_args()
    arms = dict(map(parse_arm, options.arms))
    if len(arms) < max(2, len(options.arms)):
        parser.error("--arm is needed twice or more, with different names")
    rows = measure(arms, options)
    if options.out:
        options.out.write_text(
            json.dumps({"overrides": options.overrides, "arms": arms, "rows": rows}, indent=2) + "\n"
        )
    return int(any(found["unequal"] for found in rows))


def measure(arms: Mapping[str, list[str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Take all turns, and print the table."""
    engines, tokenizer = build_arms(arms, options.overrides, config=options.config)
    room = next(iter(engines.values())).max_seq_len - options.max_tokens
    prompts = load_prompts(options.prompts, limit=None, tokenizer=tokenizer, max_prompt_tokens=room)[options.skip :]
    if not prompts:
        raise ConfigError(f"--skip {options.skip}: --prompts have no more prompts than that")
    most = len(options.temperatures) * (options.warm_up + options.turns) * options.clients
    if len(prompts) < most and not options.repeat:
        raise ConfigError(
            f"{len(prompts)} prompts are too few for {most}: one that came again would find its own answer in the "
            "memory; name longer files or fewer --turns, or --repeat"
        )
    asked, order, rows, console = itertools.cycle(prompts), random.Random(0), [], report_console()
    table = Table("temperature", "arm", "over the first", "95 %", "tokens/s", "tokens a round", "rounds", "unequal")
    with Progress("comparing", len(options.temperatures) * (options.warm_up + options.turns), "turns") as progress:
        for temperature in options.temperatures:
            turns = []
            for seed in range(options.warm_up + options.turns):
                params = replace(params_for(temperature, max_tokens=options.max_tokens), seed=seed)
                together = list(itertools.islice(asked, options.clients))
                found = {
                    name: answer(engines[name], together, params) for name in order.sample(list(engines), len(engines))
                }
                turns.append({name: found[name] for name in engines})
                progress.advance()
            for name in engines:
                rows.append({"temperature": temperature, **row(turns[options.warm_up :], name)})
                table.add_row(*cells(rows[-1]))
    console.print(table)
    return rows


def cells(found: dict[str, Any]) -> list[str]:
    """A row as it is printed."""
    mean, low, high = found["ratio"]
    plans = " ".join(f"{name} {share:.0%}" for name, share in found["plans"].items() if share >= 0.005)
    speed, length = f"{found['tokens_per_s']:.0f}", f"{found['tokens_a_round']:.2f}"
    ratio = [f"{mean:.3f}", f"{low:.3f}–{high:.3f}"]
    return [f"{found['temperature']:g}", found["arm"], *ratio, speed, length, plans, str(found["unequal"])]


if __name__ == "__main__":
    sys.exit(main())
