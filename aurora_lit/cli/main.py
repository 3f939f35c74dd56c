"""The command line: `aurora-lit COMMAND [OPTIONS] [key=value ...]`.

Each command here declares its options, reads the settings and calls one function of another file. Those files are
imported inside the commands, so that `--help` and a misspelt key are answered before torch is loaded. The commands of
`aurora-lit bench` are in cli/bench.py.
"""

import os
from pathlib import Path
from typing import Any

import click

import aurora_lit
from aurora_lit.cli.bench import bench
from aurora_lit.cli.options import FILE, FOLDER, RUN_FOLDER, AuroraGroup, MultiFileCommand, configured, shown
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.ipc.run_folder import FOLDER_VARIABLE, live_folders
from aurora_lit.logs import log_to_stderr


@click.group(cls=AuroraGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(aurora_lit.__version__, prog_name="aurora-lit")
def main() -> None:
    """An OpenAI-style server with lossless speculative decoding.

    Commands that load a deployment take settings as trailing `key=value`, such as engine.max_batch_size=4.
    """


main.add_command(bench)


# -- serving -----------------------------------------------------------------------------------------------------------


@main.command()
@configured
def serve(config: AuroraConfig) -> None:
    """Serve the target on /v1/chat/completions and /v1/completions."""
    from aurora_lit.serve.server import serve as run

    log_to_stderr("server")
    run(config)


@main.command()
@click.option(
    "--url", help="Address of the server, such as http://127.0.0.1:8000. Default: the newest one running here."
)
@click.option("--run-folder", type=RUN_FOLDER, metavar="DIR", help="Run folder of a server on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
@configured
def status(config: AuroraConfig, url: str | None, run_folder: Path | None, as_json: bool) -> None:
    """Show what a running server and its learner are doing."""
    from aurora_lit.cli.status import show

    show(url=url, api_key=config.server.api_key, run_folder=run_folder, as_json=as_json)


@main.command()
@click.option("-p", "--prompt", required=True, help="The user's message.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Maximum number of new tokens."
)
@click.option("--temperature", type=click.FloatRange(0, 2), help="0: greedy. Default: the model's own, else greedy.")
@click.option(
    "--compare-plain/--no-compare-plain",
    default=True,
    show_default=True,
    help="Also answer with plain decoding, and print both speeds.",
)
@configured
def generate(config: AuroraConfig, **options: Any) -> None:
    """Answer one prompt in the terminal. Accepted tokens and the target's own are coloured."""
    from aurora_lit.cli.generate import generate as run

    run(config, **options)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})  # -dph is vLLM's
@click.argument("model")
@click.option("--draft", type=FOLDER, required=True, help="Folder of the EAGLE-3 draft to begin with.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the learner; repeatable.")
@click.option("--learner-gpus", default="", metavar="IDS", help="GPUs of the learner. Default: it learns on the CPU.")
@click.option("--learner-metrics-port", type=click.IntRange(1, 65535), help="Port of the learner's own /metrics.")
@click.option("--attach", is_flag=True, help="Print how to start vLLM instead of starting it, and learn beside it.")
@click.option("--print-config", is_flag=True, help="Print the learner's settings, and exit.")
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S OWN ARGUMENTS]...")
def vllm(model: str, draft: Path, overrides: tuple[str, ...], print_config: bool, **options: Any) -> None:
    """Serve MODEL with vLLM, and let its draft learn from the traffic.

    MODEL is a folder or another source as in target.source. See docs/vllm.md.
    """
    from aurora_lit.cli.vllm import settings, start

    config = settings(model, draft, overrides)
    if print_config:
        click.echo(shown(config), nl=False)
        return
    log_to_stderr("launcher")
    click.get_current_context().exit(start(config, **options))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@configured
def doctor(config: AuroraConfig, as_json: bool) -> None:
    """Check whether this machine can serve. Exits with code 1 if not."""
    from aurora_lit.cli.doctor import doctor as run

    if not run(config, as_json=as_json):
        click.get_current_context().exit(1)


@main.group()
def memory() -> None:
    """The traffic memory that memory.keep holds on disk."""


@memory.command()
@configured
def clear(config: AuroraConfig) -> None:
    """Forget it. Refused while a server uses the folder: it would go on with what it remembers."""
    from aurora_lit.serve.speculation.sources.kept_answers import forget

    click.echo(f"{config.memory.keep}: {forget(config.memory.keep)} files of answers are deleted")


# -- learning ----------------------------------------------------------------------------------------------------------


def _learners_run_folder() -> Path | None:
    """In a follower that of its leader; else that of the newest server."""
    inherited = os.environ.get(FOLDER_VARIABLE)
    return Path(inherited) if inherited else next(iter(live_folders()), None)


@main.command()
@click.option(
    "--run-folder",
    type=RUN_FOLDER,
    metavar="DIR",
    is_eager=True,
    default=_learners_run_folder,
    help="Run folder of the server. Default: that of the newest server running here.",
)
@click.option("--parent", type=int, hidden=True, help="Exit when the process with this id does.")
@configured
def learn(config: AuroraConfig, run_folder: Path | None, parent: int | None) -> None:
    """Attach a learner to a running server. It uses the server's settings unless --config is given."""
    from aurora_lit.cli.status import find_run_folder
    from aurora_lit.ipc.process_lifetime import die_with_parent
    from aurora_lit.learn.online.process import is_follower, run_learner

    log_to_stderr("learner")
    if is_follower(config):
        parent = os.getppid()  # the leading learner process; --parent is that one's
    if parent is not None:
        die_with_parent(parent)
    run_learner(config, find_run_folder(run_folder))


@main.command()
@click.option("--traces", type=FOLDER, help="Folder with recorded traces. Default: trace.record.")
@click.option(
    "--out", type=FOLDER, default=Path("replay-results"), show_default=True, help="Folder for the report and the draft."
)
@click.option(
    "--steps-per-trace",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Optimiser steps per trace; fewer are taken where no trace is left that was not repeated often enough.",
)
@click.option(
    "--trial-every", type=click.IntRange(min=1), default=32, show_default=True, help="Traces between two trials."
)
@click.option(
    "--window", type=click.IntRange(min=1), default=64, show_default=True, help="Traces in each window of the report."
)
@configured
def replay(config: AuroraConfig, traces: Path | None, **options: Any) -> None:
    """Learn from recorded traces. Writes a draft to serve, and its accepted length as JSON."""
    from aurora_lit.cli.replay import replay as run

    run(config, traces=traces, **options)


@main.command(cls=MultiFileCommand)
@click.option(
    "--prompts",
    type=FILE,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="JSON lines of prompts, which the target answers.",
)
@click.option("--text", type=FILE, multiple=True, metavar="FILE...", help="Plain text to learn from as it is.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the new checkpoint.")
@click.option("--start-from", type=FOLDER, help="Draft checkpoint to continue from. Default: an untrained draft.")
@click.option(
    "--text-positions",
    type=click.IntRange(min=0),
    default=1_000_000,
    show_default=True,
    help="Token positions taken from text.",
)
@click.option(
    "--answers", type=click.IntRange(min=1), help="Number of prompts to answer, from each file in turn. Default: all."
)
@click.option(
    "--max-answer-tokens",
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help="Maximum length of an answer.",
)
@click.option(
    "--sampled-share",
    type=click.FloatRange(0, 1),
    default=1 / 3,
    show_default="1/3",
    help="Share of the answers sampled at the model's defaults; the others are greedy.",
)
@click.option(
    "--positions",
    type=click.IntRange(min=1),
    default=3_000_000,
    show_default=True,
    help="Token positions to train on.",
)
@click.option(
    "--batch-positions", type=click.IntRange(min=64), default=1024, show_default=True, help="Positions of a batch."
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Peak learning rate.",
)
@click.option(
    "--draft-vocab-size",
    type=click.IntRange(min=16),
    default=16_384,
    show_default=True,
    help="Tokens of the draft's vocabulary.",
)
@click.option(
    "--draft-intermediate-size",
    type=click.IntRange(min=16),
    help="Width of the draft's MLP. Default: as wide as the target's.",
)
@click.option(
    "--draft-kv-heads",
    type=click.IntRange(min=1),
    help="Heads of the draft's keys and values. Default: as many as of its queries.",
)
@click.option(
    "--draft-dtype",
    type=click.Choice(["bfloat16", "int8"]),
    default="bfloat16",
    show_default=True,
    help="How the draft is stored; int8 takes half the space, and `export` writes it in bfloat16.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling and batches.")
@configured
def pretrain(config: AuroraConfig, **options: Any) -> None:
    """Train a first draft from prompts and text. Run it again to continue where it stopped."""
    from aurora_lit.learn.pretrain.stages import PretrainOptions
    from aurora_lit.learn.pretrain.stages import pretrain as run

    run(config, PretrainOptions(**options))


# -- draft versions ----------------------------------------------------------------------------------------------------


@main.group(invoke_without_command=True)
@click.pass_context
def drafts(ctx: click.Context) -> None:
    """List published draft versions, or choose one. Without a command: list them."""
    if ctx.invoked_subcommand is None:
        from aurora_lit.cli.drafts import show

        show(load_config(None, []), as_json=False)


@drafts.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@configured
def list_drafts(config: AuroraConfig, as_json: bool) -> None:
    """List all versions with their scores; ▶ marks the current one."""
    from aurora_lit.cli.drafts import show

    show(config, as_json=as_json)


@drafts.command()
@click.argument("number", type=click.IntRange(min=0))
@configured
def rollback(config: AuroraConfig, number: int) -> None:
    """Return to version NUMBER and retire newer ones. NUMBER 0 is the starting draft."""
    from aurora_lit.cli.drafts import roll_back

    roll_back(config, number)


@drafts.command()
@click.argument("number", type=click.IntRange(min=1))
@configured
def promote(config: AuroraConfig, number: int) -> None:
    """Make version NUMBER current, whatever its scores."""
    from aurora_lit.cli.drafts import promote as run

    run(config, number)


@main.command()
@click.option("--out", type=FOLDER, required=True, help="New folder to write.")
@click.option("--version", type=click.IntRange(min=1), help="Number of a published version. Default: the current one.")
@configured
def export(config: AuroraConfig, out: Path, version: int | None) -> None:
    """Write a draft in the form that vLLM and SGLang load."""
    from aurora_lit.drafts.export import export as run

    run(config, out=out, version=version)
