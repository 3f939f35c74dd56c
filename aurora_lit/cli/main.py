"""The command line: `aurora-lit COMMAND [OPTIONS] [key=value ...]`.

Leaves out every command's work: a command reads its configuration, then calls one function of another file. Those
files are imported inside the commands, so that `--help` and a misspelt key answer at once, before torch is loaded.
"""

from pathlib import Path
from typing import Any

import click

import aurora_lit
from aurora_lit.cli.live import drafts, export, learn, status
from aurora_lit.cli.options import FILE, FOLDER, AuroraGroup, ManyFilesCommand, configured
from aurora_lit.cli.replay import replay
from aurora_lit.config import AuroraConfig


@click.group(cls=AuroraGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(aurora_lit.__version__, prog_name="aurora-lit")
def main() -> None:
    """An OpenAI-style server with lossless speculative decoding.

    Every command takes settings as trailing `key=value`, such as engine.max_batch_size=4.
    """


for _command in (learn, status, drafts, export, replay):
    main.add_command(_command)


@main.command()
@configured
def serve(config: AuroraConfig) -> None:
    """Serve the target on /v1/chat/completions and /v1/completions."""
    from aurora_lit.serve.server import serve as run

    run(config)


@main.command()
@click.option("-p", "--prompt", required=True, help="What the user says.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--compare-plain/--no-compare-plain",
    default=True,
    show_default=True,
    help="Also decode plainly, and print both speeds.",
)
@configured
def generate(config: AuroraConfig, prompt: str, max_tokens: int, temperature: float, compare_plain: bool) -> None:
    """Answer one prompt here; accepted and corrected tokens are coloured."""
    from aurora_lit.cli.generate import generate as run

    run(config, prompt=prompt, max_tokens=max_tokens, temperature=temperature, compare_plain=compare_plain)


@main.command(cls=ManyFilesCommand)
@click.option(
    "--prompts",
    type=FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="JSON lines of prompts: read, then answered by the target.",
)
@click.option("--text", type=FILE, multiple=True, metavar="FILE...", help="Plain text: read only.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the new checkpoint.")
@click.option("--start-from", type=FOLDER, help="Draft checkpoint to go on from; a new draft if left out.")
@click.option(
    "--text-positions", type=click.IntRange(min=0), default=1_000_000, show_default=True, help="Text to read."
)
@click.option("--answers", type=click.IntRange(min=1), help="Prompts to answer, the files in turn; all if left out.")
@click.option("--max-answer-tokens", type=click.IntRange(min=1), default=160, show_default=True)
@click.option(
    "--sampled-share",
    type=click.FloatRange(0, 1),
    default=1 / 3,
    show_default="1/3",
    help="Share of the answers sampled at temperature 0.7; the others are greedy.",
)
@click.option("--positions", type=click.IntRange(min=1), default=3_000_000, show_default=True, help="To learn from.")
@click.option("--batch-positions", type=click.IntRange(min=64), default=1024, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--draft-vocab-size", type=click.IntRange(min=16), default=16_384, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@configured
def pretrain(config: AuroraConfig, **options: Any) -> None:
    """Make a first draft from prompts and text; start it again to go on where it was stopped."""
    from aurora_lit.learn.pretrain.stages import PretrainOptions
    from aurora_lit.learn.pretrain.stages import pretrain as run

    run(config, PretrainOptions(**options))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@configured
def doctor(config: AuroraConfig, as_json: bool) -> None:
    """Check whether this machine can serve; exit code 1 if not."""
    from aurora_lit.cli.doctor import doctor as run

    if not run(config, as_json=as_json):
        click.get_current_context().exit(1)


@main.group()
def bench() -> None:
    """Measure speed and acceptance."""


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts taken from each file.")
@click.option("--batch", default="1,4,8", show_default=True, help="Batch sizes.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--out", type=FOLDER, default=Path("bench-results"), show_default=True)
@click.option("--against-transformers", is_flag=True, help="Also time transformers' own generate.")
@configured
def throughput(config: AuroraConfig, batch: str, **options: Any) -> None:
    """Tokens a second, plain against the draft, interleaved; writes JSON and a PNG."""
    batch_sizes = _numbers(batch, "--batch", least=1)
    from aurora_lit.bench.throughput import run

    run(config, batch_sizes=batch_sizes, **options)


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts taken from each file.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--out", type=FOLDER, default=Path("bench-results"), show_default=True)
@configured
def acceptance(config: AuroraConfig, **options: Any) -> None:
    """Accepted length and acceptance by position, one row a prompt file; writes JSON."""
    from aurora_lit.bench.acceptance import run

    run(config, **options)


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--measure", type=FILE, multiple=True, metavar="FILE...", help="Prompts to measure on, never learnt.")
@click.option("--requests", type=click.IntRange(min=1), default=400, show_default=True, help="Requests of traffic.")
@click.option("--measure-requests", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Clients at a time.")
@click.option(
    "--static-requests", type=click.IntRange(min=1), help="Traffic of the arms that do not learn; all if left out."
)
@click.option(
    "--arms", default="static,learning", show_default=True, help="Of plain, static, learning: servers, in this order."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--window", type=click.IntRange(min=1), default=40, show_default=True, help="Requests of a reading.")
@click.option("--out", type=FOLDER, default=Path("bench-results"), show_default=True)
@configured
def online(config: AuroraConfig, arms: str, **options: Any) -> None:
    """A draft that learns from traffic against the same one that does not, and none; writes JSON and a PNG."""
    from aurora_lit.bench.online import run

    run(config, arms=tuple(arms.split(",")), **options)


@bench.command("stream")
@click.option("--stream", type=FILE, required=True, help="YAML of the phases; see benchmarks/stream.yaml.")
@click.option("--prompts", type=FOLDER, help="Folder of the prompt files it names. Default: where it lies.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the recorded traces.")
@configured
def record_stream(config: AuroraConfig, **options: Any) -> None:
    """Record a stream of changing traffic for `bench ablation`; start it again to go on where it was stopped."""
    from aurora_lit.bench.stream import run

    run(config, **options)


@bench.command()
@click.option("--traces", type=FOLDER, required=True, help="What `bench stream` recorded.")
@click.option("--arms", default="static,kl,lk,ppo,full", show_default=True, help="Learners to compare.")
@click.option("--seeds", default="0", show_default=True, help="Such as 0,1,2.")
@click.option("--steps-per-request", type=click.FloatRange(min=0), default=0.05, show_default=True, help="Of learning.")
@click.option("--every", type=click.IntRange(min=1), default=4, show_default=True, help="One in so many is offered.")
@click.option("--block", type=click.IntRange(min=1), default=32, show_default=True, help="Requests between trials.")
@click.option("--out", type=FOLDER, default=Path("ablation-results"), show_default=True)
@configured
def ablation(config: AuroraConfig, arms: str, seeds: str, **options: Any) -> None:
    """What each part of learning is worth on a recorded stream; start it again to go on where it was stopped."""
    numbers = _numbers(seeds, "--seeds", least=0)
    from aurora_lit.bench.ablation.run import run

    run(config, arms=tuple(arms.split(",")), seeds=numbers, **options)


@bench.command()
@click.option("--traces", type=FOLDER, required=True, help="What `bench stream` recorded.")
@click.option("--shuffles", type=click.IntRange(min=0), default=10, show_default=True, help="Random orders of it.")
@click.option("--out", type=FOLDER, default=Path("bench-results"), show_default=True)
@configured
def shifts(config: AuroraConfig, **options: Any) -> None:
    """How soon the domain detector notices a stream's phases, and how often it is wrong; writes JSON."""
    from aurora_lit.bench.shifts import run

    run(config, **options)


def _numbers(text: str, option: str, *, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        raise click.BadParameter(f"{text!r} is no list of numbers; write numbers such as 1,4,8", param_hint=option)
    return numbers
