"""The trace ring: byte records in a memory-mapped file, from one writer that never waits to one reader.

If the reader does not keep up, the oldest records are overwritten and counted, unless it has passed them over. Either
process may be killed at any instruction: the other one continues, and no wrong record is ever returned. The reader's
position is stored in the file, so the next reader continues where the last one stopped. Leaves out what the records
mean (traces/record.py).

    writer = RingWriter.create(folder / "traces-0.ring", 1 << 28, layout=LAYOUT_DIGEST)
    writer.push(header, payload)                                    # True, or False and counted
    reader = RingReader.open(folder / "traces-0.ring", layout=LAYOUT_DIGEST)
    reader.pop()                                                    # the oldest payload, None when there is none
    read_counters(folder / "traces-0.ring").overwritten             # in any process

A ring made with `reserve=False` takes no memory until a reader opens it; until then `push` writes nothing.

Offsets count bytes since the ring was made and only grow; offset o is byte o % capacity of the data. Records fill
[oldest, head) without gaps. The writer moves `oldest` before it overwrites a record and `head` after it has written
one, so a record whose writing was interrupted is outside. A record is a lock word (2n + 1 while record n is being
written, 2n + 2 after), its length, its CRC32 (seeded with n), and the payload, padded to whole words.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
import zlib
from dataclasses import dataclass
from enum import IntEnum, auto
from pathlib import Path

from aurora_lit.errors import RingError
from aurora_lit.ipc.page import counter, gauge, reserve_space

_MAGIC = 0x32474E49_52524C41
_HEADER_BYTES = 4096
_RECORD_BYTES = 24
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it


class _Word(IntEnum):
    """Indices of the header's words."""

    MAGIC = 0
    LAYOUT = auto()
    CAPACITY = auto()
    HEAD = auto()
    OLDEST = auto()
    PUSHED = auto()
    """Records written, which is also the number of the next record."""
    OVERWRITTEN = auto()
    TOO_LARGE = auto()
    RESERVED = auto()
    """1 as soon as the data has its memory; the writer then begins to write."""
    # The words that the reader writes have a cache line of their own.
    CURSOR = 16
    POPPED = auto()
    TORN = auto()
    PASSED_OVER = auto()


@dataclass(frozen=True, kw_only=True)
class RingCounters:
    """Counts since the ring was made."""

    pushed: int = counter("aurora_traces_pushed", "Traces written to the ring.", report="pushed")
    """Records written."""
    popped: int = counter(report="read")
    """Records read."""
    overwritten: int
    """Records overwritten before they were read, or passed over by a reader that was behind."""
    too_large: int
    """Payloads larger than the whole ring, dropped."""
    torn: int
    """Records that were damaged and skipped."""
    queued_records: int = gauge("aurora_traces_queued", "Traces in the ring that are not read yet.", report="queued")
    """Records written and not read yet; one more for each time that the writer was killed while it wrote them. Not what
    the counts above leave: a record that is overwritten while it is read may be in two of them."""
    queued_bytes: int = gauge(
        "aurora_traces_queued_bytes", "Bytes in the ring that are not read yet.", report="queued_bytes"
    )
    """Their bytes, record headers included."""
    capacity_bytes: int = gauge(report="capacity_bytes")

    @property
    def dropped(self) -> dict[str, int]:
        """Records lost, by cause."""
        return {"overwritten": self.overwritten, "too_large": self.too_large, "torn": self.torn}


class _Ring:
    """The mapped file: header words, and data bytes in a circle."""

    def __init__(self, path: Path, *, layout: str | None, writable: bool = True) -> None:
        """Map an existing ring. Raises RingError if the file is no ring, or one of another layout than `layout`."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        except OSError as error:
            raise RingError(f"{path} cannot be opened: {error.strerror}; is the server running?") from error
        try:
            self._map(layout, mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        except BaseException:
            self.close()
            raise

    def _map(self, layout: str | None, access: int) -> None:
        size = os.fstat(self._descriptor).st_size
        if size <= _HEADER_BYTES or size % 8:
            raise RingError(f"{self.path} is no trace ring")
        self._memory = mmap.mmap(self._descriptor, size, access=access)
        self._words = memoryview(self._memory)[:_HEADER_BYTES].cast("Q")
        self._data = memoryview(self._memory)[_HEADER_BYTES:]
        self._data_words = self._data.cast("Q")
        self._capacity = len(self._data)
        if self._words[_Word.MAGIC] != _MAGIC or self._words[_Word.CAPACITY] != self._capacity:
            raise RingError(f"{self.path} is no trace ring of this version")
        if layout is not None and self._words[_Word.LAYOUT] != _layout_word(layout):
            raise RingError(f"{self.path} holds records of another layout; run server and learner from one version")

    @property
    def counters(self) -> RingCounters:
        """One reading; the numbers may be from slightly different moments."""
        words = self._words
        queued_records, queued_bytes = self._queued()
        return RingCounters(
            pushed=words[_Word.PUSHED],
            popped=words[_Word.POPPED],
            overwritten=words[_Word.OVERWRITTEN] + words[_Word.PASSED_OVER],
            too_large=words[_Word.TOO_LARGE],
            torn=words[_Word.TORN],
            queued_records=queued_records,
            queued_bytes=queued_bytes,
            capacity_bytes=self._capacity,
        )

    def _queued(self) -> tuple[int, int]:
        """Records and bytes written and not read yet, by the number of the first one."""
        words = self._words
        while True:
            cursor, head = max(words[_Word.CURSOR], words[_Word.OLDEST]), words[_Word.HEAD]
            if cursor >= head:
                return 0, 0
            number, size = self._word(cursor) // 2 - 1, head - cursor
            if words[_Word.OLDEST] <= cursor:  # else it may be another record's number already
                # A damaged one says anything.
                return min(max(0, words[_Word.PUSHED] - number), size // _RECORD_BYTES), size

    @property
    def is_reserved(self) -> bool:
        """True if the data has its memory, so that records are written: a reader has opened the ring, or may."""
        return bool(self._words[_Word.RESERVED])

    def reserve(self) -> None:
        """Give the data its memory, so that no access raises SIGBUS. Raises RingError if there is no room."""
        if not self.is_reserved:
            try:
                reserve_space(self._descriptor, len(self._memory), empty_from=_HEADER_BYTES)
            except OSError as error:
                raise _no_room(self.path, self._capacity, error) from error
            self._words[_Word.RESERVED] = 1

    def close(self) -> None:
        """Unmap the file and release the lock, if held; the file stays."""
        for name in ("_words", "_data_words", "_data"):
            if name in self.__dict__:
                self.__dict__[name].release()
        if "_memory" in self.__dict__:
            self._memory.close()
        os.close(self._descriptor)

    def _word(self, offset: int) -> int:
        return self._data_words[offset % self._capacity // 8]

    def _set_word(self, offset: int, value: int) -> None:
        """Store a word in one write."""
        self._data_words[offset % self._capacity // 8] = value

    def _pieces(self, offset: int, length: int) -> tuple[memoryview, memoryview]:
        """`length` bytes from `offset` on, in two pieces if they wrap around the end."""
        start = offset % self._capacity
        first = min(length, self._capacity - start)
        return self._data[start : start + first], self._data[: length - first]


class RingWriter(_Ring):
    """The one writer of a ring. Not thread-safe."""

    @classmethod
    def create(cls, path: Path, capacity_bytes: int, *, layout: str, reserve: bool = True) -> RingWriter:
        """Make a ring that only this user can read. `reserve`: with all its memory; otherwise the first reader does it.

        Raises RingError if there is no room for it, or a file of that name exists.
        """
        capacity = capacity_bytes // 8 * 8
        if capacity < 2 * _RECORD_BYTES:
            raise RingError(f"a ring of {capacity_bytes} bytes holds nothing; raise trace.capacity_mb")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                reserve_space(descriptor, _HEADER_BYTES + (capacity if reserve else 0), empty_from=_HEADER_BYTES)
                os.ftruncate(descriptor, _HEADER_BYTES + capacity)
                for word, value in (
                    (_Word.MAGIC, _MAGIC),
                    (_Word.LAYOUT, _layout_word(layout)),
                    (_Word.CAPACITY, capacity),
                    (_Word.RESERVED, int(reserve)),
                ):
                    os.pwrite(descriptor, value.to_bytes(8, sys.byteorder), 8 * word)
                os.link(temporary, path)  # the name appears only when the header is complete
            finally:
                os.close(descriptor)
                os.unlink(temporary)
        except OSError as error:
            raise _no_room(path, capacity, error) from error
        return cls.open(path, layout=layout)

    @classmethod
    def open(cls, path: Path, *, layout: str) -> RingWriter:
        """Continue a ring whose writer has ended, or that another process made. Raises RingError."""
        return cls(path, layout=layout)

    def map_pages(self) -> None:
        """Fault the ring's pages in ahead of time, if the kernel supports it (Linux 5.14).

        A push that is the first to touch its pages takes six times as long (1.3 ms against 0.2 ms for 2 MB). Meant for
        a thread of its own: it works in pieces of 1 MiB, each of which takes less than a millisecond.
        """
        with contextlib.suppress(
            OSError, ValueError
        ):  # OSError: an older kernel; ValueError: the ring was closed meanwhile
            for start in range(0, len(self._memory), 1 << 20):
                self._memory.madvise(_MADV_POPULATE_WRITE, start, min(1 << 20, len(self._memory) - start))

    def push(self, *pieces: bytes | bytearray | memoryview) -> bool:
        """Write `pieces`, joined, as one record. Never waits.

        Returns False if it is larger than the whole ring, which is counted, or if the ring has no memory yet.

        Takes pieces so that data from several places is copied only once, into the ring.
        """
        if not self.is_reserved:
            return False
        words, length = self._words, sum(map(len, pieces))
        size = _record_size(length)
        if size > self._capacity:
            words[_Word.TOO_LARGE] += 1
            return False
        head, number = words[_Word.HEAD], words[_Word.PUSHED]
        self._make_room(head + size - self._capacity, head)
        self._set_word(head, 2 * number + 1)
        self._set_word(head + 8, length)
        checksum, offset = number & 0xFFFFFFFF, head + _RECORD_BYTES
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
            first, second = self._pieces(offset, len(piece))
            first[:] = memoryview(piece)[: len(first)]
            second[:] = memoryview(piece)[len(first) :]
            offset += len(piece)
        self._set_word(head + 16, checksum)
        self._set_word(head, 2 * number + 2)
        # A writer killed between these two lines skips a number and loses no record.
        words[_Word.PUSHED] = number + 1
        words[_Word.HEAD] = head + size
        return True

    def _make_room(self, until: int, head: int) -> None:
        """Drop the oldest records until none begins before `until`; all of them if a length is damaged."""
        oldest, unread = self._words[_Word.OLDEST], 0
        if oldest >= until:
            return
        while oldest < until:
            unread += oldest >= self._words[_Word.CURSOR]
            oldest = min(head, oldest + _record_size(self._word(oldest + 8)))
        self._words[_Word.OLDEST] = oldest
        self._words[_Word.OVERWRITTEN] += unread


class RingReader(_Ring):
    """The one reader of a ring; holds the file's lock."""

    @classmethod
    def open(cls, path: Path, *, layout: str) -> RingReader:
        """Continue where the last reader stopped; the first one gives the ring its memory.

        Raises RingError if another reader is open, for another layout, or if there is no room.
        """
        reader = cls(path, layout=layout)
        try:
            fcntl.flock(reader._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reader.close()
            raise RingError(f"{path} is read by another learner; one ring has one reader") from error
        try:
            reader.reserve()
        except RingError:
            reader.close()
            raise
        return reader

    def pop(self) -> bytes | None:
        """The oldest intact record; None when there is none. Damaged records are skipped and counted."""
        words = self._words
        while True:
            cursor, head = max(words[_Word.CURSOR], words[_Word.OLDEST]), words[_Word.HEAD]
            if cursor >= head:
                return None
            lock, length, checksum = self._word(cursor), self._word(cursor + 8), self._word(cursor + 16)
            size = _record_size(length)
            whole = lock % 2 == 0 and cursor + size <= head
            payload = self._read(cursor + _RECORD_BYTES, length) if whole else b""
            if words[_Word.OLDEST] > cursor or self._word(cursor) != lock:
                continue  # overwritten meanwhile; the writer has counted it
            if whole and zlib.crc32(payload, (lock // 2 - 1) & 0xFFFFFFFF) == checksum:
                words[_Word.CURSOR] = cursor + size
                words[_Word.POPPED] += 1
                return payload
            # A record that is not whole may have a wrong length, so the start of the next one is unknown: skip all.
            words[_Word.CURSOR] = cursor + size if whole else head
            words[_Word.TORN] += 1

    def pass_over(self, most: float) -> None:
        """Leave out the oldest records, counted as overwritten, until the others fill at most this part of the ring."""
        words = self._words
        while self._queued()[1] > most * self._capacity:
            cursor, head = max(words[_Word.CURSOR], words[_Word.OLDEST]), words[_Word.HEAD]
            lock, size = self._word(cursor), _record_size(self._word(cursor + 8))
            if words[_Word.OLDEST] > cursor:
                continue  # overwritten meanwhile; the writer has counted it
            if lock % 2 or cursor + size > head:
                return  # damaged, which `pop` counts
            words[_Word.CURSOR] = cursor + size
            words[_Word.PASSED_OVER] += 1

    def _read(self, offset: int, length: int) -> bytes:
        """Not through the mapping, or all of the ring would count as this process's memory."""
        start = offset % self._capacity
        first = os.pread(self._descriptor, min(length, self._capacity - start), _HEADER_BYTES + start)
        return first if len(first) == length else first + os.pread(self._descriptor, length - len(first), _HEADER_BYTES)


class RingReaders:
    """The rings of several engines, as one: each in turn, so that none waits for another.

    reader = RingReaders.open([folder / "traces-0.ring", folder / "traces-1.ring"], layout=LAYOUT_DIGEST)
    """

    def __init__(self, readers: list[RingReader]) -> None:
        """Use `open` instead."""
        self._readers, self._next = readers, 0

    @classmethod
    def open(cls, paths: list[Path], *, layout: str) -> RingReaders:
        """As `RingReader.open`, for each."""
        with contextlib.ExitStack() as opened:
            readers = [opened.enter_context(contextlib.closing(RingReader.open(path, layout=layout))) for path in paths]
            opened.pop_all()
        return cls(readers)

    def pop(self) -> bytes | None:
        """A record of the next ring that has one; None if none has."""
        for _ in self._readers:
            reader = self._readers[self._next]
            self._next = (self._next + 1) % len(self._readers)
            if (payload := reader.pop()) is not None:
                return payload
        return None

    def pass_over(self, most: float) -> None:
        """As `RingReader.pass_over`, of each ring."""
        for reader in self._readers:
            reader.pass_over(most)

    @property
    def lag_bytes(self) -> int:
        """Bytes written and not read yet."""
        return sum(reader.counters.queued_bytes for reader in self._readers)

    @property
    def lag_records(self) -> int:
        """Records written and not read yet."""
        return sum(reader.counters.queued_records for reader in self._readers)

    def close(self) -> None:
        """Close all."""
        for reader in self._readers:
            reader.close()


def read_counters(path: Path) -> RingCounters:
    """A ring's counters, readable by any process. Raises RingError."""
    ring = _Ring(path, layout=None, writable=False)
    try:
        return ring.counters
    finally:
        ring.close()


def _record_size(length: int) -> int:
    return _RECORD_BYTES + (length + 7) // 8 * 8


def _layout_word(layout: str) -> int:
    return int(layout, 16) & 0xFFFFFFFF_FFFFFFFF


def _no_room(path: Path, capacity: int, error: OSError) -> RingError:
    remedy = "make room or lower trace.capacity_mb"
    return RingError(f"{path}: no ring of {capacity} bytes can be made here: {error.strerror}; {remedy}")
