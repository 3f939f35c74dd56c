"""A memory-mapped page that holds one record: one process writes it, any number of processes read it.

The record is a frozen dataclass with fields of type int, float, str and tuple[int, ...]. The layout follows from the
class. A digest of the layout is stored at the start of the page, so a page of another version is refused. Leaves out
what the records mean (ipc/engine_status.py, ipc/learner_status.py).

    class EngineStatusPage(Page[EngineStatus]):
        record_class = EngineStatus

    page = EngineStatusPage.create(path)
    EngineStatusPage.open(path, writable=True).write(running=3)     # in the writer
    page.read().running                                             # 3
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

from aurora_lit.errors import AuroraError

_HEADER_WORDS = 2
"""Layout digest, and the sequence number (odd during a write)."""
_HEARTBEAT = "heartbeat_ns"


class Heartbeat(Protocol):
    """The field that every record has."""

    @property
    def heartbeat_ns(self) -> int:
        """time.monotonic_ns() of the writer's last heartbeat; 0 before the first."""


Record = TypeVar("Record", bound=Heartbeat)


def text(size_bytes: int) -> Any:
    """A str field of at most `size_bytes` of UTF-8; longer texts are cut after a whole character."""
    return dataclasses.field(metadata={"bytes": size_bytes})


def counts(number: int) -> Any:
    """A tuple[int, ...] field of `number` entries."""
    return dataclasses.field(metadata={"count": number})


@dataclass(frozen=True, kw_only=True)
class _FieldLayout:
    """Type and position of a field in the page."""

    kind: str
    """"Q": unsigned integers, "d": floats, "s": text."""
    first: int
    """Index of the field's first word (8 bytes)."""
    words: int
    build: Any
    """Converts what is stored to the field's value."""


class Page(Generic[Record]):
    """One record in shared memory.

    A word of 8 bytes is written at once. The sequence number changes with every write of several words, so that a
    reader notices a torn reading and reads again.
    """

    record_class: ClassVar[type[Any]]

    def __init__(self, memory: mmap.mmap) -> None:
        """Use `create` or `open` instead."""
        self._memory = memory
        self._fields, _, _ = _layout(self.record_class)
        self._integers = memoryview(memory).cast("Q")
        self._floats = memoryview(memory).cast("B").cast("d")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a zeroed page that only this user can read; its space is reserved at once, so no write raises SIGBUS.

        Raises AuroraError if there is no room for it.
        """
        _, size_bytes, digest = _layout(cls.record_class)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            reserve_space(descriptor, size_bytes)
            page = cls(mmap.mmap(descriptor, size_bytes))
        except OSError as error:  # names no file
            path.unlink()
            remedy = f"delete what is left in {path.parent.parent}, or make it larger (of a container: --shm-size)"
            raise AuroraError(f"{path} cannot be made: {error.strerror}; {remedy}") from error
        finally:
            os.close(descriptor)
        page._integers[0] = digest
        return page

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Map a page that another process created. Raises ValueError if it holds another record."""
        _, size_bytes, digest = _layout(cls.record_class)
        refusal = (
            f"{path} is no {cls.record_class.__name__} page of this version; use the aurora-lit that runs there, or "
            "delete it if none does"
        )
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
        """Write a heartbeat; the only write that a second thread of the writer may do."""
        self._integers[self._fields[_HEARTBEAT].first] = time.monotonic_ns()

    def write(self, **fields: Any) -> None:
        """Set some fields of the record; readers see all of them change together."""
        self._integers[1] |= 1  # odd already if the last writer was killed during a write
        for name, value in fields.items():
            field = self._fields[name]
            if field.kind == "d":
                self._floats[field.first] = value
            elif field.kind == "s":
                start, size = 8 * field.first, 8 * field.words
                self._memory[start : start + size] = value.encode()[:size].ljust(size, b"\0")
            elif field.words == 1:
                self._integers[field.first] = value
            else:
                for index, count in enumerate(value[: field.words]):
                    self._integers[field.first + index] = count
        self._integers[1] += 1

    def peek(self, name: str) -> int:
        """One integer field, read alone: much cheaper than `read`, but not consistent with other fields."""
        return self._integers[self._fields[name].first]

    def read(self) -> Record:
        """A consistent reading of all fields. If the writer died during a write, the last attempt is returned."""
        for _ in range(200):
            before = self._integers[1]
            content = bytes(self._memory)
            if before % 2 == 0 and self._integers[1] == before:
                break
            time.sleep(1e-4)  # the writer was descheduled during a write
        record: Record = self.record_class(**{name: _value(content, field) for name, field in self._fields.items()})
        return record


def reserve_space(descriptor: int, size_bytes: int, *, empty_from: int = 0) -> None:
    """Give a file that will be mapped its space, so that no access raises SIGBUS. Raises OSError if there is no room.

    Systems without a call for it (macOS) get zeros, but not before byte `empty_from`; from there on it holds nothing.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)
        return
    zeros = memoryview(bytes(1 << 20))
    while empty_from < size_bytes:
        empty_from += os.pwrite(descriptor, zeros[: size_bytes - empty_from], empty_from)


def heartbeat_age_s(record: Heartbeat) -> float:
    """Seconds since the writer's last heartbeat."""
    return (time.monotonic_ns() - record.heartbeat_ns) / 1e9


def _value(content: bytes, field: _FieldLayout) -> Any:
    start, size = 8 * field.first, 8 * field.words
    if field.kind == "s":
        return content[start : start + size].rstrip(b"\0").decode(errors="ignore")
    values = struct.unpack_from(f"={field.words}{field.kind}", content, start)
    return field.build(values[0] if field.words == 1 else values)


def _layout(record_class: type[Any]) -> tuple[dict[str, _FieldLayout], int, int]:
    """The layout of a record's fields, the page's size in bytes, and a digest of both."""
    types = typing.get_type_hints(record_class)
    layouts: dict[str, _FieldLayout] = {}
    next_word = _HEADER_WORDS
    for field in dataclasses.fields(record_class):
        if "bytes" in field.metadata:
            layout = _FieldLayout(kind="s", first=next_word, words=field.metadata["bytes"] // 8, build=str)
        elif "count" in field.metadata:
            layout = _FieldLayout(kind="Q", first=next_word, words=field.metadata["count"], build=tuple)
        elif types[field.name] is float:
            layout = _FieldLayout(kind="d", first=next_word, words=1, build=float)
        else:
            layout = _FieldLayout(kind="Q", first=next_word, words=1, build=types[field.name])
        layouts[field.name] = layout
        next_word += layout.words
    parts = [record_class.__name__, *((name, field.kind, field.first) for name, field in layouts.items()), next_word]
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return layouts, 8 * next_word, int.from_bytes(digest[:8], "little")
