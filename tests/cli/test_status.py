"""`aurora-lit status`: a dead server, a dead learner, what was left out; no markup from labels; a wrong --url."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aurora_lit.cli import status as live_status
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, RankStatusPage, WorkerState, rank_path
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage


def test_what_was_left_out_is_shown_and_labels_cannot_write_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(domains="[/bold]sneaky 100% (heat 1.00)", looping=3, over_client_share=2, labels_dropped=1, records=9)
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "[/bold]sneaky 100%" in shown
    assert "3 looping answers, 1 labels, 2 waits of clients over their share" in shown
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=True)
    assert '"looping": 3' in capsys.readouterr().out


def test_what_the_last_swap_brought_is_shown_once_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = EngineStatusPage.create(tmp_path / STATUS_NAME)
    LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    line = "draft 7: 2.61 → 2.83 tokens a round"
    for gain in ("", line):
        page.write(draft_gain=gain)
        live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
        assert (f"last swap {line}" in " ".join(capsys.readouterr().out.split())) == bool(gain)
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["draft"]["gain"] == line


def test_a_worker_that_hangs_is_not_called_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the worker writes its state, so the page of one that hangs or was killed still says "ready"."""
    page = EngineStatusPage.create(tmp_path / STATUS_NAME)
    LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    for age_s, shown in ((1, "ready, up"), (200, "no sign of life for 200 s, up")):
        page.write(state=WorkerState.READY, worker_pid=7, heartbeat_ns=time.monotonic_ns() - age_s * 10**9)
        live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
        assert f"server {shown}" in " ".join(capsys.readouterr().out.split())


def test_a_learner_that_is_dead_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it did last stays on the page of one that was killed."""
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    page = LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    page.write(activity="learning", error="not started again: killed by signal 9", steps=7, compute_share=0.04)
    for pid, shown in ((os.getpid(), "learner running: learning"), (1 << 30, "learner dead")):
        page.write(pid=pid)
        page.beat()
        live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
        expected = f"{shown} learner's error not started again: killed by signal 9"
        out = " ".join(capsys.readouterr().out.split())
        assert expected in out
        assert ("4.0 % of compute" in out) is (pid == os.getpid())
        assert "last - against -" in out, "there was no trial"


def test_ranks_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EngineStatusPage.create(tmp_path / STATUS_NAME)
    LearnerStatusPage.create(tmp_path / LEARNER_STATUS_NAME)
    ranks = [RankStatusPage.create(rank_path(tmp_path, rank)) for rank in (1, 2, 3)]
    ranks[0].write(pid=7, heartbeat_ns=time.monotonic_ns() - 5 * 10**9)
    ranks[1].write(pid=8, error="RankError: lost")
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "rank 1 pid 7, last sign of life 5 s ago rank 2 RankError: lost rank 3 starting" in shown
    live_status.show(url=None, api_key=None, run_folder=tmp_path, as_json=True)
    assert [rank["pid"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [7, 8, 0]


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The URL of a server that gives one answer."""

    def give() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=give)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "cannot be reached"),  # not HTTP
        (b"HTTP/1.0 200 OK\r\n\r\n{}", "is no aurora-lit server"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", "is no aurora-lit server"),
    ],
)
def test_another_server_is_named(answer: bytes, said: str) -> None:
    with answering(answer) as url, pytest.raises(AuroraError, match=said):
        live_status.ask(url, None)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "file:///etc/passwd", ""])
def test_a_url_without_http_is_refused_by_name(url: str) -> None:
    with pytest.raises(AuroraError, match=f"--url {url} does not begin with http:// or https://"):
        live_status.ask(url, None)


@pytest.mark.parametrize("url", ["http://[::1", "http://a b", "http://"])
def test_a_malformed_url_is_one_line(url: str) -> None:
    with pytest.raises(AuroraError, match="cannot be reached"):
        live_status.ask(url, None)


def test_a_server_on_loopback_is_not_asked_for_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering(b'HTTP/1.0 200 OK\r\n\r\n{"worker": {}}') as url:
        assert live_status.ask(url, None) == {"worker": {}}
