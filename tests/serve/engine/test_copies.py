"""Copies in the engine, from within requests and from the traffic memory: they never change an output."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model

from aurora_lit.kernels import native, suffix_index
from aurora_lit.kernels.suffix_index import NO_COPIES, Copies, LookUp
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.request import Request, Source
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.speculation import propose
from aurora_lit.serve.speculation.sources.drafter import Drafter
from aurora_lit.serve.speculation.weigh import Weigher, with_copies

REFRAIN = (7, 8, 9, 10, 11, 12) * 4
MEMORY = {"memory_scope": "domain"}
needs_kernels = pytest.mark.skipif(native.library() is None, reason="there is no memory without kernels")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return load_target(folder, precision="fp32")


def prompts() -> list[tuple[int, ...]]:
    gen = torch.Generator().manual_seed(1)
    return [REFRAIN, *(tuple(torch.randint(0, VOCAB, (n,), generator=gen).tolist()) for n in (3, 12, 30))]


def all_requests() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ]
    return [
        request(f"{i}-{j}", prompt, max_tokens=40, **kind)
        for (i, prompt), (j, kind) in itertools.product(enumerate(prompts()), enumerate(kinds))
    ]


@pytest.mark.parametrize("memory", [{}, pytest.param(MEMORY, marks=needs_kernels)])
@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_output_is_that_of_plain_decoding(
    target: Target, with_draft: bool, adaptive: bool, memory: dict[str, Any]
) -> None:
    requests = all_requests()
    plain = run(make_engine(target), requests)
    draft = random_draft(target) if with_draft else None
    engine = make_engine(target, draft, copied_tokens=15, branches=True, adaptive=adaptive, max_batch_size=4, **memory)
    for _ in range(2):  # the second time the memory holds all answers
        answers = run(engine, requests)
        assert {i: answers[i].token_ids for i in plain} == {i: plain[i].token_ids for i in plain}
    assert engine.counters.accepted > 0


@needs_kernels
@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}])
@pytest.mark.parametrize("with_draft", [False, True])
def test_a_prediction_is_proposed_and_changes_nothing(target: Target, kind: dict[str, Any], with_draft: bool) -> None:
    asked = request("a", prompts()[2], max_tokens=40, **kind)
    answer = list(run(make_engine(target), [asked])["a"].token_ids)
    other = [VOCAB - 1 - token for token in answer]
    predictions = {
        "right": answer,
        "wrong": other,
        "inserted": [*answer[:20], *other[:5], *answer[20:]],
        "removed": answer[:10] + answer[16:],
        "replaced": answer[:10] + other[10:14] + answer[14:],
    }
    draft = random_draft(target) if with_draft else None
    rounds = {}
    for name, predicted in predictions.items():
        engine = make_engine(target, draft, copied_tokens=15, branches=True, adaptive=False, **MEMORY)
        with_prediction = replace(asked, prediction_ids=tuple(predicted), store=False)
        assert list(run(engine, [with_prediction])["a"].token_ids) == answer
        rounds[name] = engine.counters.rounds
        assert engine.memory is not None
        assert engine.memory.index.counts == (0, 0), "neither answer nor prediction is remembered"
    if kind["temperature"]:  # copies of sampled answers are trusted less at first
        assert rounds["right"] < rounds["wrong"]
        return
    assert rounds["right"] == 3, "15 tokens and one of the target's own in each"
    assert max(rounds["inserted"], rounds["replaced"]) <= 3 + 4 + 2
    assert rounds["removed"] <= 3 + 6 + 2


@needs_kernels
def test_what_was_answered_once_is_proposed_to_the_next(target: Target) -> None:
    engine = make_engine(target, copied_tokens=15, lookup=False, **MEMORY)
    first = run(engine, [request("a", prompts()[2], max_tokens=30, temperature=0.0)])["a"]
    rounds = engine.counters.rounds
    assert engine.counters.proposed == 0
    second = run(engine, [request("b", prompts()[2], max_tokens=30, temperature=0.0)])["b"]
    assert second.token_ids == first.token_ids
    assert engine.counters.rounds - rounds <= 4  # 15 copies and a token of the target's own in each
    assert engine.counters.memory_accepted >= 26
    by_source = [0] * len(Source)
    by_source[Source.TARGET] = 60 - engine.counters.accepted
    by_source[Source.MEMORY] = engine.counters.memory_accepted
    assert engine.counters.generated_by_source == by_source


@needs_kernels
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 30])
def test_nothing_is_copied_beyond_the_requests_end(target: Target, max_tokens: int) -> None:
    engine = make_engine(target, copied_tokens=15, **MEMORY)
    run(engine, [request("a", REFRAIN, max_tokens=40, temperature=0.0)])
    answer = run(engine, [request("b", REFRAIN, max_tokens=max_tokens, temperature=0.0)])["b"]
    left = max_tokens
    for output in answer.rounds:
        assert output.num_proposed <= left - 1, "the target's own token comes after them"
        left -= len(output.token_ids)
    assert left == 0


@needs_kernels
@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 3}])
def test_copies_beside_what_the_draft_proposes(
    target: Target, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    """Where columns cost nothing, every copy joins the draft's proposals."""
    added: list[int] = []

    def merge(drafted: Proposal, copies: Copies, **options: Any) -> Proposal:
        proposal = with_copies(drafted, copies, **options)
        added.append(len(proposal.tokens) - len(drafted.tokens))
        return proposal

    monkeypatch.setattr(propose, "with_copies", merge)
    monkeypatch.setattr(Weigher, "copies", lambda self, survivals, rates, **_: [0] * len(rates))
    monkeypatch.setattr(Weigher, "speed", lambda *_: 0.0)
    engine = make_engine(target, random_draft(target), copied_tokens=15, branches=True, adaptive=True, **MEMORY)
    engine.floor = None
    requests = [request(str(i), prompt, max_tokens=30, **kind) for i, prompt in enumerate(prompts())]
    plain = run(make_engine(target), requests)
    for _ in range(2):
        answers = run(engine, requests)
        assert {i: answers[i].token_ids for i in plain} == {i: plain[i].token_ids for i in plain}
    assert sum(added) > 0
    assert engine.counters.accepted > 0


@needs_kernels
def test_of_a_request_that_may_not_be_stored_nothing_is_remembered(target: Target) -> None:
    engine = make_engine(target, copied_tokens=15, lookup=False, **MEMORY)
    asked = request("a", prompts()[2], max_tokens=30, temperature=0.0)
    run(engine, [replace(asked, store=False)])
    assert engine.memory is not None
    assert engine.counters.memory_answers == 0
    run(engine, [asked])
    assert engine.counters.proposed == 0


def test_the_draft_does_not_run_while_copies_are_proposed_for_all_sequences(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny random model soon repeats itself; from then on all proposals are found in the request."""
    calls: list[int] = []
    original = Drafter.propose
    monkeypatch.setattr(Drafter, "propose", lambda self, inputs, **o: calls.append(1) or original(self, inputs, **o))
    requests = [request("a", REFRAIN, max_tokens=120, temperature=0.0)]
    with_copies = make_engine(target, random_draft(target), copied_tokens=15, adaptive=False)
    run(with_copies, requests)
    assert with_copies.counters.rounds > len(calls)
    calls.clear()
    without = make_engine(target, random_draft(target), adaptive=False)
    run(without, requests)
    assert without.counters.rounds == len(calls)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_sequence_without_copies_is_looked_up_ever_more_rarely(
    target: Target, monkeypatch: pytest.MonkeyPatch, adaptive: bool
) -> None:
    engine = make_engine(target, copied_tokens=15, adaptive=adaptive, max_seq_len=128)
    engine.floor = None
    lengths: list[int] = []

    def find(tokens_SL: torch.Tensor, rows: LookUp, *, memory: object) -> list[Copies]:
        lengths.extend(rows.lengths)
        finds = len(lengths) == 12
        return [Copies([1], [0], [0.9], [0]) if finds else NO_COPIES for _ in rows.slots]

    monkeypatch.setattr(suffix_index, "look_up", find)
    run(engine, [request("a", (3, 4, 5), max_tokens=124, temperature=0.0, ignore_eos=True)])
    steps = [after - before for before, after in itertools.pairwise(lengths)]
    if not adaptive:
        assert set(steps) <= {1, 2}
        return
    assert [steps[0], steps[2], *steps[4:7], *steps[8:10]] == [1, 2, 4, 4, 4, 8, 8]
    assert max(steps[11:13]) <= 2, "found something"


def test_sequences_without_copies_are_looked_up_in_the_same_rounds(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()
    """In each round, for how many of three sequences copies were looked for."""

    def find_nothing(_tokens_SL: torch.Tensor, rows: LookUp, **_how: object) -> list[Copies]:
        asked[-1] += len(rows.slots)
        return [NO_COPIES] * len(rows.slots)

    monkeypatch.setattr(suffix_index, "look_up", find_nothing)
    engine = make_engine(target, copied_tokens=8, adaptive=True)
    engine.floor = None
    for number in range(3):
        engine.submit(request(str(number), (3,) * (3 + number), max_tokens=120))
    while engine.has_work and len(asked) < 101:
        asked.append(0)
        engine.round()
    decoding = asked[asked.index(3) :][:88]
    assert set(decoding) == {0, 3}, "all of them or none"
    assert 10 <= decoding.count(3) <= 18, "ever more rarely"
