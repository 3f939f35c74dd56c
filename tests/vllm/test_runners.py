"""A runner that is not as written in runners.py is not wrapped; the installed vLLM's runners are."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from support.made_vllm import MadeV1Runner, MadeV2Runner

from aurora_lit.vllm.runners import (
    V1,
    V2,
    KnownRunner,
    UnknownVersionError,
    check_version,
    reader_of,
    signature_differences,
)


def test_a_known_version_is_accepted_and_an_unknown_one_refused_with_those_that_are_known() -> None:
    for version in ("0.32.0", "0.32.1", "0.32.0.post1"):
        check_version(version)
    for version in ("0.31.0", "0.33.0", "0.34.0", "0.3", "0.320.0", "dev"):
        with pytest.raises(UnknownVersionError, match=r"is not known \(known: 0\.32\)"):
            check_version(version)


class _State(NamedTuple):
    here: int


class _Runner:
    def as_written(self, a: int, b: int = 0) -> None: ...


def test_what_differs_is_named() -> None:
    known = replace(V1, methods={"as_written": ("a", "b")}, state_fields=("here",))
    assert signature_differences(known, _Runner, _State) == []
    other = replace(V1, methods={"as_written": ("a",), "gone": ()}, state_fields=("here", "missing"))
    assert signature_differences(other, _Runner, _State) == [
        "as_written takes ('a', 'b'), not ('a',)",
        "gone takes None, not ()",
        "ExecuteModelState has no missing",
    ]


def _installed(monkeypatch: pytest.MonkeyPatch, known: KnownRunner, runner_class: type) -> Any:
    """A runner of a class that lies in vLLM's module, as far as `reader_of` looks."""
    module = ModuleType(known.module)
    module.ExecuteModelState = NamedTuple("ExecuteModelState", [(name, Any) for name in known.state_fields])  # type: ignore[attr-defined, misc]
    monkeypatch.setitem(sys.modules, known.module, module)
    named = type("GPUModelRunner", (runner_class,), {"__module__": known.module})
    return named()


def test_the_kind_of_runner_decides_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _installed(monkeypatch, V1, MadeV1Runner)
    assert reader_of(runner, "0.32.0") is V1
    with pytest.raises(UnknownVersionError, match="not a known runner"):
        reader_of(MadeV1Runner(), "0.32.0")
    v2 = _installed(monkeypatch, V2, MadeV2Runner)
    with pytest.raises(UnknownVersionError, match="execute_model takes"):  # the made one takes no dummy arguments
        reader_of(v2, "0.32.0")


def test_what_lays_rows_out_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_lit.vllm.runners.signature_differences", lambda *_: [])
    runner = _installed(monkeypatch, V2, MadeV2Runner)
    assert reader_of(runner, "0.32.0") is V2
    runner.adaptive_verification = object()
    with pytest.raises(UnknownVersionError, match="adaptive_verification"):
        reader_of(runner, "0.32.0")


@pytest.mark.parametrize("known", [V1, V2], ids=lambda known: known.module)
def test_the_installed_runners_are_as_written(known: KnownRunner) -> None:
    version = pytest.importorskip("vllm.version", reason="vLLM is not installed: its runners are NOT checked here")
    check_version(version.__version__)
    module = importlib.import_module(known.module)
    assert signature_differences(known, module.GPUModelRunner, module.ExecuteModelState) == []
