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
    GAP_CLASSES,
    KINDS,
    LENGTH_CLASSES,
    MAX_MATCH,
    NO_COPIES,
    SHARE_CLASSES,
    Copies,
    LookUp,
    Place,
)

_MAX_OWN = 16
"""Occurrences that are considered, of each text."""
_PLACE_BACK, _PLACE_AHEAD = 16, 128
"""How far from its last place an answer is looked for."""
_START_MATCH, _FIRM_MATCH, _FAR_MATCH = 4, 2, 8
"""Agreeing tokens as which it counts that both begin; from which on a place near the last one is the new one; and from
which on, or so many more, one anywhere is."""


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
    given: bool = False
    """True if the text is the sequence's prediction."""
    gap: int = -1
    """Of the place in a text that is repeated: class of the distance from where it was expected; -1: of others."""

    def token_after(self, depth: int) -> int | None:
        """The token `depth` places later; an own text repeats its period."""
        period = len(self.text) - self.next
        if depth >= period and (self.given or not self.own):
            return None
        return self.text[self.next + depth % period]


class FindsOccurrences(Protocol):
    """A memory of other sequences; tests have one."""

    def find(self, end: Sequence[int], part: int) -> list[Occurrence]:
        """Occurrences of the last tokens of `end` that the part may read."""


def look_up(tokens_SL: torch.Tensor, rows: LookUp, *, memory: FindsOccurrences | None = None) -> list[Copies]:
    """As `look_up` in kernels/suffix_index.py."""
    copies = []
    for b, (slot, length, count, part, table) in enumerate(
        zip(rows.slots, rows.lengths, rows.most, rows.parts, rows.tables, strict=True)
    ):
        tokens = tokens_SL[slot, :length].tolist()
        given = rows.texts[b] if rows.texts else None
        text = None if given is None else given.tolist()
        found, single = _own_occurrences(tokens, tokens) if rows.own else ([], [])
        if rows.own and text is not None:
            found, single = (
                one + two for one, two in zip((found, single), _own_occurrences(tokens, text), strict=True)
            )
        remembered = memory.find(tokens, part) if memory is not None and part else []
        occurrences = [each for each in found + remembered if each.length > 1] or single + remembered
        if rows.own and rows.places:
            _add_place(occurrences, tokens, text, rows.places[b], prompt=rows.prompts[b])
        copies.append(_tree(occurrences, rows.rate_RC[table].tolist(), most=count, least=rows.least))
    return copies


def agreement(text: Sequence[int], at: int, end: Sequence[int]) -> int:
    """How many tokens before index `at` equal the last ones of `end`."""
    length, longest = 0, min(MAX_MATCH, at, len(end))
    while length < longest and text[at - 1 - length] == end[-1 - length]:
        length += 1
    return length


def _own_occurrences(tokens: list[int], text: list[int]) -> tuple[list[Occurrence], list[Occurrence]]:
    """The latest of more than one equal token, and the latest of one; in the sequence itself, or in its prediction."""
    found: list[Occurrence] = []
    single: list[Occurrence] = []
    for at in range(len(text) - 1, 0, -1) if len(tokens) > 1 else ():
        if text[at - 1] == tokens[-1] and len(found) < _MAX_OWN:
            length = agreement(text, at, tokens)
            where = Occurrence(text, at, length, own=True, near=True, given=text is not tokens)
            (found if length > 1 else single).append(where)
    return found, single[:_MAX_OWN]


def _add_place(
    occurrences: list[Occurrence], tokens: list[int], prediction: list[int] | None, place: Place, *, prompt: int
) -> None:
    """Add where the answer is in the text that it repeats, and bring the place up to date."""
    given = prediction is not None
    text, count = (prediction, len(prediction)) if prediction is not None else (tokens, prompt)
    sure = None
    if place.next >= 0:
        answer, expected = tokens[prompt:], place.next + len(tokens) - place.length
        candidates = []
        for at in range(max(0, place.next - _PLACE_BACK), min(count, place.next + _PLACE_AHEAD)):
            length = agreement(text, at, answer)
            if given and length == at == len(answer):
                length = min(MAX_MATCH, length + _START_MATCH)
            candidates.append((-length, abs(at - expected), at))
        minus, gap, at = min(candidates, default=(0, 0, 0))
        if minus:
            gap_class = bisect_right(GAP_CLASSES, gap) - 1
            found = Occurrence(text, at, -minus, own=True, near=True, given=given, gap=gap_class)
            sure = found if found.length >= _FIRM_MATCH else None
            occurrences.append(found)
    least = _FAR_MATCH + (sure.length if sure else 0)
    for each in occurrences:
        is_there = each.own and each.gap < 0 and each.given == given and each.next < count
        if is_there and each.length >= least and (sure is None or each.length > sure.length):
            sure = each
    if sure is not None:
        place.next, place.length = sure.next, len(tokens)


def _tree(occurrences: list[Occurrence], rates: list[float], *, most: int, least: float) -> Copies:
    """Of all nodes that may be added always the one most likely to be accepted."""
    if not occurrences:
        return NO_COPIES
    longest = max(occurrence.length for occurrence in occurrences)
    nearest = max(
        (occurrence.length for occurrence in occurrences if occurrence.near and not occurrence.own), default=0
    )
    counting = [
        each
        for each in occurrences
        if (4 * each.length >= 3 * longest and (each.near or each.length > nearest)) or each.gap >= 0
    ]
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
    gap = max(occurrence.gap for occurrence in occurrences)
    length = min(MAX_MATCH, depth + max(occurrence.length for occurrence in occurrences))
    classes = (
        bisect_right(LENGTH_CLASSES, length) - 1,
        bisect_right(SHARE_CLASSES, len(occurrences) / total) - 1,
        bisect_right(COUNT_CLASSES, total) - 1,
    )
    if gap >= 0:
        kind, classes = KINDS.index("place"), (classes[0], len(SHARE_CLASSES) - 1, gap)
    cell = kind
    for each, sizes in zip(classes, (LENGTH_CLASSES, SHARE_CLASSES, COUNT_CLASSES), strict=True):
        cell = cell * len(sizes) + each
    return cell
