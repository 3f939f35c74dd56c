"""What all commands share: `--config FILE` and trailing `key=value` settings, and errors on one line.

Imports nothing heavy, so that `--help` is answered at once.
"""

import dataclasses
import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from aurora_lit.config import AuroraConfig, load_config, to_yaml
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.run_folder import CONFIG_NAME

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
RUN_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Writing to a file that is open already raises these without the file's name."""


class AuroraGroup(click.Group):
    """A group that prints an AuroraError, or an error of a file or a full disk, on one line and exits with code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (AuroraError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None and error.errno not in _NO_SPACE:
                raise  # not of a file: a closed pipe, or a bug
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


class MultiFileCommand(click.Command):
    """A command whose file options take several values, as a shell's `*` gives them: `--prompts a.jsonl b.jsonl`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its files; another option or a key=value ends the list.

        The first word is always a file: its name may contain "=".
        """
        multiple = {name for parameter in self.params if parameter.metavar == "FILE..." for name in parameter.opts}
        expanded: list[str] = []
        current, is_first = None, False
        for word in args:
            if word.startswith("-"):
                current, is_first = word if word in multiple else None, True
                expanded += [] if current else [word]
            elif current and (is_first or "=" not in word):
                expanded += [current, word]
                is_first = False
            else:
                current = None
                expanded.append(word)
        return super().parse_args(ctx, expanded)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that adds `--config FILE`, `--print-config` and trailing `key=value`; the command receives `config`."""

    @click.option(
        "--config",
        "config_files",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        is_eager=True,
        help="YAML file of the deployment, or the name of a shipped one, such as qwen2.5-coder-0.5b; repeatable, a "
        "later one wins. Default: smollm2.",
    )
    @click.option(
        "--print-config", is_flag=True, is_eager=True, help="Print the settings that would be used, and exit."
    )
    @click.argument("config", nargs=-1, metavar="[key=value]...", is_eager=True, callback=_read_config)
    @functools.wraps(command)
    def wrapper(config_files: tuple[Path, ...], print_config: bool, **options: Any) -> None:
        command(**options)

    return wrapper


def _read_config(ctx: click.Context, _: click.Parameter, overrides: tuple[str, ...]) -> AuroraConfig:
    """Load the settings, after the eager options but before all others: --print-config needs no required option.

    With a run folder and no file, the settings are those of the running server.
    """
    paths = ctx.params.get("config_files") or None
    if paths is None:
        # An option that is not given has its default only after this argument, eager or not.
        option = next((p for p in ctx.command.params if p.name == "run_folder"), None)
        run_folder = ctx.params.get("run_folder") or (option and option.get_default(ctx))
        paths = run_folder / CONFIG_NAME if isinstance(run_folder, Path) else None
    config = load_config(paths, overrides)
    if ctx.params.get("print_config"):
        click.echo(shown(config), nl=False)
        ctx.exit()
    return config


def shown(config: AuroraConfig) -> str:
    """The settings as YAML for a terminal or a log: without the API key, in whose place is how to write it."""
    if config.server.api_key is None:
        return to_yaml(config)
    without = dataclasses.replace(config, server=dataclasses.replace(config.server, api_key=None))
    key = "  api_key: ${oc.env:AURORA_LIT_API_KEY}  # set and not shown; here it would come from this variable\n"
    return to_yaml(without).replace("  api_key: null\n", key)
