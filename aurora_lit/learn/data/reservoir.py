"""A weighted random sample of past traces by domain and client, bounded in bytes.

Each trace draws a key u^(1/weight) and the highest keys are kept (Efraimidis & Spirakis 2006), which samples all traces
that were ever added, whatever their order. When the bytes are used up, the client with the most bytes in the domain
with the most bytes drops its lowest key: neither a busy domain nor a client with many requests pushes out others, and
within a domain all clients are replayed alike.

Traces are files in the server's run folder, which is in shared memory and deleted with the server: a restarted learner
finds them again, and clients' text is never written to a disk. Leaves out batches (learn/data/online_batcher.py).
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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


@dataclass(kw_only=True)
class _Group:
    """Traces of one client in one domain."""

    heap: list[_Entry] = field(default_factory=list)
    """Lowest key first."""
    num_bytes: int = 0

    def add(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            heapq.heappush(self.heap, entry)
            self.num_bytes += entry.num_bytes

    def remove(self, entry: _Entry) -> None:
        if entry is self.heap[0]:
            heapq.heappop(self.heap)
        else:
            self.heap.remove(entry)
            heapq.heapify(self.heap)
        self.num_bytes -= entry.num_bytes


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
        self._groups: dict[str, dict[str, _Group]] = {}
        """By domain and client; none is empty."""
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
        return sum(map(self._bytes_of, self._groups))

    def __len__(self) -> int:
        """Number of traces."""
        return sum(self.domains.values())

    @property
    def domains(self) -> dict[str, int]:
        """Number of traces by domain."""
        return {domain: sum(len(group.heap) for group in groups.values()) for domain, groups in self._groups.items()}

    def add(self, trace: Trace, *, weight: float = 1.0) -> bool:
        """Add a trace to the sample; False if it was not kept. The chance to be kept grows with its weight."""
        key = self._random.random() ** (1 / weight)
        if self._num_passed_over:
            self._num_passed_over -= 1
            return False
        domain = self._domain_of(trace)
        if self._would_be_dropped(domain, trace.client, key, trace.num_bytes):
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
        if removed in self._groups:
            for client, group in self._groups.pop(removed).items():
                self._groups.setdefault(kept, {}).setdefault(client, _Group()).add(group.heap)

    def sample(
        self, *, largest: int | None = None, allows: Callable[[str, int], bool] = lambda client, size: True
    ) -> Trace | None:
        """A random trace: first a domain, then a client, then a trace of it, each time all with equal chance.

        None when there are none, or if the drawn one, which is not read then, is larger in a batch than `largest`, or
        if `allows` says no to its client and its size in a batch.
        """
        while self._groups:
            domain = self._random.choice(sorted(self._groups))
            client = self._random.choice(sorted(self._groups[domain]))
            entry = self._random.choice(self._groups[domain][client].heap)
            if (largest is not None and entry.size > largest) or not allows(entry.client, entry.size):
                return None
            try:
                trace = from_bytes((self._folder / entry.name).read_bytes())
                return replace(trace, domain=domain or trace.domain)
            except (OSError, TraceError):  # the file was deleted or damaged
                self._drop(domain, entry)
        return None

    def _bytes_of(self, domain: str) -> int:
        return sum(group.num_bytes for group in self._groups[domain].values())

    def _would_be_dropped(self, domain: str, client: str, key: float, num_bytes: int) -> bool:
        """True if a trace with this key would be the next one dropped, so that writing it is useless."""
        groups = self._groups.get(domain, {})
        if client not in groups or self.num_bytes + num_bytes <= self._limit_bytes:
            return False
        most_of_domain = max(map(self._bytes_of, self._groups))
        most_of_client = max(group.num_bytes for group in groups.values())
        return (
            self._bytes_of(domain) + num_bytes > most_of_domain
            and groups[client].num_bytes + num_bytes > most_of_client
            and key < groups[client].heap[0].key
        )

    def _domain_of(self, trace: Trace) -> str:
        return trace.domain if trace.domain in self._groups or len(self._groups) < MAX_DOMAINS else ""

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
        self._groups.setdefault(domain, {}).setdefault(entry.client, _Group()).add([entry])
        self.positions += entry.trained

    def _drop_one(self) -> _Entry:
        domain = max(self._groups, key=self._bytes_of)
        group = max(self._groups[domain].values(), key=lambda each: each.num_bytes)
        lowest = group.heap[0]
        self._drop(domain, lowest)
        return lowest

    def _drop(self, domain: str, entry: _Entry) -> None:
        (self._folder / entry.name).unlink(missing_ok=True)
        groups = self._groups[domain]
        groups[entry.client].remove(entry)
        self.positions -= entry.trained
        if not groups[entry.client].heap:
            del groups[entry.client]
        if not groups:
            del self._groups[domain]
