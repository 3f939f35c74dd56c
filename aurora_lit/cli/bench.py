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
    "--temperature", type=click.FloatRange(0, 2), help="0: greedy. Default: the model's own, else greedy."
)
_RESULTS = click.option(
    "--out", type=FOLDER, default=Path("bench-results"), show_default=True, help="Folder for the results."
)


@click.group()
def bench() -> None:
    """Measure speed and acceptance on prompts of your own."""


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
    batch_sizes = _integers(batch, "--batch")
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


@bench.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="PATH")
@click.option(
    "--minutes", type=click.FloatRange(2, 120), default=16.0, show_default=True, help="How long it may take in all."
)
@click.option("--clients", type=click.IntRange(1, 64), default=1, show_default=True, help="That send its requests.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which places of the history are asked about.")
@_RESULTS
@configured
def repository(config: AuroraConfig, folder: Path, **options: Any) -> None:
    """Measure what memory and learner gain on the code of a git repository. Writes JSON and a PNG.

    Requests out of its history are sent to two servers, one after the other, and the answers to those of other commits
    are timed: decoding alone, the shipped draft, with the memory, with the learned draft, with both.
    """
    from aurora_lit.bench.repository import run

    run(config, folder, **options)


def _integers(text: str, option: str) -> tuple[int, ...]:
    """The numbers in a list such as 1,4,8."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{text!r} is not a list of numbers; write numbers such as 1,4,8", param_hint=option)
    return numbers
