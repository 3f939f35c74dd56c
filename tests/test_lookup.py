"""Prompt lookup: what is copied, and that it never changes what is said."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, make_engine, random_draft, request, run, save_model

from aurora_lit.models.target import Target
from aurora_lit.serve.drafting import Drafter
from aurora_lit.serve.lookup import NgramIndex

REFRAIN = (7, 8, 9, 10, 11, 12) * 4


@pytest.mark.parametrize(
    ("tokens", "count", "copied"),
    [
        ([], 3, []),
        ([1, 2, 3], 3, []),
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 3, 4, 1, 2, 3], 6, [4, 1, 2, 3, 4, 1]),  # goes round
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, [5]),  # the latest occurrence
        ([9, 2, 3, 4, 8, 2, 3], 1, []),  # two tokens that agree are not enough
        ([6, 6, 6, 6], 2, [6, 6]),
    ],
)
def test_what_is_copied(tokens: list[int], count: int, copied: list[int]) -> None:
    assert NgramIndex(tokens).continuation(count) == copied
    one_by_one = NgramIndex()
    for token in tokens:
        one_by_one.extend([token])
    assert one_by_one.continuation(count) == copied


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
    engine = make_engine(target, draft, lookup=True, adaptive=adaptive, max_batch_size=4)
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
    with_lookup = make_engine(target, random_draft(target), lookup=True, adaptive=False)
    run(with_lookup, asked)
    assert with_lookup.stats.rounds > len(calls)
    calls.clear()
    without = make_engine(target, random_draft(target), adaptive=False)
    run(without, asked)
    assert without.stats.rounds == len(calls)
