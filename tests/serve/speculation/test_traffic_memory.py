"""The traffic memory: nothing that a request may not see is ever proposed to it; counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.asked import Asked, copies_for

from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.kernels import native
from aurora_lit.kernels.suffix_index import DOMAIN_BITS
from aurora_lit.request import SharedBy
from aurora_lit.serve.speculation.sources import memory as memory_module
from aurora_lit.serve.speculation.sources.memory import TrafficMemory
from aurora_lit.serve.speculation.sources.ngram import NgramSource

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs kernels")

NAMES = st.sampled_from(["", "a", "b"])


REQUESTS = st.builds(
    Asked,
    client=NAMES,
    salt=NAMES,
    domain=NAMES,
    store=st.booleans(),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    answer=st.lists(st.integers(0, 2), min_size=4, max_size=12),
)


def contains(text: list[int], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@given(st.lists(REQUESTS, min_size=1, max_size=12), st.sampled_from(["domain", "client"]))
def test_no_proposal_holds_what_its_request_may_not_see(asked: list[Asked], shared_by: SharedBy) -> None:
    """Every proposed path, with the token before it, stands in an answer that the request may read."""
    memory = TrafficMemory(1 << 16, shared_by=shared_by, counters=EngineCounters())
    for number, each in enumerate(asked):
        sequence = each.sequence()
        tokens = each.prompt + each.answer
        memory.open(sequence)
        readable = [other.prompt + other.answer for other in asked[:number] if each.may_read(other, shared_by)]
        copies = copies_for(memory, sequence, tokens)
        for column in range(1, len(copies.tokens) + 1):
            path, at = [], column
            while at:
                path.append(copies.tokens[at - 1])
                at = copies.parents[at - 1]
            assert any(contains(text, tokens[-1:] + path[::-1]) for text in readable)
        memory.remember(sequence, torch.tensor(tokens))


@settings(deadline=None, max_examples=40)
@given(st.lists(REQUESTS, min_size=1, max_size=12), st.sampled_from(["domain", "client"]))
def test_what_a_request_may_see_is_found(asked: list[Asked], shared_by: SharedBy) -> None:
    """After the same prompt and two tokens of the same answer its next token is proposed."""
    memory = TrafficMemory(1 << 16, shared_by=shared_by, counters=EngineCounters())
    for each in asked:
        sequence = each.sequence()
        memory.open(sequence)
        memory.remember(sequence, torch.tensor(each.prompt + each.answer))
        sequence.length = len(each.prompt) + 2
        found = copies_for(memory, sequence, (each.prompt + each.answer)[: sequence.length])
        assert (each.answer[2] in found.tokens) or not each.may_read(each, shared_by)


def test_a_new_domain_takes_the_number_of_the_least_recently_used_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may send any number of labels; those in use stay apart, and apart from requests without a domain."""
    monkeypatch.setattr(memory_module, "_MAX_DOMAINS", 3)
    memory = TrafficMemory(1 << 16, shared_by="domain", counters=EngineCounters())
    asked = Asked(client="", salt="", domain="", store=True, prompt=[1], answer=[2])

    def number(domain: str) -> int:
        sequence = replace(asked, domain=domain).sequence()
        memory.open(sequence)
        return sequence.memory_part % (1 << DOMAIN_BITS)

    unknown, first, second, third = (number(domain) for domain in ("", "a", "b", "c"))
    assert len({unknown, first, second, third}) == 4
    assert number("a") == first
    assert number("new") == second, "b was used least recently"
    assert [number("a"), number("c"), number("")] == [first, third, unknown]


def test_keys_are_bounded_and_a_forgotten_one_starts_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_MAX_KEYS", 2)
    memory = TrafficMemory(1 << 16, shared_by="client", counters=EngineCounters())

    def ask(client: str) -> list[int]:
        asked = Asked(client=client, salt="", domain="", store=True, prompt=[1, 2], answer=[3, 4, 5, 6])
        sequence = asked.sequence()
        memory.open(sequence)
        sequence.length = 2
        found = copies_for(memory, sequence, [1, 2]).tokens
        sequence.length = 6
        memory.remember(sequence, torch.tensor([1, 2, 3, 4, 5, 6]))
        return found

    assert ask("a") == []
    assert ask("a") == [3, 4, 5, 6]
    ask("b")
    ask("c")  # the third
    assert ask("b") == [3, 4, 5, 6]
    assert ask("a") == [], "the least recently used was forgotten"


def test_counters() -> None:
    memory = TrafficMemory(1 << 16, shared_by="domain", counters=EngineCounters())
    asked = Asked(client="", salt="", domain="", store=True, prompt=[1, 2], answer=[3, 4, 5, 6])
    sequence = asked.sequence()
    memory.open(sequence)
    memory.remember(sequence, torch.tensor(asked.prompt + asked.answer))
    assert memory.counters.memory_answers == 1
    assert memory.index.counts == (7, 0)  # one separates answers
    sequence.length = 2
    for tokens in ([1, 2], [7, 8]):
        source = NgramSource(tokens_SL=torch.tensor([tokens]), memory=memory, looks_up=False)
        source.candidates([sequence], [0], most=4, least=0.05)
    assert (memory.counters.memory_look_ups, memory.counters.memory_hits) == (2, 1)


def test_short_answers_are_not_remembered() -> None:
    memory = TrafficMemory(1 << 16, shared_by="domain", counters=EngineCounters())
    asked = Asked(client="", salt="", domain="", store=True, prompt=[1, 2], answer=[3, 4, 5])
    sequence = asked.sequence()
    memory.open(sequence)
    memory.remember(sequence, torch.tensor(asked.prompt + asked.answer))
    assert memory.counters.memory_answers == 0


@pytest.fixture
def asked_about() -> Callable[[str, int], list[int]]:
    """Asks for a client, of a memory that all share, and returns what was proposed; 23 tokens are remembered of it."""
    memory = TrafficMemory(1 << 16, shared_by="domain", counters=EngineCounters())

    def ask(client: str, about: int) -> list[int]:
        tokens = [about, about + 1, *range(about, about + 20)]
        sequence = Asked(client=client, salt="", domain="", store=True, prompt=tokens[:2], answer=tokens[2:]).sequence()
        memory.open(sequence)
        sequence.length = 2
        found = copies_for(memory, sequence, tokens[:2]).tokens
        sequence.length = len(tokens)
        memory.remember(sequence, torch.tensor(tokens))
        return found

    return ask


def test_a_client_with_many_answers_has_none_of_others_forgotten(asked_about: Callable[[str, int], list[int]]) -> None:
    for number in range(8):
        asked_about("a", 10_000 + 100 * number)
        asked_about("b", 20_000 + 100 * number)
    for number in range(1000):
        asked_about("flood", 100_000 + 100 * number)
    assert asked_about("flood", 100_000 + 100 * 998), "its latest are remembered"
    assert not asked_about("flood", 100_000 + 100 * 900), "in the room of older ones"
    for number in range(8):
        assert asked_about("b", 10_000 + 100 * number), "what a was told"
        assert asked_about("a", 20_000 + 100 * number)


def test_a_client_has_half_of_the_memory_beside_others_and_all_of_it_alone(
    asked_about: Callable[[str, int], list[int]],
) -> None:
    """69 answers of 23 tokens are all that it holds."""
    for number in range(200):
        asked_about("a", 100_000 + 100 * number)
    assert asked_about("", 100_000 + 100 * 140)
    for number in range(200):
        asked_about("b", 200_000 + 100 * number)
    assert not asked_about("", 100_000 + 100 * 150), "b has had its half"
    assert asked_about("", 100_000 + 100 * 180), "and no more"
