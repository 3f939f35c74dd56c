"""The command line: `aurora-lit COMMAND [OPTIONS] [key=value ...]`.

Leaves out every command's work: a command reads its configuration, then calls one function of another file. Those
files are imported inside the commands, so that `--help` and a misspelt key answer at once, before torch is loaded.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import aurora_lit
from aurora_lit.config import AuroraConfig, load_config, to_yaml
from aurora_lit.errors import AuroraError

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


class AuroraGroup(click.Group):
    """Prints our own errors as one line and ends with exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except AuroraError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


class ManyFilesCommand(click.Command):
    """Lets an option for files take several, as a shell's `*` gives them: `--prompts a.jsonl b.jsonl`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its files; an option or a key=value ends the list."""
        many = {name for parameter in self.params if parameter.multiple for name in parameter.opts}
        spread: list[str] = []
        current = None
        for word in args:
            if word.startswith("-"):
                current = word if word in many else None
                spread += [] if current else [word]
            elif current and "=" not in word:
                spread += [current, word]
            else:
                current = None
                spread.append(word)
        return super().parse_args(ctx, spread)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--config FILE`, `--print-config` and trailing overrides; it receives `config`."""

    @click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        is_eager=True,
        help="YAML file of the deployment. Default: configs/smollm2.yaml.",
    )
    @click.option("--print-config", is_flag=True, is_eager=True, help="Print the settings that would be used, and end.")
    @click.argument("config", nargs=-1, metavar="[key=value]...", is_eager=True, callback=_read_config)
    @functools.wraps(command)
    def wrapper(config_file: Path | None, print_config: bool, **options: Any) -> None:
        command(**options)

    return wrapper


def _read_config(ctx: click.Context, _: click.Parameter, overrides: tuple[str, ...]) -> AuroraConfig:
    """Runs after the two options and before all others, so --print-config needs none of a command's own."""
    config = load_config(ctx.params.get("config_file"), overrides)
    if ctx.params.get("print_config"):
        click.echo(to_yaml(config), nl=False)
        ctx.exit()
    return config


@click.group(cls=AuroraGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(aurora_lit.__version__, prog_name="aurora-lit")
def main() -> None:
    """An OpenAI-style server with lossless speculative decoding.

    Every command takes settings as trailing `key=value`, such as engine.max_batch_size=4.
    """


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
    from aurora_lit.generate import generate as run

    run(config, prompt=prompt, max_tokens=max_tokens, temperature=temperature, compare_plain=compare_plain)


@main.command(cls=ManyFilesCommand)
@click.option(
    "--prompts",
    type=_FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="JSON lines of prompts: read, then answered by the target.",
)
@click.option("--text", type=_FILE, multiple=True, metavar="FILE...", help="Plain text: read only.")
@click.option("--out", type=_FOLDER, required=True, help="Folder of the new checkpoint.")
@click.option(
    "--text-positions", type=click.IntRange(min=0), default=1_000_000, show_default=True, help="Text to read."
)
@click.option("--answers", type=click.IntRange(min=1), help="Prompts to answer, the files in turn; all if left out.")
@click.option("--max-answer-tokens", type=click.IntRange(min=1), default=160, show_default=True)
@click.option("--positions", type=click.IntRange(min=1), default=3_000_000, show_default=True, help="To learn from.")
@click.option("--batch-positions", type=click.IntRange(min=64), default=1024, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--draft-vocab-size", type=click.IntRange(min=16), default=12_288, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@configured
def pretrain(config: AuroraConfig, **options: Any) -> None:
    """Make a first draft from prompts and text; start it again to go on where it was stopped."""
    from aurora_lit.pretrain import PretrainOptions
    from aurora_lit.pretrain import pretrain as run

    run(config, PretrainOptions(**options))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@configured
def doctor(config: AuroraConfig, as_json: bool) -> None:
    """Check whether this machine can serve; exit code 1 if not."""
    from aurora_lit.doctor import doctor as run

    if not run(config, as_json=as_json):
        click.get_current_context().exit(1)


@main.group()
def bench() -> None:
    """Measure speed and acceptance."""


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=_FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts taken from each file.")
@click.option("--batch", default="1,4,8", show_default=True, help="Batch sizes.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--out", type=_FOLDER, default=Path("bench-results"), show_default=True)
@click.option("--against-transformers", is_flag=True, help="Also time transformers' own generate.")
@configured
def throughput(config: AuroraConfig, batch: str, **options: Any) -> None:
    """Tokens a second, plain against the draft, interleaved; writes JSON and a PNG."""
    batch_sizes = _batch_sizes(batch)
    from aurora_lit.bench.throughput import run

    run(config, batch_sizes=batch_sizes, **options)


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=_FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts taken from each file.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--out", type=_FOLDER, default=Path("bench-results"), show_default=True)
@configured
def acceptance(config: AuroraConfig, **options: Any) -> None:
    """Accepted length and acceptance by position, one row a prompt file; writes JSON."""
    from aurora_lit.bench.acceptance import run

    run(config, **options)


@bench.command(cls=ManyFilesCommand)
@click.option("--prompts", type=_FILE, multiple=True, required=True, metavar="FILE...", help="JSON lines of prompts.")
@click.option("--measure", type=_FILE, multiple=True, metavar="FILE...", help="Prompts to measure on, never learnt.")
@click.option("--requests", type=click.IntRange(min=1), default=400, show_default=True, help="Requests of traffic.")
@click.option("--measure-requests", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True, help="Clients at a time.")
@click.option("--arms", default="static,learning", show_default=True, help="Servers to compare, in this order.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--window", type=click.IntRange(min=1), default=40, show_default=True, help="Requests of a reading.")
@click.option("--out", type=_FOLDER, default=Path("bench-results"), show_default=True)
@configured
def online(config: AuroraConfig, arms: str, **options: Any) -> None:
    """A draft that learns from traffic against the same one that does not; writes JSON and a PNG."""
    from aurora_lit.bench.online import run

    run(config, arms=tuple(arms.split(",")), **options)


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{text!r} is no list of sizes; write numbers such as 1,4,8", param_hint="--batch")
    return sizes
