"""Traces reach ring and disk, and neither a slow nor a full disk delays the caller."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fork_host import run_program
from support.trace_examples import same_trace, trace_with_rounds

from aurora_lit.ipc.ring import RingReader, RingWriter
from aurora_lit.serve.worker.trace_sinks import TraceRecording, TraceSinks
from aurora_lit.traces import log as trace_log
from aurora_lit.traces.log import read_index, read_shard
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace, from_bytes


def a_trace(number: int = 0) -> Trace:
    return trace_with_rounds([(1, 4, 1)], first_position=number)


def recorded(folder: Path) -> list[int]:
    return [trace.first_position for shard in read_index(folder) for trace in read_shard(folder / shard.name)]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def test_a_trace_goes_into_the_ring_and_onto_the_disk(tmp_path: Path) -> None:
    ring = RingWriter.create(tmp_path / "ring", 1 << 16, layout=LAYOUT_DIGEST)
    sinks = TraceSinks(ring=ring, recording=TraceRecording(tmp_path / "log", max_bytes=1 << 20))
    for number in range(3):
        sinks(a_trace(number))
    sinks.close()
    reader = RingReader.open(tmp_path / "ring", layout=LAYOUT_DIGEST)
    popped = [from_bytes(payload) for payload in iter(reader.pop, None)]
    assert all(same_trace(trace, a_trace(i)) for i, trace in enumerate(popped))
    assert len(popped) == 3
    assert recorded(tmp_path / "log") == [0, 1, 2]
    TraceSinks(ring=None)(a_trace())


def test_traces_go_into_the_ring_from_when_a_learner_is_attached(tmp_path: Path) -> None:
    path = tmp_path / "ring"
    sinks = TraceSinks(ring=RingWriter.create(path, 1 << 16, layout=LAYOUT_DIGEST, reserve=False))
    sinks(a_trace(0))
    reader = RingReader.open(path, layout=LAYOUT_DIGEST)
    for number in (1, 2):
        sinks(a_trace(number))
    popped = [from_bytes(payload).first_position for payload in iter(reader.pop, None)]
    reader.close()
    sinks.close()
    assert popped == [1, 2]


def test_a_queued_trace_does_not_depend_on_the_memory_of_the_original(tmp_path: Path) -> None:
    sinks, trace = TraceSinks(ring=None, recording=TraceRecording(tmp_path, max_bytes=1 << 20)), a_trace()
    sinks(trace)
    trace.aux_T3H.fill_(-1)  # the slot's next request
    sinks.close()
    (kept,) = [each for shard in read_index(tmp_path) for each in read_shard(tmp_path / shard.name)]
    assert bool((kept.aux_T3H == a_trace().aux_T3H).all())


def test_what_is_pending_is_written_after_a_while_and_by_size(tmp_path: Path) -> None:
    idle = TraceRecording(tmp_path / "idle", max_bytes=1 << 30, flush_s=0.05)
    idle.put(a_trace())
    eventually(lambda: idle.written == 1)
    steady = TraceRecording(tmp_path / "steady", max_bytes=1 << 30, flush_s=0.1)
    for number in range(25):  # never 0.1 s without one
        steady.put(a_trace(number))
        time.sleep(0.02)
    assert steady.written > 0
    steady.close()
    busy = TraceRecording(tmp_path / "busy", max_bytes=1 << 15, flush_s=1e6)
    for number in range(40):
        eventually(lambda: busy._queue.qsize() < 8)
        busy.put(a_trace(number))
    eventually(lambda: busy.written > 20)
    busy.close()
    assert busy.written == 40
    kept = recorded(tmp_path / "busy")
    assert kept == list(range(40 - len(kept), 40))
    assert sum(p.stat().st_size for p in (tmp_path / "busy").glob("*.safetensors")) <= 1 << 15


def test_a_disk_that_hangs_does_not_delay_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    save = trace_log.save_file

    def slow(*args: Any, **options: Any) -> None:
        hanging.wait(60)
        save(*args, **options)

    monkeypatch.setattr(trace_log, "save_file", slow)
    recording = TraceRecording(tmp_path, max_bytes=1 << 15)
    started = time.monotonic()
    for number in range(300):
        recording.put(a_trace(number))
    assert time.monotonic() - started < 20
    assert recording.dropped >= 300 - 40
    hanging.set()
    recording.close()
    assert recording.written + recording.dropped == 300


def test_a_full_disk_is_counted_and_logged_once_and_recording_continues_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recording = TraceRecording(tmp_path, max_bytes=1 << 20, flush_s=0.01)
    monkeypatch.setattr(trace_log, "save_file", full)
    with caplog.at_level(logging.ERROR):
        for number in range(3):
            recording.put(a_trace(number))
            eventually(lambda number=number: recording.dropped == number + 1)  # type: ignore[misc]
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    monkeypatch.undo()
    recording.put(a_trace(7))
    recording.close()
    assert (recorded(tmp_path), recording.written, recording.dropped) == ([7], 1, 3)


def test_recording_survives_any_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = TraceRecording(tmp_path, max_bytes=1 << 20, flush_s=0.01)
    flush = recording._log.flush

    def short_of_memory() -> None:
        monkeypatch.setattr(recording._log, "flush", flush)
        raise RuntimeError("cannot allocate memory")

    monkeypatch.setattr(recording._log, "flush", short_of_memory)
    recording.put(a_trace(1))
    eventually(lambda: recording.dropped == 1)
    recording.put(a_trace(2))
    recording.close()
    assert (recording.written, recording.dropped) == (1, 1)


def test_a_real_limit_on_the_file_system_is_survived(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from support.trace_examples import trace_with_rounds
from aurora_lit.serve.worker.trace_sinks import TraceRecording
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))
recording = TraceRecording(Path({str(tmp_path)!r}), max_bytes=1 << 24, flush_s=0.01)
recording.put(trace_with_rounds([], length=4000))
recording.close()
print(recording.written, recording.dropped)
"""
    child = run_program(code)
    assert child.stdout.split() == ["0", "1"]
    assert "cannot be recorded" in child.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
