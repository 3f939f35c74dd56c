"""Kernels that cannot be built or loaded: said once with the compiler's own words, what it costs, and what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_engine import tiny_tokenizer
from support.fork_host import Finished, run_program
from support.tiny_models import save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.native import COST
from aurora_lit.serve.speculation.sources.memory import can_remember
from aurora_lit.settings import MemorySettings

VERSION = '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit 0\n'
FAILS = f'{VERSION}exec g++ -include no-such-header.h "$@"\n'
"""The real compiler, with a header that is not there."""
MAKES_GARBAGE = f"""{VERSION}while [ $# -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done\n"""
IS_SILENT = f"{VERSION}exit 3\n"
Environment = dict[str, str]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], Environment]:
    """The environment in which a script is the compiler, with an empty cache."""

    def make(script: str) -> Environment:
        path = tmp_path / "compiler"
        path.write_text(script)
        path.chmod(0o755)
        return {"CXX": str(path), "AURORA_LIT_CACHE": str(tmp_path / "cache"), "AURORA_LIT_NATIVE": "1"}

    return make


@pytest.fixture
def no_compiler(tmp_path: Path) -> Environment:
    return {"PATH": str(tmp_path), "CXX": "", "AURORA_LIT_CACHE": str(tmp_path / "cache"), "AURORA_LIT_NATIVE": "1"}


def run(code: str, environment: Environment) -> Finished:
    """Run a program in a process that has not looked for kernels yet."""
    return run_program(code, environment=environment)


def doctors_check(*overrides: str) -> str:
    """Code that prints what doctor says about kernels, on one line."""
    return f"""
import json
from dataclasses import asdict
from aurora_lit.cli.checks import check_compiler
from aurora_lit.config import load_config
print(json.dumps(asdict(check_compiler(load_config(None, {list(overrides)})))))
"""


def engines(folder: Path, count: int) -> str:
    """Code that builds engines, as `generate` and the engine worker do, one after the other, and asks doctor."""
    return f"""
from aurora_lit.config import load_config
from aurora_lit.serve.worker.build import build_engine
overrides = ["target.source={folder}", "draft.checkpoint=null", "learn.enabled=false", "engine.max_seq_len=256"]
for _ in range({count}):
    engine, _ = build_engine(load_config(None, overrides))
print(engine.target.has_native_decoder)
{doctors_check()}"""


def check_beside_an_engine(result: Finished) -> dict[str, str]:
    """What doctor said after the engine had been built, without kernels."""
    has_native_decoder, check = result.stdout.splitlines()
    assert has_native_decoder == "False", f"it works without kernels\n{result.stderr}"
    found: dict[str, str] = json.loads(check)
    assert found["state"] == "warn"
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("llama", tmp_path_factory.mktemp("model"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@needs_compiler
def test_a_build_that_fails_is_said_once_with_the_compilers_error(
    model: Path, compiler: Callable[[str], Environment]
) -> None:
    result = run(engines(model, 2), compiler(FAILS))
    check = check_beside_an_engine(result)
    assert result.stderr.count("native kernels are not in use") == 1
    for said in (result.stderr, check["found"]):
        assert "fatal error: no-such-header.h: No such file or directory" in said
    for said in (result.stderr, check["remedy"]):
        assert COST in said
        assert "CXX" in said


@pytest.mark.process
def test_a_library_that_cannot_be_loaded_is_said_with_its_path(
    model: Path, compiler: Callable[[str], Environment], tmp_path: Path
) -> None:
    result = run(engines(model, 2), compiler(MAKES_GARBAGE))
    assert "cannot be loaded" in check_beside_an_engine(result)["found"]
    (library,) = (tmp_path / "cache/kernels").glob("kernels-*.so")
    assert result.stderr.count("native kernels are not in use: they cannot be loaded") == 1
    assert f"delete {library}" in result.stderr


@pytest.mark.process
def test_no_compiler_is_said(model: Path, no_compiler: Environment) -> None:
    result = run(engines(model, 1), no_compiler)
    assert "no C++ compiler" in check_beside_an_engine(result)["found"]
    assert result.stderr.count("no C++ compiler was found") == 1
    assert "apt-get install g++" in result.stderr


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
def test_kept_kernels_are_used_without_a_compiler(no_compiler: Environment) -> None:
    kept = Path(no_compiler["AURORA_LIT_CACHE"]) / "kernels" / f"{native.build_digest()}.so"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(native.library()._name)
    check = json.loads(run(doctors_check(), no_compiler).stdout)
    assert check["state"] == "ok"
    assert check["found"] == "none; native kernels built before"


@pytest.mark.process
def test_kernels_that_are_turned_off_are_mentioned_by_doctor_only(model: Path) -> None:
    result = run(engines(model, 1), {"AURORA_LIT_NATIVE": "0"})
    check = check_beside_an_engine(result)
    assert "kernels" not in result.stderr
    assert "AURORA_LIT_NATIVE=0" in check["found"]
    assert "unset AURORA_LIT_NATIVE" in check["remedy"]


def test_a_compiler_that_fails_without_a_word_is_said_by_doctor(compiler: Callable[[str], Environment]) -> None:
    assert "without a message" in json.loads(run(doctors_check(), compiler(IS_SILENT)).stdout)["found"]


def test_a_precision_that_needs_them_is_refused_with_the_reason(
    model: Path, compiler: Callable[[str], Environment]
) -> None:
    precision = "int4"
    code = f"""
{doctors_check(f"target.precision={precision}")}
from pathlib import Path
from aurora_lit.models.loading import load_target
load_target(Path("{model}"), precision="{precision}")
"""
    result = run(code, compiler(MAKES_GARBAGE))
    last_line = result.stderr.strip().splitlines()[-1]
    assert f"target.precision={precision} needs the native kernels: they cannot be loaded" in last_line
    assert "or use bf16" in last_line
    assert json.loads(result.stdout)["state"] == "fail", "serving would not start"


@pytest.mark.parametrize("command", [pytest.param("g++", marks=needs_compiler), None])
def test_no_home_folder_is_said_with_the_variable_that_replaces_it(
    command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service may run as a user without an account, in an empty environment."""
    for name in ("HOME", "AURORA_LIT_CACHE", "AURORA_LIT_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)
    monkeypatch.setattr(native, "compiler", lambda: command)
    absent = native._load.__wrapped__()
    assert "the home folder is not known" in absent.reason
    assert "set AURORA_LIT_CACHE" in absent.remedy


def test_on_a_mac_no_compiler_is_called_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its g++ is Apple's clang, or opens a dialog that offers to install it, in each process that calls it."""
    for name in ("CXX", "AURORA_LIT_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delattr(native, "compiler")
    monkeypatch.setattr(sys, "platform", "darwin")
    absent = native._load.__wrapped__()
    assert "macOS" in absent.reason
    assert "run it on Linux" in absent.remedy


def test_where_gpp_is_clang_the_remedy_is_another_compiler(
    compiler: Callable[[str], Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CXX may be unset, and g++ a name for clang++, so that neither unsetting it nor naming g++ changes anything."""
    command = compiler('#!/bin/sh\necho "Debian clang version 14.0.6"\n')["CXX"]
    monkeypatch.delenv("AURORA_LIT_NATIVE", raising=False)
    monkeypatch.setattr(native, "compiler", lambda: command)
    absent = native._load.__wrapped__()
    assert f"{command} is clang++" in absent.reason
    assert "install GNU's g++ (apt-get install g++)" in absent.remedy
    assert "unset" not in absent.remedy


def test_that_there_is_no_traffic_memory_is_among_what_absence_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert not can_remember(torch.device("cpu"))
    assert "without n-gram lookup and without the traffic memory" in COST
    assert MemorySettings.__doc__ is not None
    assert "needs the CPU kernels" in MemorySettings.__doc__


@pytest.mark.parametrize("command", ["g++", None])
def test_a_library_that_cannot_be_loaded_may_be_kept_elsewhere(
    command: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file system without exec no library can be loaded, whoever compiles it and however often."""
    (tmp_path / "kernels.so").write_text("garbage")
    monkeypatch.delenv("AURORA_LIT_NATIVE", raising=False)
    monkeypatch.setattr(native, "compiler", lambda: command)
    monkeypatch.setattr(native, "built_library", lambda _: tmp_path / "kernels.so")
    monkeypatch.setattr(native, "kept_library", lambda: tmp_path / "kernels.so")
    absent = native._load.__wrapped__()
    assert "cannot be loaded" in absent.reason
    assert "or set AURORA_LIT_CACHE to a folder from which code may be loaded" in absent.remedy
