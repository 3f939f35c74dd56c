"""Commands beside a running server: `learn`, `status`, `drafts`, `export`. Added to the command line by cli.py."""

import os
from pathlib import Path

import click

from aurora_lit.cli.options import FOLDER, configured
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.ipc.run_folder import live_folders

_RUN_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option(
    "--run-folder",
    type=_RUN_FOLDER,
    metavar="DIR",
    is_eager=True,
    default=lambda: next(iter(live_folders()), None),
    help="Run folder of the server. Default: that of the newest one running here.",
)
@click.option("--parent", type=int, hidden=True, help="End with this process.")
@configured
def learn(config: AuroraConfig, run_folder: Path | None, parent: int | None) -> None:
    """Attach a learner to a running server, with that server's settings unless --config names others."""
    from aurora_lit.cli.status import find_run_folder
    from aurora_lit.ipc.process_lifetime import die_with_parent
    from aurora_lit.learn.online.process import is_follower, run_learner

    if is_follower(config):
        parent = os.getppid()  # the learner that leads; --parent is that one's
    if parent is not None:
        die_with_parent(parent)
    run_learner(config, find_run_folder(run_folder))


@click.command()
@click.option("--url", help="Of the server, such as http://127.0.0.1:8000. Default: the newest one running here.")
@click.option("--run-folder", type=_RUN_FOLDER, metavar="DIR", help="Of a server on this machine.")
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
@configured
def status(config: AuroraConfig, url: str | None, run_folder: Path | None, as_json: bool) -> None:
    """What a running server and its learner are doing."""
    from aurora_lit.cli.status import show

    show(url=url, api_key=config.server.api_key, run_folder=run_folder, as_json=as_json)


@click.command()
@click.option("--out", type=FOLDER, required=True, help="Folder to write; must be new.")
@click.option("--version", type=click.IntRange(min=1), help="A published version. Default: the current one.")
@configured
def export(config: AuroraConfig, out: Path, version: int | None) -> None:
    """Write a draft as vLLM and SGLang load it."""
    from aurora_lit.drafts.export import export as run

    run(config, out=out, version=version)


@click.group(invoke_without_command=True)
@click.pass_context
def drafts(ctx: click.Context) -> None:
    """The versions that learning has published; without a command, the list of them."""
    if ctx.invoked_subcommand is None:
        from aurora_lit.cli.drafts import show

        show(load_config(None, []), as_json=False)


@drafts.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@configured
def list_drafts(config: AuroraConfig, as_json: bool) -> None:
    """All versions with their scores; ▶ marks the one that serves."""
    from aurora_lit.cli.drafts import show

    show(config, as_json=as_json)


@drafts.command()
@click.argument("number", type=click.IntRange(min=0))
@configured
def rollback(config: AuroraConfig, number: int) -> None:
    """Return to version NUMBER (0: the starting draft) and retire all newer ones."""
    from aurora_lit.cli.drafts import roll_back

    roll_back(config, number)


@drafts.command()
@click.argument("number", type=click.IntRange(min=1))
@configured
def promote(config: AuroraConfig, number: int) -> None:
    """Make version NUMBER serve, whatever its scores."""
    from aurora_lit.cli.drafts import promote as run

    run(config, number)
