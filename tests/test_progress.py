"""Long work says how far it is: a line every 30 seconds without a terminal, and a bar in one."""

from __future__ import annotations

import io
import sys
import time

import pytest

from aurora_lit.progress import Progress, waiting


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_30_seconds_with_the_time_left_and_one_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("pretrain", 1200, "answers", done=200, stream=stream, clock=clock) as progress:
        for second in range(1, 101):
            clock.now = 1000.0 + second
            progress.advance(4, note="loss 2.5" if second > 50 else None)
        clock.now += 20 * 60
        progress.advance(600)
    assert stream.getvalue().splitlines() == [
        "pretrain: 320 of 1,200 answers (27 %), 4 min left",
        "pretrain: 440 of 1,200 answers (37 %), loss 2.5, 3 min left",
        "pretrain: 560 of 1,200 answers (47 %), loss 2.5, 3 min left",
        "pretrain: 1,200 of 1,200 answers (100 %), loss 2.5",
        "pretrain: 1,200 of 1,200 answers (100 %), loss 2.5 in 22 min",
    ]


def test_hours_and_work_of_unknown_size() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("waiting", None, "MB", stream=stream, clock=clock) as waiting:
        clock.now += 30
        waiting.advance(0)
    with Progress("packing", 1000, "tensors", stream=stream, clock=clock) as packing:
        clock.now += 36
        packing.advance(0)
        clock.now += 36
        packing.advance(5)
    assert stream.getvalue().splitlines() == [
        "waiting: 0 MB",
        "waiting: 0 MB in 30 s",
        "packing: 0 of 1,000 tensors (0 %)",
        "packing: 5 of 1,000 tensors (0 %), 4.0 h left",
        "packing: 5 of 1,000 tensors (0 %) in 72 s",
    ]


def test_short_work_and_work_that_is_not_shown_print_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("short", 2, "steps", stream=stream, clock=clock) as short:
        clock.now += 29
        short.advance(2)
    with Progress("of another rank", 2, "steps", shown=False, stream=stream, clock=clock) as hidden:
        clock.now += 31
        hidden.advance(2)
    with Progress("of another rank", 2, "steps", shown=False, stream=(terminal := Terminal())) as hidden:
        hidden.advance(2)
    assert stream.getvalue() == terminal.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("[answering]", 4, "prompts", stream=stream) as progress:
        progress.advance(3, note="loss 2.5")
    assert "[answering]" in stream.getvalue()
    assert "3 of 4 prompts (75 %), loss 2.5" in stream.getvalue()


def test_the_time_that_a_library_takes_is_told_in_a_log_and_left_to_it_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream, told in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with waiting("Converting x", every_s=0.02):
            deadline = time.monotonic() + (10 if told else 0.2)
            while "Converting x: 0 seconds\n" not in stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        assert ("Converting x: 0 seconds\n" in stream.getvalue()) == told
