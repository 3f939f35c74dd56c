"""The options of the commands of `aurora-lit bench`. What they run is in aurora_lit/bench/."""

from pathlib import Path
from typing import Any

import click

from aurora_lit.cli.options import FILE, FOLDER, MultiFileCommand, configured
from aurora_lit.config import AuroraConfig

_PROMPTS = click.option(
    "--prompts", type=FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts."
)
_LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Maximum number of prompts from each file.")
_MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Maximum number of new tokens."
)
_TEMPERATURE = click.option(
    "--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0: greedy."
)
_RESULTS = click.option(
    "--out", type=FOLDER, default=Path("bench-results"), show_default=True, help="Folder for the results."
)
_RECORDED_STREAM = click.option(
    "--traces", type=FOLDER, required=True, help="Folder that `aurora-lit bench stream` wrote."
)


@click.group()
def bench() -> None:
    """Measure speed, acceptance and learning on prompts of your own."""


@bench.command(cls=MultiFileCommand)
@_PROMPTS
@click.option("--limit", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts from each file.")
@click.option("--batch", default="1,4,8", show_default=True, help="Batch sizes.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Repeats of every batch size."
)
@_MAX_TOKENS
@_TEMPERATURE
@_RESULTS
@click.option("--against-transformers", is_flag=True, help="Also time transformers' generate().")
@configured
def throughput(config: AuroraConfig, batch: str, **options: Any) -> None:
    """Measure tokens per second with and without a draft. Writes JSON and a PNG."""
    batch_sizes = _integers(batch, "--batch", minimum=1)
    from aurora_lit.bench.throughput import run

    run(config, batch_sizes=batch_sizes, **options)


@bench.command(cls=MultiFileCommand)
@_PROMPTS
@_LIMIT
@_MAX_TOKENS
@_TEMPERATURE
@_RESULTS
@configured
def acceptance(config: AuroraConfig, **options: Any) -> None:
    """Measure accepted length and acceptance rates. By domain and position; writes JSON."""
    from aurora_lit.bench.acceptance import run

    run(config, **options)


@bench.command(cls=MultiFileCommand)
@_PROMPTS
@click.option(
    "--measure", type=FILE, multiple=True, metavar="FILE...", help="Prompts to measure on, which are not learned from."
)
@click.option("--requests", type=click.IntRange(min=1), default=400, show_default=True, help="Requests of traffic.")
@click.option(
    "--measure-requests", type=click.IntRange(min=1), default=40, show_default=True, help="Measured requests."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Concurrent clients.")
@click.option(
    "--measure-concurrency",
    type=click.IntRange(min=1),
    help="Clients that send the measured requests. Default: as many as for traffic.",
)
@click.option(
    "--phases", is_flag=True, help="Traffic of one file after the other, in equal parts; measured after each of them."
)
@click.option(
    "--static-requests",
    type=click.IntRange(min=1),
    help="Traffic of the arms that do not learn, which needs memory.capacity_mb=0. Default: all.",
)
@click.option(
    "--arms",
    default="static,learning",
    show_default=True,
    help="Servers to compare, some of plain, static, learning; run in this order.",
)
@_MAX_TOKENS
@click.option("--window", type=click.IntRange(min=1), default=40, show_default=True, help="Requests in each window.")
@_RESULTS
@configured
def online(config: AuroraConfig, arms: str, **options: Any) -> None:
    """Compare a learning draft, a static one and none. Runs servers over HTTP; writes JSON and a PNG.

    Compare arms by tokens a round, of all rounds. Accepted length is of rounds with proposals only: it falls where a
    better draft proposes in harder rounds too.
    """
    from aurora_lit.bench.online import run

    run(config, arms=tuple(arms.split(",")), **options)


@bench.command("stream")
@click.option(
    "--stream", type=FILE, required=True, help="YAML file of the phases; see the repository's benchmarks/stream.yaml."
)
@click.option("--prompts", type=FOLDER, help="Folder of the prompt files. Default: the folder of the YAML file.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the recorded traces.")
@configured
def record_stream(config: AuroraConfig, **options: Any) -> None:
    """Record a stream of changing traffic. Run it again to continue where it stopped."""
    from aurora_lit.bench.stream import run

    run(config, **options)


@bench.command()
@_RECORDED_STREAM
@click.option("--arms", default="static,memory,full,both", show_default=True, help="What to compare.")
@click.option("--seeds", default="0", show_default=True, help="Seeds, such as 0,1,2.")
@click.option(
    "--steps-per-request",
    type=click.FloatRange(min=0),
    default=0.05,
    show_default=True,
    help="Optimiser steps per request of the stream.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Score and learn from one of this many requests.",
)
@click.option("--block", type=click.IntRange(min=1), default=32, show_default=True, help="Requests between two trials.")
@click.option("--shuffle-phases", is_flag=True, help="Each seed but 0 has its own order of phases.")
@click.option("--out", type=FOLDER, default=Path("ablation-results"), show_default=True, help="Folder for the results.")
@configured
def ablation(config: AuroraConfig, arms: str, seeds: str, **options: Any) -> None:
    """Compare learners and the memory on a recorded stream. Run it again to continue where it stopped."""
    seed_numbers = _integers(seeds, "--seeds", minimum=0)
    from aurora_lit.bench.ablation.run import run

    run(config, arms=tuple(arms.split(",")), seeds=seed_numbers, **options)


@bench.command()
@_RECORDED_STREAM
@click.option(
    "--shuffles",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Random orders of the stream in which false alarms are counted.",
)
@_RESULTS
@configured
def shifts(config: AuroraConfig, **options: Any) -> None:
    """Measure the domain detector's delay and false alarms. On a recorded stream; writes JSON."""
    from aurora_lit.bench.shifts import run

    run(config, **options)


def _integers(text: str, option: str, *, minimum: int) -> tuple[int, ...]:
    """The numbers in a list such as 1,4,8."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < minimum:
        raise click.BadParameter(f"{text!r} is not a list of numbers; write numbers such as 1,4,8", param_hint=option)
    return numbers
