"""The reference of `SuffixMemory` (aurora_lit/kernels/suffix_index.py): every occurrence is searched for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from aurora_lit.kernels.suffix_index import DOMAIN_BITS
from support.copies_in_python import Occurrence, agreement

_ORDERS = (8, 4, 2, 1)
_MAX_REMEMBERED = 32
"""Occurrences that are considered."""


class SuffixMemoryInPython:
    """As `SuffixMemory`, by exhaustive search; only for capacities that are never exceeded in the middle of a text."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: tokens; each sequence counts one more."""
        self.capacity = capacity
        self._texts: deque[tuple[int, list[int], int]] = deque()
        """Part, tokens and number of context tokens; latest last."""
        self._held = self._forgotten = 0

    def insert(self, tokens: Sequence[int], *, context: int, part: int) -> None:
        """As `SuffixMemory.insert`; whole sequences are forgotten."""
        dropped = max(0, len(tokens) - self.capacity // 2)
        self._texts.append((part, list(tokens[dropped:]), max(0, context - dropped)))
        self._held += len(tokens) - dropped + 1
        while self._held > self.capacity:
            size = len(self._texts.popleft()[1]) + 1
            self._held, self._forgotten = self._held - size, self._forgotten + size

    @property
    def counts(self) -> tuple[int, int]:
        """As `SuffixMemory.counts`."""
        return self._held, self._forgotten

    def find(self, end: Sequence[int], part: int) -> list[Occurrence]:
        """Occurrences of the last tokens of `end`, by the longest n-gram that finds them, then latest first.

        Those of one token only if there are no others.
        """
        found = []
        for occurrence in self._all(end, part):
            order = next(order for order in _ORDERS if occurrence.length >= order)
            found.append((-order, occurrence))
        found.sort(key=lambda pair: pair[0])
        several = [occurrence for _, occurrence in found if occurrence.length > 1]
        return (several or [occurrence for _, occurrence in found])[:_MAX_REMEMBERED]

    def _all(self, end: Sequence[int], part: int) -> Iterator[Occurrence]:
        for of_part, text, context in reversed(self._texts):
            if of_part >> DOMAIN_BITS != part >> DOMAIN_BITS:
                continue
            for at in range(len(text) - 1, max(context, 1) - 1, -1):
                length = agreement(text, at, end)
                if length:
                    yield Occurrence(text, at, length, own=False, near=of_part == part)
