"""A weighted random sample of past traces by domain, bounded in bytes.

Each trace draws a key u^(1/weight) and the highest keys are kept (Efraimidis & Spirakis 2006), which samples all traces
that were ever added, whatever their order. When the bytes are used up, the domain with the most bytes drops its lowest
key, so that a busy domain does not push out a rare one.

Traces are files in the server's run folder, which is in shared memory and deleted with the server: a restarted learner
finds them again, and clients' text is never written to a disk. Leaves out batches (learn/data/online_batcher.py).
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from aurora_lit.errors import TraceError
from aurora_lit.learn.data.trace_parts import batch_size, trained_positions
from aurora_lit.traces.record import Trace, from_bytes, to_bytes

MAX_DOMAINS = 32
"""Clients choose domain names freely; further domains share the unnamed one."""
_SUFFIX = ".trace"
_PASSED_OVER = 64
"""Traces that are not kept after one for which dropping others has made no room."""
_LEFT_SHARE, _LEFT_BYTES = 1 / 8, 64 << 20
"""What is left free for others, such as vLLM, which would be killed where shared memory is full: a share of what the
traces take and could take, at most so much."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True, kw_only=True)
class _Entry:
    key: float
    number: int
    """Counts the added traces, so that file names are unique."""
    num_bytes: int
    size: int
    """Of the trace in a batch (`batch_size`)."""
    client: str
    """The trace's."""
    trained: int
    """Of the trace, positions that are trained on."""

    @property
    def name(self) -> str:
        return f"{self.number:010d}-{self.key.hex()}{_SUFFIX}"


def _entry(trace: Trace, *, key: float, number: int, num_bytes: int) -> _Entry:
    return _Entry(
        key=key,
        number=number,
        num_bytes=num_bytes,
        size=batch_size([trace]),
        client=trace.client,
        trained=trained_positions(trace),
    )


class Reservoir:
    """Traces in a folder; one that already holds traces is continued."""

    def __init__(self, folder: Path, *, limit_bytes: int, seed: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._heaps: dict[str, list[_Entry]] = {}
        """By domain, lowest key first."""
        self._bytes: dict[str, int] = {}
        self.positions = 0
        """Positions of all traces that are trained on."""
        self._told_full = False
        self._num_passed_over = 0
        """Traces that are not kept, since there was no room."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._next_number = 0
        for path in sorted(folder.iterdir()):
            self._load(path)
        # Another stream of random numbers after each restart.
        self._random = random.Random(f"{seed} {self._next_number}")

    @property
    def num_bytes(self) -> int:
        """Bytes of all traces."""
        return sum(self._bytes.values())

    def __len__(self) -> int:
        """Number of traces."""
        return sum(map(len, self._heaps.values()))

    @property
    def domains(self) -> dict[str, int]:
        """Number of traces by domain."""
        return {domain: len(heap) for domain, heap in self._heaps.items()}

    def add(self, trace: Trace, *, weight: float = 1.0) -> bool:
        """Add a trace to the sample; False if it was not kept. The chance to be kept grows with its weight."""
        key = self._random.random() ** (1 / weight)
        if self._num_passed_over:
            self._num_passed_over -= 1
            return False
        domain = self._domain_of(trace)
        if self._would_be_dropped(domain, key, trace.num_bytes):
            return False
        payload = to_bytes(trace)
        entry = _entry(trace, key=key, number=self._next_number, num_bytes=len(payload))
        self._next_number += 1
        if len(payload) > self._limit_bytes:
            return False
        self._keep(domain, entry)
        freed = 0
        while self.num_bytes > self._limit_bytes or not self._write(entry, payload):
            # Also where shared memory has no room, or the first traces would be all that is ever replayed. But where
            # what they free is not enough, others have taken it.
            if freed > 2 * len(payload):
                self._drop(domain, entry)
                self._num_passed_over = _PASSED_OVER
                return False
            dropped = self._drop_one()
            if dropped is entry:
                return False
            freed += dropped.num_bytes if self.num_bytes <= self._limit_bytes else 0
        return True

    def _write(self, entry: _Entry, payload: bytes) -> bool:
        """False if there is no room for it."""
        temporary = self._folder / f"{entry.name}.tmp"
        try:
            self._check_room(len(payload))
            with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(payload)
            os.replace(temporary, self._folder / entry.name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if not self._told_full:
                self._told_full = True
                _log.warning("no room for past traces beyond %d MiB: %s", self.num_bytes >> 20, error)
            return False
        return True

    def _check_room(self, num_bytes: int) -> None:
        """Raise OSError if this entry's file, of so many bytes, would leave others too little."""
        room = os.statvfs(self._folder)
        free = room.f_bavail * room.f_frsize - num_bytes
        if room.f_blocks and free < min(_LEFT_BYTES, _LEFT_SHARE * (self.num_bytes + free)):  # 0: without a limit
            raise OSError(errno.ENOSPC, "the rest is left to others")

    def rename_domain(self, removed: str, kept: str) -> None:
        """Traces of a domain that went into another one are of that from now on, until a restart."""
        if removed in self._heaps:
            self._heaps[kept] = [*self._heaps.get(kept, ()), *self._heaps.pop(removed)]
            heapq.heapify(self._heaps[kept])
            self._bytes[kept] = self._bytes.get(kept, 0) + self._bytes.pop(removed)

    def sample(
        self, *, largest: int | None = None, allows: Callable[[str, int], bool] = lambda client, size: True
    ) -> Trace | None:
        """A random trace: first a domain, all with equal chance, then a trace of it.

        None when there are none, or if the drawn one, which is not read then, is larger in a batch than `largest`, or
        if `allows` says no to its client and its size in a batch.
        """
        while self._heaps:
            domain = self._random.choice(sorted(self._heaps))
            entry = self._random.choice(self._heaps[domain])
            if (largest is not None and entry.size > largest) or not allows(entry.client, entry.size):
                return None
            try:
                trace = from_bytes((self._folder / entry.name).read_bytes())
                return replace(trace, domain=domain or trace.domain)
            except (OSError, TraceError):  # the file was deleted or damaged
                self._drop(domain, entry)
        return None

    def _would_be_dropped(self, domain: str, key: float, num_bytes: int) -> bool:
        """True if a trace with this key would be the next one dropped, so that writing it is useless."""
        of_domain = self._bytes.get(domain, 0) + num_bytes
        full = self.num_bytes + num_bytes > self._limit_bytes and of_domain > max(self._bytes.values(), default=0)
        return full and key < self._heaps[domain][0].key if domain in self._heaps else False

    def _domain_of(self, trace: Trace) -> str:
        return trace.domain if trace.domain in self._heaps or len(self._heaps) < MAX_DOMAINS else ""

    def _load(self, path: Path) -> None:
        """Add a file of an earlier learner; one that cannot be read is deleted."""
        try:
            number, key = path.name.removesuffix(_SUFFIX).split("-", 1)
            payload = path.read_bytes()
            trace = from_bytes(payload)
            entry = _entry(trace, key=float.fromhex(key), number=int(number), num_bytes=len(payload))
            self._keep(self._domain_of(trace), entry)
        except (OSError, ValueError, TraceError):
            path.unlink(missing_ok=True)
        else:
            self._next_number = max(self._next_number, entry.number + 1)

    def _keep(self, domain: str, entry: _Entry) -> None:
        heapq.heappush(self._heaps.setdefault(domain, []), entry)
        self._bytes[domain] = self._bytes.get(domain, 0) + entry.num_bytes
        self.positions += entry.trained

    def _drop_one(self) -> _Entry:
        domain = max(self._bytes, key=lambda name: self._bytes[name])
        entry = heapq.heappop(self._heaps[domain])
        self._forget(domain, entry)
        return entry

    def _drop(self, domain: str, entry: _Entry) -> None:
        self._heaps[domain].remove(entry)
        heapq.heapify(self._heaps[domain])
        self._forget(domain, entry)

    def _forget(self, domain: str, entry: _Entry) -> None:
        (self._folder / entry.name).unlink(missing_ok=True)
        self._bytes[domain] -= entry.num_bytes
        self.positions -= entry.trained
        if not self._heaps[domain]:
            del self._heaps[domain], self._bytes[domain]
