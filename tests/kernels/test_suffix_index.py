"""Copies in native code against the reference in Python, and the bounds of the memory."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import copies_in_python
from support.suffix_memory import SuffixMemoryInPython

from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native, suffix_index
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import DOMAIN_BITS, MAX_MATCH, NUM_CELLS, Copies, LookUp, Place, SuffixMemory

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs kernels")

ONE = 1 << DOMAIN_BITS
PARTS = [ONE, ONE + 1, ONE + 2, 2 << DOMAIN_BITS]
TOKENS = st.lists(st.integers(0, 3), max_size=40)


def rates(seed: int) -> torch.Tensor:
    """Two tables of distinct rates, so that no two nodes are equally probable."""
    return torch.rand(2, NUM_CELLS, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05


def table_of(rows: list[list[int]]) -> torch.Tensor:
    tokens_SL = torch.full((len(rows), 64), -7)
    for row, tokens in zip(tokens_SL, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return tokens_SL


def look_up(rows: list[list[int]], memory: SuffixMemory | None = None, **changes: Any) -> list[Copies]:
    """Every row reads part ONE, by the first table, at most 15 nodes."""
    count = len(rows)
    arguments: dict[str, Any] = {
        "slots": list(range(count)),
        "lengths": [len(tokens) for tokens in rows],
        "most": [15] * count,
        "parts": [ONE] * count,
        "tables": [0] * count,
        "rate_RC": torch.full((2, NUM_CELLS), 0.9),
        "least": 1e-3,
    } | changes
    return suffix_index.look_up(table_of(rows), LookUp(**arguments), memory=memory)


@given(
    texts=st.lists(st.tuples(TOKENS, st.integers(0, 20), st.sampled_from(PARTS)), max_size=8),
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    data=st.data(),
)
def test_native_trees_are_those_of_the_reference(texts: list[Any], rows: list[list[int]], data: st.DataObject) -> None:
    memory, reference = SuffixMemory(1 << 16), SuffixMemoryInPython(1 << 16)
    for tokens, context, part in texts:
        memory.insert(tokens, context=context, part=part)
        reference.insert(tokens, context=context, part=part)
    arguments = {
        "slots": list(range(len(rows)))[::-1],
        "lengths": [len(tokens) for tokens in rows[::-1]],
        "most": [data.draw(st.integers(1, 20)) for _ in rows],
        "parts": [data.draw(st.sampled_from([0, *PARTS])) for _ in rows],
        "tables": [data.draw(st.integers(0, 1)) for _ in rows],
        "rate_RC": rates(data.draw(st.integers(0, 9))),
        "least": data.draw(st.sampled_from([0.01, 0.3, 0.6, 0.85, 0.94])),
        "own": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        arguments["texts"] = [torch.tensor(text) if (text := data.draw(TOKENS)) else None for _ in rows]
    places = []
    if data.draw(st.booleans()):
        arguments["prompts"] = [data.draw(st.integers(0, length)) for length in arguments["lengths"]]
        places = [
            Place(data.draw(st.integers(-1, 30)), data.draw(st.integers(0, length))) for length in arguments["lengths"]
        ]
    ours, theirs = ([replace(place) for place in places] for _ in range(2))
    found = suffix_index.look_up(table_of(rows), LookUp(**arguments, places=ours), memory=memory)
    expected = copies_in_python.look_up(table_of(rows), LookUp(**arguments, places=theirs), memory=reference)
    assert ours == theirs
    for native_copies, copies in zip(found, expected, strict=True):
        assert native_copies.survivals == pytest.approx(copies.survivals, rel=1e-4)
        if len(set(copies.survivals)) == len(copies.survivals):  # else equal ones may be ordered otherwise
            assert (native_copies.tokens, native_copies.parents) == (copies.tokens, copies.parents)
            assert native_copies.cells == copies.cells


@pytest.mark.parametrize(
    ("tokens", "following"),
    [
        ([], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4, 1, 2, 3], [4, 1, 2, 3, 4]),  # repeats
        ([9, 2, 3, 4, 8, 2, 3], [4, 8, 2, 3, 4]),
        ([9, 3, 4, 8, 3], [4, 8, 3, 4, 8]),  # one agreeing token
        ([3, 5, 1, 3, 6, 1, 3], [6, 1, 3, 6, 1]),  # does not count where two agree
        ([6, 6, 6, 6], [6, 6, 6, 6, 6]),
    ],
)
def test_copies_from_within_a_sequence(tokens: list[int], following: list[int]) -> None:
    (copies,) = look_up([tokens], most=[5])
    assert copies.tokens == following
    assert copies.parents == list(range(len(following)))


def rounds_of(source: list[int], answer: list[int], *, predicted: bool) -> list[int]:
    """Tokens of each round, if of 15 candidates all that are right are accepted, and one token comes after them."""
    prompt = [9000, *([] if predicted else source), 9001]
    tokens = [*prompt, *answer]
    tokens_SL = torch.tensor([tokens])
    place, at, rounds = Place(0, len(prompt)) if predicted else Place(), len(prompt), []
    text = torch.tensor(source) if predicted else None
    while at < len(tokens):
        one = LookUp(
            [0], [at], [15], [0], [0], torch.full((1, NUM_CELLS), 0.9), 1e-3, True, [text], [len(prompt)], [place]
        )
        (copies,) = suffix_index.look_up(tokens_SL, one, memory=None)
        column, count = 0, 1
        for node, (token, parent) in enumerate(zip(copies.tokens, copies.parents, strict=True), start=1):
            if parent == column and at + count <= len(tokens) - 1 and token == tokens[at + count - 1]:
                column, count = node, count + 1
        rounds.append(count)
        at += count
    return rounds


LINES = [[line * 100 + 1, 5, line * 100 + 2, 6, line * 100 + 3, 7] for line in range(1, 30)]
"""Of six tokens, the last ones the same in all: so that a line's end alone does not tell where it is."""


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize(
    ("at", "removed", "inserted"),
    [
        (12, 0, [7001, 5, 7002, 7]),
        (12, 3, []),
        (12, 1, [7001, 5, 7002, 7]),
        (0, 1, [7001]),
        (28, 1, []),
        (12, 0, [7001]),
    ],
)
def test_after_a_difference_copying_goes_on_at_once(
    predicted: bool, at: int, removed: int, inserted: list[int]
) -> None:
    """What is new costs a round a token; then one more where lines were left out, which nothing announces."""
    source = [token for line in LINES for token in line]
    new = [*(token for line in LINES[:at] for token in line), *inserted]
    answer = [*new, *(token for line in LINES[at + removed :] for token in line)]
    most = 2 + (0 if predicted else 2) + len(inserted) + (len(answer) + 15) // 16
    rounds = rounds_of(source, answer, predicted=predicted)
    assert sum(rounds) == len(answer)
    assert len(rounds) <= most
    assert not predicted or len(rounds_of(source, source, predicted=True)) == (len(source) + 15) // 16


def test_of_the_same_tokens_those_nearest_to_the_place_are_copied() -> None:
    """A token is inserted before one that occurs in three places."""
    source = [1, 2, 3, 50, 51, 8, 90, 61, 8, 70, 71, 8, 60, 91]
    prompt = [9, *source, 9]
    tokens = [*prompt, 1, 2, 3, 50, 51, 99, 8]
    after_51 = Place(6, len(prompt) + 5)
    rates = CopyReliability().rate_RC
    (copies,) = look_up([tokens], prompts=[len(prompt)], places=[after_51], rate_RC=rates)
    assert copies.tokens[0] == 90
    (copies,) = look_up([tokens], rate_RC=rates)
    assert set(copies.tokens[:3]) == {60, 70, 90}
    assert len(set(copies.survivals[:3])) == 1, "one as likely as the other"


def test_occurrences_that_go_on_differently_fork() -> None:
    memory = SuffixMemory(1 << 16)
    for last in (20, 20, 30):
        memory.insert([1, 2, 3, last, last + 1], context=2, part=ONE)
    shares = torch.full((2, len(suffix_index.KINDS), 8, 5, 4), 0.9)
    shares[..., :4, :] = 0.3  # less where not all occurrences agree
    shares[..., 2, :] = 0.6  # but half of them or more do
    (copies,) = look_up([[9, 1, 2, 3]], memory, rate_RC=shares.flatten(1).contiguous())
    assert (copies.tokens, copies.parents) == ([20, 21, 30, 31], [0, 1, 0, 3])
    assert copies.survivals == pytest.approx([0.6, 0.54, 0.3, 0.27])


def test_what_a_part_may_not_read_is_not_proposed() -> None:
    memory = SuffixMemory(1 << 16)
    memory.insert([1, 2, 3, 4], context=0, part=ONE)
    assert look_up([[1, 2]], memory, parts=[2 << DOMAIN_BITS])[0].tokens == []
    assert look_up([[1, 2]], memory, parts=[0])[0].tokens == []
    assert look_up([[1, 2]], memory, parts=[ONE])[0].tokens == [3, 4]


def test_what_was_remembered_for_the_same_domain_is_preferred() -> None:
    memory = SuffixMemory(1 << 16)
    memory.insert([7, 1, 2, 3], context=0, part=ONE)
    memory.insert([8, 1, 2, 4], context=0, part=ONE + 1)
    memory.insert([1, 2, 5], context=0, part=ONE + 2)
    assert look_up([[1, 2]], memory, parts=[ONE + 1])[0].tokens == [4]
    assert look_up([[1, 2]], memory, parts=[ONE + 2])[0].tokens == [5]
    assert look_up([[7, 1, 2]], memory, parts=[ONE + 1])[0].tokens == [3], "unless more tokens agree elsewhere"


def test_the_context_is_recognised_but_never_proposed() -> None:
    memory = SuffixMemory(1 << 16)
    memory.insert([1, 2, 3, 4, 5], context=3, part=ONE)
    assert look_up([[1, 2]], memory)[0].tokens == []
    assert look_up([[2, 3]], memory)[0].tokens == [4, 5]


def test_the_oldest_are_forgotten_and_memory_stays_bounded() -> None:
    memory = SuffixMemory(1 << 14)
    for first in range(0, 20_000, 10):
        memory.insert(list(range(first, first + 10)), context=0, part=ONE)
    held, forgotten = memory.counts
    assert held == memory.capacity
    assert held + forgotten == 2000 * 11
    assert look_up([[19_990, 19_991]], memory)[0].tokens[:2] == [19_992, 19_993]
    assert look_up([[0, 1]], memory)[0].tokens == []
    oldest_whole = 20_000 - 10 * (held // 11)
    assert look_up([[oldest_whole, oldest_whole + 1]], memory)[0].tokens[:1] == [oldest_whole + 2]
    assert look_up([[oldest_whole - 20, oldest_whole - 19]], memory)[0].tokens == []


def test_an_answer_longer_than_the_memory_leaves_its_end() -> None:
    memory = SuffixMemory(1 << 13)
    memory.insert(list(range(5000)), context=0, part=ONE)
    assert look_up([[4990, 4991]], memory)[0].tokens == list(range(4992, 5000))


def test_agreement_beyond_the_most_is_not_told_apart() -> None:
    tokens = list(range(MAX_MATCH + 8))
    (long,) = look_up([[*tokens, 50, *tokens]])
    (longer,) = look_up([[99, *tokens, 50, 99, *tokens]])
    assert long.cells[0] == longer.cells[0]


def test_looking_up_while_another_thread_inserts() -> None:
    memory = SuffixMemory(1 << 14)
    stop = threading.Event()

    def insert() -> None:
        while not stop.is_set():
            memory.insert([1, 2, *range(100, 160)], context=2, part=ONE)

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        for _ in range(2000):
            (copies,) = look_up([[1, 2]], memory)
            assert copies.tokens in ([], list(range(100, 115)))
    finally:
        stop.set()
        thread.join()


def test_memory_that_the_system_does_not_give_is_an_error_of_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"memory\.capacity_mb=\d+: the system gives no such memory; lower it"):
        SuffixMemory(1 << 61)
