"""NgramIndex: which tokens it proposes; and n-gram lookup in the engine, which never changes the output."""

from __future__ import annotations

import random

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model

from aurora_lit.models.target import Target
from aurora_lit.serve.sequences.ngram_index import MAX_MATCH, NgramIndex
from aurora_lit.serve.speculation.drafter import Drafter

REFRAIN = (7, 8, 9, 10, 11, 12) * 4


def look_up(index: NgramIndex, count: int) -> tuple[int, list[int]]:
    """Length of the longest match, and the tokens that follow it."""
    match, position = index.find_longest_match()
    return match, index.continuation(position, count) if match else []


@pytest.mark.parametrize(
    ("tokens", "count", "match", "following"),
    [
        ([], 3, 0, []),
        ([1, 2, 3], 3, 0, []),
        ([1, 2, 3, 4, 1, 2, 3], 2, 3, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 6, 3, [4, 1, 2, 3, 4, 1]),  # repeats
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, 3, [5]),  # of equally long matches the latest
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1, 3, [4]),  # the later match is shorter
        ([9, 2, 3, 4, 8, 2, 3], 1, 2, [4]),
        ([9, 3, 4, 8, 3], 1, 0, []),  # a match of one token is too short
        ([6, 6, 6, 6], 2, 3, [6, 6]),
        (list(range(20)) * 2, 2, MAX_MATCH, [0, 1]),
    ],
)
def test_the_tokens_after_the_longest_match(tokens: list[int], count: int, match: int, following: list[int]) -> None:
    assert look_up(NgramIndex(tokens), count) == (match, following)
    one_by_one = NgramIndex()
    for token in tokens:
        one_by_one.extend([token])
    assert look_up(one_by_one, count) == (match, following)


def test_the_longest_match_is_that_of_an_exhaustive_search() -> None:
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(2, 30))]
        matches = [0]
        for position in range(1, len(tokens)):
            length = 0
            while length < min(position, MAX_MATCH) and tokens[position - 1 - length] == tokens[-1 - length]:
                length += 1
            matches.append(length)
        longest = max(matches) if max(matches) >= 2 else 0
        match, position = NgramIndex(tokens).find_longest_match()
        assert match == longest
        assert not match or matches[position] == match


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return Target.load(folder, precision="fp32")


def prompts() -> list[tuple[int, ...]]:
    gen = torch.Generator().manual_seed(1)
    return [REFRAIN, *(tuple(torch.randint(0, VOCAB, (n,), generator=gen).tolist()) for n in (3, 12, 30))]


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_output_is_that_of_plain_decoding(target: Target, with_draft: bool, adaptive: bool) -> None:
    kinds = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.0, "repetition_penalty": 1.3}]
    requests = [
        request(f"{i}-{j}", prompt, max_tokens=40, **kind)
        for i, prompt in enumerate(prompts())
        for j, kind in enumerate(kinds)
    ]
    plain = run(make_engine(target), requests)
    draft = random_draft(target) if with_draft else None
    engine = make_engine(target, draft, lookup_tokens=15, adaptive=adaptive, max_batch_size=4)
    # An unseeded sampled request joins: only the draft may propose for it.
    answers = run(engine, [*requests, request("unseeded", REFRAIN, max_tokens=40, temperature=1.0)])
    assert {i: answers[i].token_ids for i in plain} == {i: plain[i].token_ids for i in plain}
    assert engine.stats.accepted > 0
    assert len(answers["unseeded"].token_ids) == 40


def test_the_draft_does_not_run_while_lookup_proposes_for_all_sequences(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny random model soon repeats itself; from then on lookup finds all proposals."""
    calls: list[int] = []
    original = Drafter.propose
    monkeypatch.setattr(Drafter, "propose", lambda self, inputs, **o: calls.append(1) or original(self, inputs, **o))
    requests = [request("a", REFRAIN, max_tokens=120, temperature=0.0)]
    with_lookup = make_engine(target, random_draft(target), lookup_tokens=15, adaptive=False)
    run(with_lookup, requests)
    assert with_lookup.stats.rounds > len(calls)
    calls.clear()
    without = make_engine(target, random_draft(target), adaptive=False)
    run(without, requests)
    assert without.stats.rounds == len(calls)
