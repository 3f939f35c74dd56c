"""Prompt lookup: what is copied, and that it never changes what is said."""

from __future__ import annotations

import random

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model

from aurora_lit.models.target import Target
from aurora_lit.serve.sequences.ngram_index import MOST_MATCH, NgramIndex
from aurora_lit.serve.speculation.drafter import Drafter

REFRAIN = (7, 8, 9, 10, 11, 12) * 4


def copy_of(index: NgramIndex, count: int) -> tuple[int, list[int]]:
    """How many tokens agree, and what is copied."""
    match, place = index.longest()
    return match, index.continuation(place, count) if match else []


@pytest.mark.parametrize(
    ("tokens", "count", "match", "copied"),
    [
        ([], 3, 0, []),
        ([1, 2, 3], 3, 0, []),
        ([1, 2, 3, 4, 1, 2, 3], 2, 3, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 6, 3, [4, 1, 2, 3, 4, 1]),  # goes round
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, 3, [5]),  # of equal ones the latest
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1, 3, [4]),  # before a later one fewer tokens agree
        ([9, 2, 3, 4, 8, 2, 3], 1, 2, [4]),
        ([9, 3, 4, 8, 3], 1, 0, []),  # one token that agrees is not enough
        ([6, 6, 6, 6], 2, 3, [6, 6]),
        (list(range(20)) * 2, 2, MOST_MATCH, [0, 1]),
    ],
)
def test_what_is_copied(tokens: list[int], count: int, match: int, copied: list[int]) -> None:
    assert copy_of(NgramIndex(tokens), count) == (match, copied)
    one_by_one = NgramIndex()
    for token in tokens:
        one_by_one.extend([token])
    assert copy_of(one_by_one, count) == (match, copied)


def test_the_longest_agreement_is_that_of_looking_everywhere() -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(4) for _ in range(draw.randrange(2, 30))]
        everywhere = [0]
        for place in range(1, len(tokens)):
            agreed = 0
            while agreed < min(place, MOST_MATCH) and tokens[place - 1 - agreed] == tokens[-1 - agreed]:
                agreed += 1
            everywhere.append(agreed)
        longest = max(everywhere) if max(everywhere) >= 2 else 0
        match, place = NgramIndex(tokens).longest()
        assert match == longest
        assert not match or everywhere[place] == match


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
    asked = [
        request(f"{i}-{j}", prompt, max_tokens=40, **kind)
        for i, prompt in enumerate(prompts())
        for j, kind in enumerate(kinds)
    ]
    plain = run(make_engine(target), asked)
    draft = random_draft(target) if with_draft else None
    engine = make_engine(target, draft, lookup_tokens=15, adaptive=adaptive, max_batch_size=4)
    # A row that is sampled freely joins: the draft alone may propose for it.
    copied = run(engine, [*asked, request("free", REFRAIN, max_tokens=40, temperature=1.0)])
    assert {i: copied[i].token_ids for i in plain} == {i: plain[i].token_ids for i in plain}
    assert engine.stats.accepted > 0
    assert len(copied["free"].token_ids) == 40


def test_no_draft_pass_runs_while_all_rows_copy(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model soon repeats itself; from then on its refrain is copied."""
    calls: list[int] = []
    original = Drafter.propose
    monkeypatch.setattr(Drafter, "propose", lambda self, rows, **o: calls.append(1) or original(self, rows, **o))
    asked = [request("a", REFRAIN, max_tokens=120, temperature=0.0)]
    with_lookup = make_engine(target, random_draft(target), lookup_tokens=15, adaptive=False)
    run(with_lookup, asked)
    assert with_lookup.stats.rounds > len(calls)
    calls.clear()
    without = make_engine(target, random_draft(target), adaptive=False)
    run(without, asked)
    assert without.stats.rounds == len(calls)
