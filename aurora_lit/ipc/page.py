"""One mmap'ed page that holds one record: a writer in one process, any number of readers in others.

The record is a frozen dataclass of int, float, str and tuple[int, ...] fields; its layout follows from the class, and
a digest of that layout stands at the page's head, so a page of another version is refused. Leaves out what the records
mean (ipc/engine_status.py, ipc/learner_status.py).

    class StatusBlock(Page[Status]):
        kind = Status

    page = StatusBlock.create(path)
    StatusBlock.open(path, writable=True).write(running=3)     # in the writer
    page.read().running                                        # 3
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import struct
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

_HEADER_WORDS = 2
"""Layout digest, and the sequence number (odd while the writer is inside)."""
_BEAT = "heartbeat_ns"


class Heartbeat(Protocol):
    """What every record has."""

    @property
    def heartbeat_ns(self) -> int:
        """time.monotonic_ns() of the writer's last sign of life; 0 before the first."""


Record = TypeVar("Record", bound=Heartbeat)


def text(size_bytes: int) -> Any:
    """A str field; longer texts are cut, at a whole character."""
    return dataclasses.field(metadata={"bytes": size_bytes})


def counts(number: int) -> Any:
    """A tuple[int, ...] field of so many entries."""
    return dataclasses.field(metadata={"count": number})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a field lies."""

    kind: str
    """"Q" whole numbers, "d" floats, "s" text."""
    first: int
    """Index of its first word (8 bytes)."""
    words: int
    build: Any
    """Makes the field's value from what is stored."""


class Page(Generic[Record]):
    """The page itself. Words are stored whole; the sequence number lets a reader see a torn reading and read again."""

    kind: ClassVar[type[Any]]
    """The record's class."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Use `create` or `open` instead."""
        self._memory = memory
        self._places, _, _ = _layout(self.kind)
        self._whole = memoryview(memory).cast("Q")
        self._floats = memoryview(memory).cast("B").cast("d")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a zeroed page that only this user can read; the space is reserved at once, so no write can SIGBUS."""
        _, size_bytes, digest = _layout(cls.kind)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size_bytes)
            else:
                os.ftruncate(descriptor, size_bytes)
            page = cls(mmap.mmap(descriptor, size_bytes))
        finally:
            os.close(descriptor)
        page._whole[0] = digest
        return page

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Map a page that another process created; ValueError when it holds another record."""
        _, size_bytes, digest = _layout(cls.kind)
        refusal = f"{path} is no {cls.kind.__name__} page of this version; delete it"
        descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size != size_bytes:
                raise ValueError(refusal)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            memory = mmap.mmap(descriptor, size_bytes, access=access)
        finally:
            os.close(descriptor)
        if struct.unpack_from("=Q", memory)[0] != digest:
            raise ValueError(refusal)
        return cls(memory)

    def beat(self) -> None:
        """Say that the writer lives; the only write that another thread of it may do."""
        self._whole[self._places[_BEAT].first] = time.monotonic_ns()

    def write(self, **fields: Any) -> None:
        """Set some fields of the record; readers see all of them change together."""
        self._whole[1] |= 1  # odd already where the last writer was killed inside a write
        for name, value in fields.items():
            place = self._places[name]
            if place.kind == "d":
                self._floats[place.first] = value
            elif place.kind == "s":
                start, size = 8 * place.first, 8 * place.words
                self._memory[start : start + size] = value.encode()[:size].ljust(size, b"\0")
            elif place.words == 1:
                self._whole[place.first] = value
            else:
                for index, count in enumerate(value[: place.words]):
                    self._whole[place.first + index] = count
        self._whole[1] += 1

    def peek(self, name: str) -> int:
        """A whole number as it is now, whatever the other fields are."""
        return self._whole[self._places[name].first]

    def read(self) -> Record:
        """A consistent reading. After a writer that died inside a write, the last try is taken as it is."""
        for _ in range(200):
            before = self._whole[1]
            content = bytes(self._memory)
            if before % 2 == 0 and self._whole[1] == before:
                break
            time.sleep(1e-4)  # the writer lost its core inside a write
        record: Record = self.kind(**{name: _value(content, place) for name, place in self._places.items()})
        return record


def heartbeat_age_s(record: Heartbeat) -> float:
    """Seconds since the writer's last sign of life."""
    return (time.monotonic_ns() - record.heartbeat_ns) / 1e9


def _value(content: bytes, place: _Place) -> Any:
    start, size = 8 * place.first, 8 * place.words
    if place.kind == "s":
        return content[start : start + size].rstrip(b"\0").decode(errors="ignore")
    values = struct.unpack_from(f"={place.words}{place.kind}", content, start)
    return place.build(values[0] if place.words == 1 else values)


def _layout(kind: type[Any]) -> tuple[dict[str, _Place], int, int]:
    """The places of a record's fields, the page's size in bytes, and a digest of both."""
    types = typing.get_type_hints(kind)
    places: dict[str, _Place] = {}
    at = _HEADER_WORDS
    for field in dataclasses.fields(kind):
        if "bytes" in field.metadata:
            place = _Place(kind="s", first=at, words=field.metadata["bytes"] // 8, build=str)
        elif "count" in field.metadata:
            place = _Place(kind="Q", first=at, words=field.metadata["count"], build=tuple)
        elif types[field.name] is float:
            place = _Place(kind="d", first=at, words=1, build=float)
        else:
            place = _Place(kind="Q", first=at, words=1, build=types[field.name])
        places[field.name] = place
        at += place.words
    words = repr([kind.__name__, *((name, place.kind, place.first) for name, place in places.items()), at])
    return places, 8 * at, int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little")
