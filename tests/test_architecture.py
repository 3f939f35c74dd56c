"""The code keeps to the map in ARCHITECTURE.md, and every folder to the list of files in its own docstring."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "aurora_lit"
LEARNING = ("modules/losses/", "learn/", "kernels/lk_loss.py")
NO_HOME = {"utils.py", "helpers.py", "common.py", "base.py"}


def places_of_map(text: str) -> list[str]:
    """The block under "The map": its lines are `name.py   what it is` or `folder/   what it is`, in order."""
    block = text.split("## The map", 1)[1].split("```")[1]
    return re.findall(r"^(\S+(?:\.py|/))\s{2,}\S.*$", block, flags=re.MULTILINE)


def files_of_folder(docstring: str) -> list[str]:
    """The files that a folder's docstring lists, in order: lines of `    name.py   what it is`."""
    return re.findall(r"^    (\w+\.py)\s{2,}\S.*$", docstring, flags=re.MULTILINE)


@cache
def existing() -> frozenset[str]:
    return frozenset(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@cache
def places() -> list[str]:
    return places_of_map((ROOT / "ARCHITECTURE.md").read_text())


def docstring_of(folder: str) -> str:
    return ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()), clean=False) or ""


@cache
def order() -> list[str]:
    """Every file in the order in which imports may go: a file imports only files before it."""
    files: list[str] = []
    for place in places():
        files += [place] if place.endswith(".py") else [place + name for name in files_of_folder(docstring_of(place))]
    return list(dict.fromkeys(files))  # a file that the map names itself stands where it is named first


def imported(source: str, files: frozenset[str], *, package: tuple[str, ...] = ()) -> set[str]:
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


def folder_inits() -> set[str]:
    return {file for file in existing() if file.endswith("/__init__.py")}


def test_every_file_is_listed_once_and_every_listed_file_exists() -> None:
    assert sorted(order()) == sorted(existing() - folder_inits())


def test_a_file_imports_only_files_above_it() -> None:
    wrong = [
        f"{file} imports {other}, which is not above it"
        for place, file in enumerate(order())
        for other in sorted(imports_of(file) - folder_inits())
        if other not in order()[:place]
    ]
    assert not wrong, "\n".join(wrong)


def test_serving_never_imports_learning() -> None:
    wrong = [
        f"{file} imports {other}"
        for file in existing()
        if file.startswith("serve/")
        for other in imports_of(file)
        if other.startswith(LEARNING)
    ]
    assert not wrong


def test_the_online_learner_never_imports_serving() -> None:
    folders = ("learn/data/", "learn/online/", "learn/offline/")
    wrong = [
        f"{file} imports {other}"
        for file in existing()
        if file.startswith(folders)
        for other in imports_of(file)
        if other.startswith("serve/")
    ]
    assert not wrong


def test_beside_vllm_only_torch_and_our_records_are_imported() -> None:
    """It runs inside vLLM's processes: another package could move or need other versions of vLLM's own."""
    ours = ("errors.py", "request.py", "settings.py", "traces/", "ipc/", "drafts/", "vllm/")
    for file in existing():
        if file.startswith("vllm/"):
            assert not [other for other in imports_of(file) if not other.startswith(ours)], file
            tree = ast.parse((PACKAGE / file).read_text())
            names = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
            names += [alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names]
            packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert packages <= {"torch", "aurora_lit"}, file


def test_a_folder_says_what_it_is_for_what_it_may_import_and_where_to_start() -> None:
    for place in places():
        if place.endswith("/"):
            text = docstring_of(place)
            assert "May import:" in text, place
            assert re.search(r"Start with\s+\w+\.py", text), place


def test_a_folders_init_holds_its_docstring_only() -> None:
    for file in folder_inits():
        body = ast.parse((PACKAGE / file).read_text()).body
        assert [type(node) for node in body] == [ast.Expr], f"{file} holds more than its docstring"


def test_no_file_has_a_name_that_hides_a_lack_of_a_home() -> None:
    assert not [file for file in existing() if Path(file).name in NO_HOME]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import aurora_lit.config", {"config.py"}),
        ("import aurora_lit", {"__init__.py"}),
        ("from aurora_lit.ipc import ring", {"ipc/ring.py", "ipc/__init__.py"}),
        ("from aurora_lit.ipc.ring import RingWriter", {"ipc/ring.py"}),
        ("def f():\n    from aurora_lit import config", {"config.py", "__init__.py"}),
        ("from . import ring", {"ipc/ring.py", "ipc/__init__.py"}),
        ("from ..config import load_config", {"config.py"}),
        ("import importlib\nimportlib.import_module('aurora_lit.config')", {"config.py"}),
        ("import torch\nimport aurora_literal.config", set()),
    ],
)
def test_the_test_sees_every_form_of_import(source: str, found: set[str]) -> None:
    assert imported(source, existing(), package=("aurora_lit", "ipc")) == found


def test_the_test_reads_the_map_and_the_folders_as_people_do() -> None:
    text = "## The map\n```\na.py    what\n\nb/c/    more (d.py)\n```\n```\ne.py  not here\n```"
    assert places_of_map(text) == ["a.py", "b/c/"]
    assert files_of_folder("What it is.\n\n    f.py   one\n    g.py   two\n  h.py  no\n") == ["f.py", "g.py"]
