"""Copied proposals in Python: the reference of kernels/suffix_index.py, and what looks copies up where it is absent.

Without kernels there is no traffic memory: searching it in Python would take longer than it saves.

Shapes: S slots, L capacity of a slot, R tables of rates, C cells of a table.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from aurora_lit.kernels.suffix_index import (
    COUNT_CLASSES,
    KINDS,
    LENGTH_CLASSES,
    MAX_MATCH,
    NO_COPIES,
    SHARE_CLASSES,
    Copies,
    LookUp,
)

_MAX_OWN = 16
"""Occurrences that are considered."""


class Occurrence(NamedTuple):
    """An earlier occurrence of a sequence's last `length` tokens, in itself or in a remembered sequence."""

    text: Sequence[int]
    next: int
    """Index in the text of the token that followed."""
    length: int
    own: bool
    """True if the text is the sequence itself."""
    near: bool
    """True if it is the sequence itself, or of the same domain."""

    def token_after(self, depth: int) -> int | None:
        """The token `depth` places later; an own text repeats its period."""
        period = len(self.text) - self.next
        if depth >= period and not self.own:
            return None
        return self.text[self.next + depth % period]


class FindsOccurrences(Protocol):
    """A memory of other sequences; tests have one."""

    def find(self, end: Sequence[int], part: int) -> list[Occurrence]:
        """Occurrences of the last tokens of `end` that the part may read."""


def look_up(tokens_SL: torch.Tensor, rows: LookUp, *, memory: FindsOccurrences | None = None) -> list[Copies]:
    """As `look_up` in kernels/suffix_index.py."""
    copies = []
    for slot, length, count, part, table in zip(
        rows.slots, rows.lengths, rows.most, rows.parts, rows.tables, strict=True
    ):
        tokens = tokens_SL[slot, :length].tolist()
        found, single = _own_occurrences(tokens) if rows.own else ([], [])
        remembered = memory.find(tokens, part) if memory is not None and part else []
        occurrences = [each for each in found + remembered if each.length > 1] or single + remembered
        copies.append(_tree(occurrences, rows.rate_RC[table].tolist(), most=count, least=rows.least))
    return copies


def agreement(text: Sequence[int], at: int, end: Sequence[int]) -> int:
    """How many tokens before index `at` equal the last ones of `end`."""
    length, longest = 0, min(MAX_MATCH, at, len(end))
    while length < longest and text[at - 1 - length] == end[-1 - length]:
        length += 1
    return length


def _own_occurrences(tokens: list[int]) -> tuple[list[Occurrence], list[Occurrence]]:
    """The latest of more than one equal token, and the latest of one."""
    found: list[Occurrence] = []
    single: list[Occurrence] = []
    for at in range(len(tokens) - 1, 0, -1):
        if tokens[at - 1] == tokens[-1] and len(found) < _MAX_OWN:
            length = agreement(tokens, at, tokens)
            (found if length > 1 else single).append(Occurrence(tokens, at, length, own=True, near=True))
    return found, single[:_MAX_OWN]


def _tree(occurrences: list[Occurrence], rates: list[float], *, most: int, least: float) -> Copies:
    """Of all nodes that may be added always the one most likely to be accepted."""
    if not occurrences:
        return NO_COPIES
    longest = max(occurrence.length for occurrence in occurrences)
    nearest = max(
        (occurrence.length for occurrence in occurrences if occurrence.near and not occurrence.own), default=0
    )
    counting = [each for each in occurrences if 4 * each.length >= 3 * longest and (each.near or each.length > nearest)]
    waiting: list[tuple[float, int, int, int, int, int, list[Occurrence]]] = []
    order = 0

    def offer(column: int, depth: int, survival: float, members: list[Occurrence]) -> None:
        nonlocal order
        followers: defaultdict[int, list[Occurrence]] = defaultdict(list)
        for occurrence in members:
            token = occurrence.token_after(depth)
            if token is not None:
                followers[token].append(occurrence)
        total = sum(map(len, followers.values()))
        for token, those in sorted(followers.items(), key=lambda item: item[0]):
            cell = cell_of(those, depth, total)
            reached = survival * rates[cell]
            if reached >= least:
                heapq.heappush(waiting, (-reached, order, column, depth + 1, token, cell, those))
                order += 1

    offer(0, 0, 1.0, counting)
    nodes: list[tuple[int, int, float, int]] = []
    while waiting and len(nodes) < most:
        negative, _, column, depth, token, cell, those = heapq.heappop(waiting)
        nodes.append((token, column, -negative, cell))
        offer(len(nodes), depth, -negative, those)
    if not nodes:
        return NO_COPIES
    tokens, parents, survivals, cells = (list(values) for values in zip(*nodes, strict=True))
    return Copies(tokens, parents, survivals, cells)


def cell_of(occurrences: Sequence[Occurrence], depth: int, total: int) -> int:
    """The cell of a node at this depth that these occurrences, of `total` at its parent, lead to."""
    num_own = sum(occurrence.own for occurrence in occurrences)
    kind = KINDS.index("lookup" if num_own == len(occurrences) else "both" if num_own else "memory")
    length = min(MAX_MATCH, depth + max(occurrence.length for occurrence in occurrences))
    classes = (
        bisect_right(LENGTH_CLASSES, length) - 1,
        bisect_right(SHARE_CLASSES, len(occurrences) / total) - 1,
        bisect_right(COUNT_CLASSES, total) - 1,
    )
    cell = kind
    for each, sizes in zip(classes, (LENGTH_CLASSES, SHARE_CLASSES, COUNT_CLASSES), strict=True):
        cell = cell * len(sizes) + each
    return cell
