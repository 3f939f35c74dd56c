"""A memory-mapped page that holds one record: one process writes it, any number of processes read it.

The record is a dataclass with fields of type int, float, str and list[int]. The layout follows from the class. A digest
of the layout is stored at the start of the page, so a page of another version is refused. A field also declares how it
is shown: in the JSON report and among the metrics. Leaves out what the records mean (ipc/engine_status.py,
ipc/learner_status.py).

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

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


class Declared(NamedTuple):
    """What readers of a field need to know. Those that show fields loop over these declarations (`declared`)."""

    report: str = ""
    """Where it stands in the report of GET /v1/aurora/status, such as "tokens.prompt"; "": nowhere."""
    metric: str = ""
    """Its name in Prometheus, a counter's without `_total`; "": it is not exported."""
    help: str = ""
    is_gauge: bool = False
    """False: it only grows."""
    label: str = ""
    """What its entries are told apart by, in Prometheus; "": it is one number."""
    values: tuple[str, ...] = ()
    """That label of each entry; entries with the same one are added up. Empty: they are numbered."""
    per: float = 1
    """What is shown is divided by this."""

    def shown(self, value: Any) -> Any:
        """The field's value for readers; of an empty text None."""
        if isinstance(value, str):
            return value or None
        if self.values:
            totals = dict.fromkeys(self.values, 0)
            for name, count in zip(self.values, value, strict=True):
                totals[name] += count
            return totals
        return value if self.per == 1 else value / self.per


def counter(metric: str = "", help: str = "", *, report: str = "", per: float = 1) -> Any:  # noqa: A002
    """An int field that only grows (arguments: see `Declared`)."""
    return dataclasses.field(default=0, metadata={"declared": Declared(report, metric, help, per=per)})


def gauge(metric: str = "", help: str = "", *, report: str = "", per: float = 1) -> Any:  # noqa: A002
    """An int or float field that may fall again."""
    return dataclasses.field(default=0, metadata={"declared": Declared(report, metric, help, is_gauge=True, per=per)})


def counters(
    number: int,
    metric: str = "",
    help: str = "",  # noqa: A002
    *,
    label: str = "",
    values: tuple[str, ...] = (),
    report: str = "",
) -> Any:
    """A list[int] field of `number` entries."""
    how = Declared(report, metric, help, label=label, values=values)
    return dataclasses.field(default_factory=lambda: [0] * number, metadata={"count": number, "declared": how})


def text(size_bytes: int, *, report: str = "") -> Any:
    """A str field of at most `size_bytes` of UTF-8; longer texts are cut after a whole character."""
    return dataclasses.field(default="", metadata={"bytes": size_bytes, "declared": Declared(report)})


def declared(record: Any) -> Iterator[tuple[Declared, Any]]:
    """The declared fields of a record, each with the value that it shows."""
    for field in dataclasses.fields(record):
        if (how := field.metadata.get("declared")) is not None:
            yield how, how.shown(getattr(record, field.name))


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
            layout = _FieldLayout(kind="Q", first=next_word, words=field.metadata["count"], build=list)
        elif types[field.name] is float:
            layout = _FieldLayout(kind="d", first=next_word, words=1, build=float)
        else:
            layout = _FieldLayout(kind="Q", first=next_word, words=1, build=types[field.name])
        layouts[field.name] = layout
        next_word += layout.words
    parts = [record_class.__name__, *((name, field.kind, field.first) for name, field in layouts.items()), next_word]
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return layouts, 8 * next_word, int.from_bytes(digest[:8], "little")
