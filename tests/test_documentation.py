"""What README.md says can be typed can be typed, and what it says is there is there."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from aurora_lit.cli.main import main
from aurora_lit.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SHELL = "".join(block for kind, block in BLOCKS if kind == "bash")
COMMANDS = [line for line in SHELL.splitlines() if line.startswith("aurora-lit")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_is_understood(line: str) -> None:
    _, *words = shlex.split(line, comments=True)
    result = CliRunner().invoke(main, [*words, "--print-config"])
    assert result.exit_code == 0, result.output


def test_every_command_is_shown() -> None:
    shown = {" ".join(shlex.split(line)[1:3]) for line in COMMANDS}
    for name, command in main.commands.items():
        for full in [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]:
            assert any(words.startswith(full) for words in shown), full


def test_every_key_in_the_settings_table_exists_with_that_default() -> None:
    config = load_config(None, [])
    rows = re.findall(r"^\| (`[a-z_]+\.[a-z_]+`(?:, `[a-z_]+\.[a-z_]+`)*) \| (.*?) \|", README, flags=re.MULTILINE)
    assert len(rows) > 5
    for keys, defaults in rows:
        names = re.findall(r"`(.*?)`", keys)
        values = re.findall(r"`(.*?)`", defaults)
        for name, value in zip(names, values or [None] * len(names), strict=True):
            section, key = name.split(".")
            actual = getattr(getattr(config, section), key)
            shown = "null" if actual is None else str(actual).lower() if isinstance(actual, bool) else str(actual)
            assert value is None or shown == value, name


def test_everything_in_the_tree_exists() -> None:
    tree = next(block for kind, block in BLOCKS if kind == "" and block.startswith("aurora_lit/"))
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        path = ROOT / ("aurora_lit" if indent else "") / name
        assert path.exists(), name


def test_python_blocks_are_python() -> None:
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
