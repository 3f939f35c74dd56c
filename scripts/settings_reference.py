"""Writes the reference of all settings as Markdown, from their declarations in aurora_lit/settings.py.

    python scripts/settings_reference.py > docs/settings.md

tests/test_config.py checks that docs/settings.md is what this script writes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from typing import Any, Literal

from aurora_lit.settings import AuroraConfig

HEADER = """\
# Settings

<!-- Generated from aurora_lit/settings.py: python scripts/settings_reference.py > docs/settings.md -->

A deployment is one YAML file (`--config FILE`, or the name of a file in `configs/`, such as
`--config qwen2.5-coder-0.5b`) and `key=value` overrides on the command line, such as `engine.max_batch_size=4`.
`--print-config` shows the result. Without `--config`, commands read `configs/smollm2.yaml`, but `learn` the settings of
the server that it attaches to. `vllm` takes no such file, only `--set KEY=VALUE`. `--config` may be repeated: a later
file changes only the settings that it names. A key that nothing names has the default given here.

To turn speculation off, set `engine.speculate=false`, and `learn.enabled=false` with it: a learner needs a draft that
is used.
"""


def meanings(section: type) -> dict[str, str]:
    """What each setting means: the string under its declaration, on one line."""
    found: dict[str, str] = {}
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(section)).body[0]).body
    for declaration, text in zip(body, body[1:], strict=False):
        if isinstance(declaration, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(declaration.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def value_text(value: Any) -> str:
    """A value as it is written in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def type_text(kind: Any, metadata: typing.Mapping[str, Any]) -> str:
    """What a setting accepts: its choices, its range or its type."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if "low" in metadata:
        word = "whole number" if kind is int else "number"
        return f"{word}, {metadata['low']:.13g} to {metadata['high']:.13g}"
    return {bool: "true or false", str: "text", str | None: "text or null"}.get(kind, "mapping or null")


def reference() -> str:
    """The whole page."""
    lines = [HEADER]
    sections = typing.get_type_hints(AuroraConfig)
    for name, section in sections.items():
        title, _, rest = inspect.cleandoc(section.__doc__ or "").partition("\n\n")
        lines += [f"## `{name}`", "", title]
        if rest:
            lines += ["", " ".join(rest.split())]
        lines += ["", "| key | values | default | meaning |", "|---|---|---|---|"]
        types, texts = typing.get_type_hints(section), meanings(section)
        for setting in dataclasses.fields(section):
            values = type_text(types[setting.name], setting.metadata)
            cells = (f"`{name}.{setting.name}`", values, f"`{value_text(setting.default)}`", texts[setting.name])
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
