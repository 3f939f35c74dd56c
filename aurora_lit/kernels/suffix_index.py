"""Copied proposals in native code (csrc/suffix_index.hpp): what followed a sequence's last tokens before.

Leaves out: who may read what (serve/speculation/sources/memory.py), and how many of the nodes are proposed
(serve/speculation/weigh.py).

Shapes: B sequences, S slots, L capacity of a slot, R tables of rates, C cells of a table.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native

DOMAIN_BITS = 12
"""The last bits of a part number the domain; the others say who may read it."""
CONTEXT_TOKENS = 16
"""Of a prompt's end, remembered before the answer so that its first tokens are recognised too."""
MIN_ANSWER_TOKENS = 4
"""Shorter answers are not remembered: proposals save little there."""
MAX_MATCH = 16
"""Number of agreeing tokens beyond which they are not compared."""
KINDS = ("lookup", "memory", "both", "place")
"""Where a node's occurrences are: earlier in the sequence or in its prediction, in the memory, or in both; or one of
them is where the answer is now in the text that it repeats."""
LENGTH_CLASSES = (1, 2, 3, 4, 5, 7, 10, 16)
"""Numbers of agreeing tokens from which on acceptance is counted separately."""
SHARE_CLASSES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the occurrences that go on with the node's token, likewise."""
COUNT_CLASSES = (1, 2, 4, 8)
"""Numbers of occurrences, likewise. Of a place: how far from where it was expected, and its share is always 1."""
GAP_CLASSES = (0, 1, 5, 17)
"""These distances, in tokens."""
NUM_CELLS = len(KINDS) * len(LENGTH_CLASSES) * len(SHARE_CLASSES) * len(COUNT_CLASSES)
"""A cell is a combination of kind and classes: what is known about a node before it is verified."""
_CELLS_OF_KIND, _MEMORY = NUM_CELLS // len(KINDS), KINDS.index("memory")
_BYTES_OF_TOKEN, _BYTES_OF_HEAD = 36, 16
"""32 of a token are in the index, 4 in the copy by which it is remembered anew."""
_MOST_RENEWED = 2048
"""Tokens that are remembered anew at a time, which takes about a millisecond."""
_MIN_TOKENS = 64


class Copies(NamedTuple):
    """The nodes of one sequence's tree, most probable first; a node comes after its parent."""

    tokens: list[int]
    parents: list[int]
    """The column that each node follows, where column 0 is the last committed token."""
    survivals: list[float]
    """Probability that the node and all before it on its path are accepted."""
    cells: list[int]
    """What each node's rate is known by."""


NO_COPIES = Copies([], [], [], [])


@dataclass(slots=True)
class Place:
    """Where an answer was in the text that it repeats: its prediction, or else its prompt."""

    next: int = -1
    """Position of the token that was to come next; -1: nowhere yet."""
    length: int = 0
    """Of the sequence at that time, in tokens."""


class LookUp(NamedTuple):
    """What is looked up for some sequences."""

    slots: Sequence[int]
    """Of the sequences."""
    lengths: Sequence[int]
    """Their numbers of committed tokens."""
    most: Sequence[int]
    """Their numbers of nodes, at most."""
    parts: Sequence[int]
    """What of the memory each may read, and its domain, of which answers are preferred; 0: nothing."""
    tables: Sequence[int]
    """Which line of `rate_RC` holds for each."""
    rate_RC: torch.Tensor
    """fp32, contiguous. How often nodes of a cell were accepted if their parents were."""
    least: float
    """Smallest survival of a node."""
    own: bool = True
    """False: nothing is copied from within the sequences, nor from their texts."""
    texts: Sequence[torch.Tensor | None] = ()
    """What each is predicted to say, int64 on the CPU; None, or no entries: nothing."""
    prompts: Sequence[int] = ()
    """Their numbers of prompt tokens."""
    places: Sequence[Place] = ()
    """Theirs, which are brought up to date; with `prompts`. No entries: none is known."""


def is_remembered(cell: int) -> bool:
    """True if nodes of the cell come from the memory alone."""
    return cell // _CELLS_OF_KIND == _MEMORY


class _Held(NamedTuple):
    """A sequence that is remembered."""

    end: int
    """Number of tokens inserted until its end, separators included."""
    tokens: array[int]
    context: int
    part: int
    client: str


class SuffixMemory:
    """Tokens of sequences that have ended, the oldest overwritten first. Look-ups and insertions may be of two threads.

    A client that holds more than half of it overwrites its own: others' sequences whose turn it is are inserted anew.
    Those of an unknown client ("") have no such right.

    >>> memory = SuffixMemory(64 << 20)
    >>> memory.insert([5, 6, 7, 8], context=2, part=1 << DOMAIN_BITS)
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ConfigError if the system does not give the memory."""
        library = native.library()
        assert library is not None
        # At most half a head a token: few n-grams of real text occur once.
        heads = 1 << max(6, (capacity_bytes // (2 * _BYTES_OF_TOKEN + _BYTES_OF_HEAD)).bit_length() - 1)
        self.capacity = max(_MIN_TOKENS, (capacity_bytes - heads * _BYTES_OF_HEAD) // _BYTES_OF_TOKEN)
        """Tokens that it holds."""
        self._library = library
        library.aurora_memory_new.restype = ctypes.c_void_p
        self.pointer = ctypes.c_void_p(library.aurora_memory_new(ctypes.c_int64(self.capacity), ctypes.c_int64(heads)))
        if not self.pointer:
            raise ConfigError(f"memory.capacity_mb={capacity_bytes >> 20}: the system gives no such memory; lower it")
        weakref.finalize(self, library.aurora_memory_free, self.pointer)
        self._held: deque[_Held] = deque()
        self._end = 0
        self._tokens_of: Counter[str] = Counter()
        """Of each client, separators included."""
        self._inserting = threading.Lock()

    def insert(self, tokens: Sequence[int], *, context: int, part: int, client: str = "") -> bool:
        """Remember a sequence for a part; of one longer than half the capacity its end.

        `context`: so many tokens at its beginning help to recognise what follows, and are never proposed. False: its
        client has more than its share, and room among its own is still being looked for.
        """
        dropped = max(0, len(tokens) - self.capacity // 2)
        tokens, context = array("i", tokens[dropped:]), max(0, context - dropped)
        renewed = 0
        with self._inserting:
            while self._held and (oldest := self._held[0]).end - len(oldest.tokens) - 1 + self.capacity < (
                self._end + len(tokens) + 1
            ):
                if renewed > _MOST_RENEWED:
                    return False
                self._held.popleft()
                self._tokens_of[oldest.client] -= len(oldest.tokens) + 1
                if oldest.client not in ("", client) and self._tokens_of[client] > self.capacity // 2:
                    self._append(oldest.tokens, context=oldest.context, part=oldest.part, client=oldest.client)
                    renewed += len(oldest.tokens)
            self._append(tokens, context=context, part=part, client=client)
        return True

    def _append(self, tokens: array[int], *, context: int, part: int, client: str) -> None:
        numbers = (ctypes.c_int64(len(tokens)), ctypes.c_int64(context), ctypes.c_int64(part))
        self._library.aurora_memory_insert(self.pointer, ctypes.c_void_p(tokens.buffer_info()[0]), *numbers)
        self._end += len(tokens) + 1
        self._tokens_of[client] += len(tokens) + 1
        self._held.append(_Held(self._end, tokens, context, part, client))

    def insert_answer(self, tokens: Sequence[int], *, answer: int, part: int, client: str = "") -> bool:
        """Remember the last `answer` of a request's tokens, after the end of its prompt; False: they are too few, or as
        `insert` says."""
        if answer < MIN_ANSWER_TOKENS:
            return False
        context = min(CONTEXT_TOKENS, len(tokens) - answer)
        return self.insert(tokens[len(tokens) - answer - context :], context=context, part=part, client=client)

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that it holds, and that it has overwritten."""
        held, forgotten = ctypes.c_int64(), ctypes.c_int64()
        self._library.aurora_memory_counts(self.pointer, ctypes.byref(held), ctypes.byref(forgotten))
        return held.value, forgotten.value


class _Call(ctypes.Structure):
    """CopyCall in suffix_index.hpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("most_nodes", ctypes.c_int64),
        ("own", ctypes.c_int64),
        ("committed", ctypes.c_void_p),
        ("committed_slot", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "lengths", "most", "parts", "tables")),
        *((name, ctypes.c_void_p) for name in ("texts", "text_lengths", "prompts", "places", "placed", "rates")),
        ("least", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("num_nodes", "tokens", "parents", "survivals", "cells")),
    )


def look_up(tokens_SL: torch.Tensor, rows: LookUp, *, memory: SuffixMemory | None) -> list[Copies]:
    """The likeliest copies for each sequence; `look_up` in serve/speculation/sources/ngram.py is the reference.

    `tokens_SL`: committed tokens, int64 on the CPU.
    """
    library = native.library()
    assert library is not None
    B, widest = len(rows.slots), max(rows.most)
    texts = rows.texts or [None] * B
    numbers = (ctypes.c_int64 * (10 * B))(
        *(*rows.slots, *rows.lengths, *rows.most, *rows.parts, *rows.tables),
        *(0 if text is None else text.data_ptr() for text in texts),
        *(0 if text is None else len(text) for text in texts),
        *(rows.prompts or [0] * B),
        *([place.next for place in rows.places] or [-1] * B),
        *([place.length for place in rows.places] or [0] * B),
    )
    base, row = ctypes.addressof(numbers), 8 * B
    counts = (ctypes.c_int64 * B)()
    found = (ctypes.c_int64 * (3 * B * widest))()
    survivals = (ctypes.c_float * (B * widest))()
    out, column = ctypes.addressof(found), 8 * B * widest
    call = _Call(
        B,
        widest,
        rows.own,
        tokens_SL.data_ptr(),
        tokens_SL.stride(0),
        *(base + index * row for index in range(10)),
        rows.rate_RC.data_ptr(),
        rows.least,
        ctypes.addressof(counts),
        out,
        out + column,
        ctypes.addressof(survivals),
        out + 2 * column,
    )
    library.aurora_look_up_copies(ctypes.byref(call), None if memory is None else memory.pointer)
    for b, place in enumerate(rows.places):
        place.next, place.length = numbers[8 * B + b], numbers[9 * B + b]
    size = B * widest
    copies = []
    for b, count in enumerate(counts):
        if not count:
            copies.append(NO_COPIES)
            continue
        begin = b * widest
        ranges = (slice(begin + part * size, begin + part * size + count) for part in range(3))
        tokens, parents, cells = (found[each] for each in ranges)
        copies.append(Copies(tokens, parents, survivals[begin : begin + count], cells))
    return copies
