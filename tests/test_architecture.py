"""The code keeps to the map in aurora_lit/ARCHITECTURE.md."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aurora_lit"
MAP = PACKAGE / "ARCHITECTURE.md"
MAX_LINES = 300
LEARNING_FILES = (
    "modules/draft_batch.py", "modules/draft_module.py", "modules/policy.py", "modules/ppo.py", "modules/unroll.py",
    "pretrain.py", "learn/",
)  # fmt: skip


def listed(text: str) -> list[str]:
    """Files of the block under "The map", in its order; a line is `  path.py   what it is`."""
    block = text.split("## The map", 1)[1].split("```")[1]
    return re.findall(r"^  (\S+\.py)\s{2,}\S.*$", block, flags=re.MULTILINE)


def existing() -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}


def imported(source: str, files: set[str], *, package: tuple[str, ...] = ()) -> set[str]:
    """Files of the package that a source imports anywhere in it, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [str(part.value) for part in node.args if isinstance(part, ast.Constant)]
    found = set()
    for name in names:
        first, *rest = name.split(".")
        if first == "aurora_lit":
            path = "/".join(rest)
            found |= {f"{path}.py", f"{path}/__init__.py" if rest else "__init__.py"} & files
    return found


def imports_of(file: str) -> set[str]:
    package = ("aurora_lit", *Path(file).parent.parts)
    return imported((PACKAGE / file).read_text(), existing(), package=package)


def subpackage_inits() -> set[str]:
    return {file for file in existing() if file.endswith("/__init__.py")}


def test_every_file_is_listed_once_and_every_listed_file_exists() -> None:
    files = listed(MAP.read_text())
    assert sorted(files) == sorted(existing() - subpackage_inits())


def test_a_file_imports_only_files_above_it() -> None:
    order = listed(MAP.read_text())
    wrong = [
        f"{file} imports {other}, which is not above it"
        for place, file in enumerate(order)
        for other in sorted(imports_of(file) - subpackage_inits())
        if other not in order[:place]
    ]
    assert not wrong, "\n".join(wrong)


def test_serving_knows_nothing_of_learning() -> None:
    wrong = [f"{file} imports {other}" for file in existing() if file.startswith("serve/")
             for other in imports_of(file) if other.startswith(LEARNING_FILES)]
    assert not wrong


def test_subpackages_begin_with_a_docstring_only() -> None:
    for file in subpackage_inits():
        body = ast.parse((PACKAGE / file).read_text()).body
        assert [type(node) for node in body] == [ast.Expr], f"{file} holds more than its docstring"


def test_no_file_is_too_long() -> None:
    long = {path.relative_to(PACKAGE).as_posix(): lines for path in PACKAGE.rglob("*")
            if path.suffix in {".py", ".cpp"} and (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_names_that_hide_a_lack_of_a_home_are_not_used() -> None:
    assert not [file for file in existing() if Path(file).name in {"utils.py", "helpers.py", "common.py", "base.py"}]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import aurora_lit.config", {"config.py"}),
        ("import aurora_lit", {"__init__.py"}),
        ("from aurora_lit.serve import text", {"serve/text.py", "serve/__init__.py"}),
        ("from aurora_lit.serve.text import TextStream", {"serve/text.py"}),
        ("def f():\n    from aurora_lit import config", {"config.py", "__init__.py"}),
        ("from . import text", {"serve/text.py", "serve/__init__.py"}),
        ("from ..config import load_config", {"config.py"}),
        ("import importlib\nimportlib.import_module('aurora_lit.config')", {"config.py"}),
        ("import torch\nimport aurora_literal.config", set()),
    ],
)
def test_the_test_sees_every_form_of_import(source: str, found: set[str]) -> None:
    assert imported(source, existing(), package=("aurora_lit", "serve")) == found


def test_the_test_reads_the_map_as_people_do() -> None:
    text = "## The map\n```\nWORDS  x\n  a.py    what\n  b/c.py  more (d.py)\n```\n```\n  e.py  not here\n```"
    assert listed(text) == ["a.py", "b/c.py"]
