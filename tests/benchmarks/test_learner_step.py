"""The traces that benchmarks of the learner keep: taken again for the same answers alone, and only if whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.trace_examples import numbered_trace, write_log

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.learn.offline.replay import read_traces
from benchmarks import learner_step
from benchmarks.learner_step import record

HOW = {"limit": 9, "max_tokens": 8, "temperatures": [0.0]}


class Process:
    """As one of multiprocessing, but in this process."""

    def __init__(self, *, target: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call, self.exitcode = lambda: target(*args, **kwargs), 0

    def start(self) -> None:
        """Run it."""
        try:
            self._call()
        except Exception:
            self.exitcode = 1

    def join(self) -> None:
        """It has ended."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is recorded, in place of answers; the third call fails when one trace is written."""
    calls: list[dict[str, Any]] = []

    def answer(config: AuroraConfig, folder: Path, prompts: list[Path], **how: Any) -> None:
        calls.append(how)
        write_log(folder, [numbered_trace(8, first=len(calls))])
        if len(calls) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(learner_step, "_record", answer)
    monkeypatch.setattr(learner_step.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Process))
    return calls


def test_kept_traces_are_taken_for_the_same_answers_alone(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    prompts, config = tmp_path / "bills.jsonl", load_config(None, [])
    prompts.write_text("one\n")
    for overrides in ([], ["learn.learning_rate=1e-4", "draft.checkpoint=other"]):
        record(load_config(None, overrides), tmp_path / "kept", [prompts], **HOW)
    assert len(recorded) == 1, "the learner's settings and the draft change no answer"
    other = load_config(None, ["target.precision=fp32"])
    shorter = load_config(None, ["engine.max_seq_len=512"])  # which leaves out prompts
    same: dict[str, Any] = {}
    for settings, changes in ((config, {"limit": 10}), (config, {"continued": True}), (other, same), (shorter, same)):
        with pytest.raises(ConfigError, match="--traces .*kept: holds traces of other prompts, options or target"):
            record(settings, tmp_path / "kept", [prompts], **{**HOW, **changes})
    prompts.write_text("another\n")
    with pytest.raises(ConfigError, match="holds traces of other prompts"):
        record(config, tmp_path / "kept", [prompts], **HOW)
    write_log(tmp_path / "older", [numbered_trace(8)])
    with pytest.raises(ConfigError, match="holds traces of other prompts"):  # nobody knows of which
        record(config, tmp_path / "older", [prompts], **HOW)


def test_traces_of_a_recording_that_failed_are_not_taken(tmp_path: Path, recorded: list[dict[str, Any]]) -> None:
    prompts, config = tmp_path / "bills.jsonl", load_config(None, [])
    prompts.write_text("one\n")
    recorded += [{}, {}]
    with pytest.raises(AuroraError, match="--traces .*kept: answering the prompts failed"):
        record(config, tmp_path / "kept", [prompts], **HOW)
    assert not (tmp_path / "kept").exists()
    record(config, tmp_path / "kept", [prompts], **HOW)
    (trace,) = read_traces(tmp_path / "kept")
    assert int(trace.token_ids_T[0]) == 4, "of the second attempt alone"
