"""The status block: one mmap'ed page of counters, gauges, heartbeat and two texts that the engine worker writes.

One writer (the engine worker), any number of readers (HTTP routes, the main process). Leaves out what the numbers are
exported as (metrics.py) and who decides that a worker is dead (serve/in_flight.py).

Lifecycle: the main process creates the file, the worker opens it writable, the others open it to read.

    block = StatusBlock.create(folder / "status")
    StatusBlock.open(folder / "status", writable=True).write(running=3)     # in the worker
    block.read().running                                                    # 3
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

MAX_DRAFT_TOKENS = 8
"""Positions in `accepted_by_position`; engine.max_draft_tokens is at most this."""

_MAGIC = 0x31305441_54534C41
_WORDS = (
    "heartbeat_ns", "state", "worker_pid", "started_ns",
    "max_seq_len", "vocab_size", "max_draft_tokens", "running", "waiting",
    "rounds", "prompt_tokens", "generated_tokens", "drafts", "proposed", "accepted",
    *(f"accepted_at_{position}" for position in range(MAX_DRAFT_TOKENS)),
)  # fmt: skip
_HEADER_WORDS = 2  # magic, sequence number (odd while the writer is inside)
_TEXT_BYTES = {"draft_version": 256, "error": 1024}
_TEXT_START = 8 * (_HEADER_WORDS + len(_WORDS))
_SIZE_BYTES = _TEXT_START + sum(_TEXT_BYTES.values())


class WorkerState(IntEnum):
    """Where the engine worker is in its life."""

    STARTING = 0
    READY = 1
    FAILED = 2
    """It gave up; `error` says why."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One consistent reading of the block."""

    heartbeat_ns: int
    """time.monotonic_ns() of the worker's last sign of life."""
    state: WorkerState
    worker_pid: int
    """0 before the worker came up."""
    started_ns: int
    """time.monotonic_ns() when the worker became ready."""
    max_seq_len: int
    vocab_size: int
    max_draft_tokens: int
    running: int
    waiting: int
    rounds: int
    prompt_tokens: int
    generated_tokens: int
    drafts: int
    """Request-rounds in which at least one token was proposed."""
    proposed: int
    accepted: int
    accepted_by_position: tuple[int, ...]
    """How often the draft token at this position was accepted; max_draft_tokens entries."""
    draft_version: str
    error: str

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker's last sign of life."""
        return (time.monotonic_ns() - self.heartbeat_ns) / 1e9

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed draft tokens; None before the first proposal."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens emitted by a round that had a draft, bonus token included; None before the first."""
        return 1 + self.accepted / self.drafts if self.drafts else None


class StatusBlock:
    """The page itself. Words are stored whole (aligned 8 bytes); a sequence number lets a reader see a torn reading."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Use `create` or `open` instead."""
        self._memory = memory
        self._words = memoryview(memory)[:_TEXT_START].cast("Q")

    @classmethod
    def create(cls, path: Path) -> StatusBlock:
        """Make a zeroed block that only this user can read; the space is reserved at once, so no write can SIGBUS."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, _SIZE_BYTES)
            else:
                os.ftruncate(descriptor, _SIZE_BYTES)
            block = cls(mmap.mmap(descriptor, _SIZE_BYTES))
        finally:
            os.close(descriptor)
        block._words[0] = _MAGIC
        return block

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> StatusBlock:
        """Map a block that another process created."""
        descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            memory = mmap.mmap(descriptor, _SIZE_BYTES, access=access)
        finally:
            os.close(descriptor)
        if struct.unpack_from("=Q", memory)[0] != _MAGIC:
            raise ValueError(f"{path} is no status block of this version; delete it")
        return cls(memory)

    def beat(self) -> None:
        """Say that the worker lives; the only write that another thread of the worker may do."""
        self._words[_HEADER_WORDS] = time.monotonic_ns()

    def write(
        self, *, accepted_by_position: Sequence[int] = (), draft_version: str | None = None, error: str | None = None,
        **words: int,
    ) -> None:  # fmt: skip
        """Set some fields of `Status`; readers see all of them change together."""
        self._words[1] += 1
        for name, value in words.items():
            self._words[_HEADER_WORDS + _INDEX[name]] = value
        first = _HEADER_WORDS + _INDEX["accepted_at_0"]
        for position, count in enumerate(accepted_by_position[:MAX_DRAFT_TOKENS]):
            self._words[first + position] = count
        offset = _TEXT_START
        for text, size in zip((draft_version, error), _TEXT_BYTES.values(), strict=True):
            if text is not None:
                self._memory[offset : offset + size] = text.encode()[:size].ljust(size, b"\0")
            offset += size
        self._words[1] += 1

    def read(self) -> Status:
        """A consistent reading. After a writer that died inside a write, the last try is taken as it is."""
        for _ in range(200):
            before = self._words[1]
            page = bytes(self._memory)
            if before % 2 == 0 and self._words[1] == before:
                break
            time.sleep(1e-4)  # the writer lost its core inside a write
        return _parse(page)


_INDEX = {name: index for index, name in enumerate(_WORDS)}


def _parse(page: bytes) -> Status:
    values = dict(zip(_WORDS, struct.unpack_from(f"={len(_WORDS)}Q", page, 8 * _HEADER_WORDS), strict=True))
    by_position = tuple(values.pop(f"accepted_at_{position}") for position in range(MAX_DRAFT_TOKENS))
    offset = _TEXT_START
    texts: list[str] = []
    for size in _TEXT_BYTES.values():
        texts.append(page[offset : offset + size].rstrip(b"\0").decode(errors="ignore"))
        offset += size
    state = WorkerState(values.pop("state"))
    draft_version, error = texts
    return Status(
        state=state, accepted_by_position=by_position[: values["max_draft_tokens"]], draft_version=draft_version,
        error=error, **values,
    )  # fmt: skip
