"""Which of an engine's processes is named when it cannot go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, RankStatusPage, WorkerState, rank_path
from aurora_lit.serve import ranks
from aurora_lit.serve.ranks import RankWatch


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ValueError: injected", "ValueError: injected"),
        ("RankError: rank 1 is gone", "rank 1 of the engine's 2 processes ended: exit code 3"),
        ("", "rank 1 of the engine's 2 processes ended: exit code 3"),
    ],
)
def test_an_error_of_rank_0s_own_is_told_though_the_others_have_ended_first(
    error: str, told: str, tmp_path: Path
) -> None:
    """It ends them, and then takes a while itself."""
    status = EngineStatusPage.create(tmp_path / STATUS_NAME)
    RankStatusPage.create(rank_path(tmp_path, 1))
    status.write(state=WorkerState.FAILED if error else WorkerState.READY, error=error)
    processes: Any = [
        SimpleNamespace(sentinel=1, is_alive=lambda: True),
        SimpleNamespace(sentinel=2, is_alive=lambda: False, exitcode=3),
    ]
    assert RankWatch(processes, status, tmp_path)._describe_loss([2]) == told


def test_a_process_whose_end_another_thread_is_just_learning_of_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C ends a server that loads: the main thread waits for the worker too."""
    status = EngineStatusPage.create(tmp_path / STATUS_NAME)
    worker: Any = SimpleNamespace(sentinel=5, is_alive=lambda: True, exitcode=None, join=lambda: None)
    monkeypatch.setattr(ranks, "wait", lambda sentinels, timeout: sentinels)
    assert RankWatch([worker], status, tmp_path).poll() == "the engine worker ended: exit code 0"
