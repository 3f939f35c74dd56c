"""The ring: whatever is killed, damaged or too slow, no wrong record is read, and lost records are counted."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import TESTS
from support.ring_payloads import LAYOUT, number_of, payload_of

from aurora_lit.errors import RingError
from aurora_lit.ipc.ring import RingReader, RingReaders, RingWriter, read_counters

HEADER = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traces-0.ring"


@pytest.fixture
def ring(path: Path) -> Iterator[tuple[RingWriter, RingReader]]:
    writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
    reader = RingReader.open(path, layout=LAYOUT)
    yield writer, reader
    writer.close()
    reader.close()


def push(writer: RingWriter, count: int) -> None:
    for _ in range(count):
        assert writer.push(payload_of(writer.counters.pushed))


def drain(reader: RingReader) -> list[int]:
    return [number_of(payload) for payload in iter(reader.pop, None)]


def test_records_come_out_as_they_went_in_round_and_round(ring: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ring
    rng = random.Random(0)
    read: list[int] = []
    while len(read) < 2000:
        push(writer, rng.randrange(10))
        assert reader.counters.queued_records == writer.counters.pushed - len(read)
        assert (reader.counters.queued_bytes == 0) == (reader.counters.queued_records == 0)
        read += drain(reader)
    assert read == list(range(len(read)))
    counters = writer.counters
    assert (counters.overwritten, counters.torn, counters.too_large, counters.queued_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4072])
def test_payloads_of_any_length_up_to_the_whole_ring(ring: tuple[RingWriter, RingReader], length: int) -> None:
    writer, reader = ring
    for offset in (0, 5, 700):
        writer.push(bytes(offset))
        reader.pop()
        payload = os.urandom(length)
        assert writer.push(memoryview(payload))
        assert reader.pop() == payload
        assert reader.pop() is None


def test_pieces_are_one_record_end_to_end_wherever_the_ring_goes_round(ring: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ring
    for number in range(60):
        pieces = [bytes([number]) * 5, b"", memoryview(bytes(range(number))), bytearray(b"end")]
        assert writer.push(*pieces)
        assert reader.pop() == b"".join(pieces)
    assert reader.counters.torn == 0
    assert writer.push()
    assert reader.pop() == b""


def test_a_payload_larger_than_the_ring_is_dropped_and_the_rest_stays(ring: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ring
    push(writer, 3)
    assert not writer.push(bytes(4073))
    assert (writer.counters.too_large, writer.counters.overwritten) == (1, 0)
    assert drain(reader) == [0, 1, 2]


def test_a_writer_without_a_reader_goes_on_and_counts_what_it_overwrites(path: Path) -> None:
    writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
    push(writer, 500)
    counters = read_counters(path)
    read = drain(RingReader.open(path, layout=LAYOUT))
    assert read == list(range(500 - len(read), 500)), "the newest are kept"
    assert len(read) > 10
    assert counters.overwritten == 500 - len(read)
    assert counters.queued_records == len(read)
    assert counters.queued_bytes > 0.8 * counters.capacity_bytes == 0.8 * (1 << 12)


def test_records_that_were_read_are_not_counted_as_lost(ring: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ring
    for _ in range(100):
        push(writer, 5)
        drain(reader)
    assert writer.counters.overwritten == 0
    assert writer.counters.popped == 500


def test_a_reader_that_is_behind_passes_over_the_oldest_which_count_as_overwritten(
    ring: tuple[RingWriter, RingReader],
) -> None:
    writer, reader = ring
    push(writer, 8)
    reader.pass_over(1.0)
    assert reader.counters.queued_records == 8
    reader.pass_over(3 / 8 * reader.counters.queued_bytes / reader.counters.capacity_bytes)
    left = reader.counters.queued_records
    assert 1 < left < 5
    assert reader.counters.overwritten == 8 - left
    assert drain(reader) == list(range(8 - left, 8))
    push(writer, 500)
    reader.pass_over(0.25)
    counters = reader.counters
    assert 0.1 < counters.queued_bytes / counters.capacity_bytes <= 0.25
    read = drain(reader)
    assert read == list(range(508 - len(read), 508))
    assert writer.counters.overwritten == 508 - left - len(read)


def test_the_next_reader_and_the_next_writer_continue_where_the_last_stopped(path: Path) -> None:
    RingWriter.create(path, 1 << 12, layout=LAYOUT).close()
    read = []
    for _ in range(50):
        writer = RingWriter.open(path, layout=LAYOUT)
        push(writer, 3)
        writer.close()
        reader = RingReader.open(path, layout=LAYOUT)
        read += [number_of(reader.pop() or b"") for _ in range(2)]
        reader.close()
        reader = RingReader.open(path, layout=LAYOUT)
        read += drain(reader)
        reader.close()
    assert read == list(range(150))


def test_one_reader_at_a_time(ring: tuple[RingWriter, RingReader], path: Path) -> None:
    files = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RingError, match="another learner"):
        RingReader.open(path, layout=LAYOUT)
    assert set(os.listdir("/proc/self/fd")) == files, "what is refused is closed"
    ring[1].close()
    again = RingReader.open(path, layout=LAYOUT)
    again.close()
    ring[1].__init__(path, layout=LAYOUT)  # type: ignore[misc]  # so that the fixture can close it


def test_no_push_is_the_first_to_touch_its_pages(path: Path) -> None:
    def faults_of_going_round_once(ring: RingWriter) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(64):
            ring.push(payload)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    payload = bytes(1 << 16)
    with contextlib.closing(RingWriter.create(path, 4 << 20, layout=LAYOUT)) as ring:
        untouched = faults_of_going_round_once(ring)
    with contextlib.closing(RingWriter.open(path, layout=LAYOUT)) as ring:
        ring.map_pages()
        mapped = faults_of_going_round_once(ring)
        assert mapped < 0.1 * untouched, (mapped, untouched)


def test_pages_of_a_ring_that_was_closed_meanwhile_are_left_alone(path: Path) -> None:
    ring = RingWriter.create(path, 4 << 20, layout=LAYOUT)
    ring.close()
    ring.map_pages()


def test_what_is_no_ring_or_has_another_layout_is_refused(path: Path, tmp_path: Path) -> None:
    writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_blocks * 512 >= HEADER + (1 << 12), "its memory is reserved"
    for open_ in (RingReader.open, RingWriter.open):
        with pytest.raises(RingError, match="another layout"):
            open_(path, layout="1" + LAYOUT[1:])
        with pytest.raises(RingError, match="server running"):
            open_(tmp_path / "none", layout=LAYOUT)
        for content in (b"", bytes(100), bytes(HEADER + 64), bytes(HEADER + 61)):
            (tmp_path / "other").write_bytes(content)
            with pytest.raises(RingError, match="no trace ring"):
                open_(tmp_path / "other", layout=LAYOUT)
    with pytest.raises(RingError, match="exists"):
        RingWriter.create(path, 1 << 12, layout=LAYOUT)
    writer.close()


# -- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(HEADER + place)
        file.write(data)


@pytest.mark.parametrize(
    ("place", "data", "kept"),
    [
        (24 + 3, b"\xff", [1, 2]),  # the first record's payload
        (16, b"\x01\x02\x03\x04", [1, 2]),  # its checksum
        (0, bytes([6]), [1, 2]),  # its lock word says another number
        (0, bytes([1]), []),  # its lock word says "being written": nothing of it can be believed
        (8, b"\xff\xff", []),  # its length reaches beyond the head
        (8, b"\xff" * 8, []),
        (0, bytes(24), []),
    ],
)
def test_a_damaged_record_is_skipped_and_counted(
    ring: tuple[RingWriter, RingReader], path: Path, place: int, data: bytes, kept: list[int]
) -> None:
    writer, reader = ring
    push(writer, 3)
    damage(path, place, data)
    assert 0 <= reader.counters.queued_records <= 8, "its lock word may say anything"
    assert drain(reader) == kept or (data == bytes(24) and drain(reader) == [])
    assert reader.counters.torn >= 1
    assert reader.counters.queued_records == 0
    push(writer, 2)
    assert reader.counters.queued_records == 2
    assert drain(reader) == [3, 4]


def test_scribbling_all_over_the_data_never_gives_a_wrong_record_and_passes(path: Path) -> None:
    rng = random.Random(1)
    writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
    reader = RingReader.open(path, layout=LAYOUT)
    for _ in range(300):
        push(writer, rng.randrange(30))
        damage(path, rng.randrange(1 << 12), rng.randbytes(1))
        reader.pass_over(rng.random())
        drain(reader)
    assert reader.counters.torn > 10
    for _ in range(3):  # the damage has been written over
        push(writer, 40)
        drain(reader)
    before = reader.counters.torn
    push(writer, 5)
    assert len(drain(reader)) == 5
    assert reader.counters.torn == before


@pytest.mark.parametrize("pushes", [1, 8, 40])
def test_a_record_that_is_written_over_while_it_is_read_is_not_returned(
    ring: tuple[RingWriter, RingReader], pushes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = ring
    push(writer, 40)
    at_once = reader._read

    def slow(offset: int, length: int) -> bytes:
        monkeypatch.undo()
        before = at_once(offset, length)
        push(writer, pushes)
        return before[: length // 2] + at_once(offset, length)[length // 2 :]

    monkeypatch.setattr(reader, "_read", slow)
    read = drain(reader)
    assert read == list(range(read[0], 40 + pushes))
    assert read[0] == writer.counters.overwritten
    push(writer, 3)
    assert reader.counters.queued_records == 3


def test_a_record_that_is_written_over_when_it_has_just_been_read_is_not_missing_among_those_that_wait(
    ring: tuple[RingWriter, RingReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer counts it as overwritten, and the reader as read."""
    writer, reader = ring
    push(writer, 40)
    checksum = zlib.crc32

    def slow(data: bytes, seed: int) -> int:
        monkeypatch.undo()
        push(writer, 1)
        return checksum(data, seed)

    for _ in range(20):
        push(writer, 1)
        monkeypatch.setattr(zlib, "crc32", slow)
        reader.pop()
    counters = reader.counters
    assert counters.popped + counters.overwritten + len(drain(reader)) > counters.pushed, "or nothing was counted twice"
    push(writer, 4)
    assert (reader.counters.queued_records, read_counters(reader.path).queued_records) == (4, 4)


def test_records_are_counted_as_waiting_while_they_are_written_over(
    ring: tuple[RingWriter, RingReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = ring
    push(writer, 60)
    at_once = reader._word

    def slow(offset: int) -> int:
        monkeypatch.undo()
        push(writer, 25)
        return at_once(offset)

    monkeypatch.setattr(reader, "_word", slow)
    counted = reader.counters.queued_records
    assert counted == len(drain(reader)) > 10


# -- death ---------------------------------------------------------------------------------------------------------


class _DeathError(BaseException):
    pass


def dies_at(line: int, function: Callable[[], object]) -> bool:
    """Whether `function` was ended before the n-th line that ring.py runs in it."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("ring.py"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise _DeathError
        return trace

    sys.settrace(trace)
    try:
        function()
    except _DeathError:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("full", [False, True])
def test_a_writer_that_dies_at_any_line_of_a_push_costs_at_most_that_record(path: Path, full: bool) -> None:
    line, died = 0, True
    while died:
        writer = RingWriter.create(path, 1 << 10, layout=LAYOUT)
        reader = RingReader.open(path, layout=LAYOUT)
        push(writer, 40 if full else 2)
        first = writer.counters.pushed
        died = dies_at(line, lambda: writer.push(payload_of(writer.counters.pushed)))  # noqa: B023
        writer = RingWriter.open(path, layout=LAYOUT)
        push(writer, 2)
        read = drain(reader)
        assert read == sorted(set(read))
        assert read[-1] == writer.counters.pushed - 1
        assert reader.counters.torn == 0
        if not full:
            assert {0, 1} < set(read)
            assert len(read) >= 4
        assert first - 1 in read or full
        path.unlink()
        line += 1
    assert line > 15


@pytest.mark.parametrize(
    ("read", "left"),
    [
        (RingReader.pop, ([1, 2, 3], [2, 3])),
        (lambda reader: reader.pass_over(reader.counters.queued_bytes / 2 / (1 << 12)), ([1, 2, 3], [2, 3], [3])),
    ],
    ids=["pop", "pass_over"],
)
def test_a_reader_that_dies_at_any_line_loses_nothing_but_what_it_may_have_had_or_left(
    path: Path, read: Callable[[RingReader], object], left: tuple[list[int], ...]
) -> None:
    line, died = 0, True
    while died:
        writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
        push(writer, 4)
        reader = RingReader.open(path, layout=LAYOUT)
        assert number_of(reader.pop() or b"") == 0
        died = dies_at(line, lambda: read(reader))  # noqa: B023
        reader.close()
        assert drain(RingReader.open(path, layout=LAYOUT)) in left
        path.unlink()
        line += 1
    assert line > 10


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from aurora_lit.ipc.process_lifetime import die_with_parent
die_with_parent({parent})
from support.ring_payloads import LAYOUT, payload_of
from aurora_lit.ipc.ring import RingWriter
writer = RingWriter.open(Path({path!r}), layout=LAYOUT)
print("ready", flush=True)
while True:
    writer.push(payload_of(writer.counters.pushed))
"""

READER = """
import sys, os
sys.path.insert(0, {tests!r})
from pathlib import Path
from aurora_lit.ipc.process_lifetime import die_with_parent
die_with_parent({parent})
from support.ring_payloads import LAYOUT, number_of
from aurora_lit.ipc.ring import RingReader
reader = RingReader.open(Path({path!r}), layout=LAYOUT)
print("ready", flush=True)
while True:
    reader.pass_over(0.6)
    payload = reader.pop()
    if payload is not None:
        try:
            number_of(payload)
        except AssertionError:
            os.write(2, b"wrong")
"""


def started(script: str, path: Path) -> subprocess.Popen[bytes]:
    code = script.format(tests=str(TESTS), path=str(path), parent=os.getpid())
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def killed(child: subprocess.Popen[bytes]) -> bytes:
    child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    return errors


def test_writers_killed_at_random_times_never_leave_a_wrong_record(path: Path) -> None:
    rng = random.Random(2)
    RingWriter.create(path, 1 << 12, layout=LAYOUT).close()
    reader = RingReader.open(path, layout=LAYOUT)
    last = -1
    for _ in range(6):
        child = started(WRITER, path)
        end = time.monotonic() + rng.uniform(0.02, 0.2)
        while time.monotonic() < end:
            for number in drain(reader):
                assert number > last
                last = number
        assert killed(child) == b""
    for number in drain(reader):
        assert number > last
        last = number
    counters = reader.counters
    assert counters.pushed > 1000
    assert counters.popped > 50
    assert counters.torn == 0
    # A reader and a writer that meet at one record may both count it, and how often they meet grows with the pushes.
    assert abs(counters.pushed - counters.popped - counters.overwritten) <= max(20, counters.pushed // 50)


def test_readers_killed_at_random_times_never_read_a_wrong_record_nor_delay_the_writer(path: Path) -> None:
    rng = random.Random(3)
    writer = RingWriter.create(path, 1 << 12, layout=LAYOUT)
    for _ in range(4):
        child = started(READER, path)
        end = time.monotonic() + rng.uniform(0.05, 0.2)
        while time.monotonic() < end:
            push(writer, 50)
        assert killed(child) == b""
    counters = writer.counters
    assert counters.popped > 50
    assert counters.torn == 0
    push(writer, 5)  # the last reader may have caught up before it was killed
    reader = RingReader.open(path, layout=LAYOUT)
    rest = drain(reader)
    assert len(rest) >= 5
    assert rest == list(range(rest[0], writer.counters.pushed))


# -- no room -------------------------------------------------------------------------------------------------------


def test_no_room_in_shared_memory_is_a_clear_error_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RingError, match=r"No space left.*trace.capacity_mb"):
        RingWriter.create(path, 1 << 20, layout=LAYOUT)
    assert list(path.parent.iterdir()) == []


def test_a_ring_that_nobody_reads_takes_no_memory_and_nothing_is_written(path: Path) -> None:
    writer = RingWriter.create(path, 1 << 20, layout=LAYOUT, reserve=False)
    assert not writer.push(b"nobody reads this")
    assert read_counters(path).pushed == 0
    assert path.stat().st_blocks * 512 < 1 << 16
    assert read_counters(path).capacity_bytes == 1 << 20


def test_the_first_reader_gives_the_ring_its_memory_and_later_ones_continue(path: Path) -> None:
    writer = RingWriter.create(path, 1 << 20, layout=LAYOUT, reserve=False)
    with contextlib.closing(RingReader.open(path, layout=LAYOUT)) as reader:
        assert path.stat().st_blocks * 512 >= 1 << 20
        assert writer.push(b"one")
        assert reader.pop() == b"one"
    assert writer.push(b"two"), "the learner may come back"
    with contextlib.closing(RingReader.open(path, layout=LAYOUT)) as reader:
        assert reader.pop() == b"two"


def test_no_room_for_a_reader_that_comes_late_is_its_error_and_the_writer_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = RingWriter.create(path, 1 << 20, layout=LAYOUT, reserve=False)
    with monkeypatch.context() as no_room:
        no_room.setattr(os, "posix_fallocate", full)
        with pytest.raises(RingError, match=r"No space left.*trace.capacity_mb"):
            RingReader.open(path, layout=LAYOUT)
    assert not writer.push(b"still nobody")
    with contextlib.closing(RingReader.open(path, layout=LAYOUT)) as reader:  # the lock was released
        assert writer.push(b"now")
        assert reader.pop() == b"now"


def test_where_no_call_reserves_space_the_ring_takes_it_by_zeros(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac. A hole that a push would fill on a full disk would end the writer with SIGBUS."""
    monkeypatch.delattr(os, "posix_fallocate")
    RingWriter.create(path, 1 << 20, layout=LAYOUT).close()
    assert path.stat().st_blocks * 512 >= 1 << 20
    path.unlink()
    writer = RingWriter.create(path, 1 << 20, layout=LAYOUT, reserve=False)
    assert path.stat().st_blocks * 512 < 1 << 16
    with contextlib.closing(RingReader.open(path, layout=LAYOUT)) as reader:
        assert path.stat().st_blocks * 512 >= 1 << 20
        assert path.stat().st_size == HEADER + (1 << 20)
        assert writer.push(b"one")
        assert reader.pop() == b"one"


@pytest.mark.parametrize("reserves", ["", "del os.posix_fallocate\n"])
def test_a_file_system_that_takes_less_than_the_ring_refuses_it_at_once(reserves: str, path: Path) -> None:
    code = (
        f"import os\n{reserves}from pathlib import Path; from aurora_lit.ipc.ring import RingWriter\n"
        f"RingWriter.create(Path({str(path)!r}), 1 << 20, layout={LAYOUT!r})"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert "RingError" in child.stderr
    assert child.returncode == 1
    assert list(path.parent.iterdir()) == []


def test_a_ring_too_small_to_hold_anything_is_refused(path: Path) -> None:
    with pytest.raises(RingError, match="trace.capacity_mb"):
        RingWriter.create(path, 40, layout=LAYOUT)


def test_the_rings_of_several_engines_are_read_in_turn(tmp_path: Path) -> None:
    paths = [tmp_path / f"traces-{i}.ring" for i in range(2)]
    writers = [RingWriter.create(path, 1 << 12, layout=LAYOUT) for path in paths]
    readers = RingReaders.open(paths, layout=LAYOUT)
    for _ in range(3):
        assert writers[0].push(b"first")
    assert writers[1].push(b"second")
    assert readers.lag_records == 4
    assert readers.lag_bytes > 0
    assert list(iter(readers.pop, None)) == [b"first", b"second", b"first", b"first"]
    assert readers.lag_records == 0
    for number in b"123":
        assert writers[0].push(bytes([number]))
    assert writers[1].push(b"second")
    readers.pass_over(40 / (1 << 12))  # of each the newest one
    assert list(iter(readers.pop, None)) == [b"second", b"3"]
    with pytest.raises(RingError, match="another learner"):
        RingReaders.open(paths, layout=LAYOUT)
    readers.close()
    with pytest.raises(RingError, match="cannot be opened"):
        RingReaders.open([paths[0], tmp_path / "none"], layout=LAYOUT)
    RingReaders.open(paths, layout=LAYOUT).close()  # the first one was freed again
    for writer in writers:
        writer.close()
