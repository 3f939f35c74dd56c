"""Sampling parameters, seeds and log-probabilities in the whole engine, with and without speculation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from support.tiny_models import (
    VOCAB,
    Answer,
    make_engine,
    random_draft,
    reference_model,
    request,
    run,
    save_model,
    trained_draft,
)
from transformers import PreTrainedModel

from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request
from aurora_lit.serve.engine.engine import Engine

PROMPTS = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 11, 2, 23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return reference_model(folder)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(folder, precision="fp32")


@pytest.fixture(scope="module")
def draft(target: Target, model: PreTrainedModel) -> Eagle3Draft:
    """Trained on samples of the target, so that sampled proposals are accepted too."""
    torch.manual_seed(0)
    prompts = torch.randint(0, VOCAB, (16, 2))
    ids_BT = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=30, do_sample=True, top_k=0, temperature=0.7
    )
    return trained_draft(target, ids_BT, steps=24)


def requests(**params: object) -> list[Request]:
    return [request(str(i), prompt, max_tokens=20, **params) for i, prompt in enumerate(PROMPTS)]


def both(target: Target, draft: Eagle3Draft) -> Iterator[Engine]:
    yield make_engine(target)
    yield make_engine(target, copy.deepcopy(draft), max_draft_tokens=4)


def tokens(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


def test_greedy_with_penalties_and_bias_is_the_same_under_speculation(target: Target, draft: Eagle3Draft) -> None:
    plain, speculative = both(target, draft)
    without = tokens(run(plain, requests()))
    for params in (
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": -0.5},
        {"logit_bias": {7: 1.5, 11: -2.0}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {1: 1.0}},
    ):
        accepted = speculative.counters.accepted
        expected = tokens(run(plain, requests(**params)))
        assert expected != without, "the option changes something"
        assert tokens(run(speculative, requests(**params))) == expected
        # And in a batch with a request of other parameters.
        sampled = request("x", PROMPTS[1], max_tokens=30, temperature=0.9, seed=5, presence_penalty=1.0)
        answers = tokens(run(speculative, [*requests(**params), sampled]))
        assert {name: answers[name] for name in expected} == expected
        assert speculative.counters.accepted > accepted + 10


def test_the_engine_runs_at_both_ends_of_the_range_of_every_parameter(target: Target, draft: Eagle3Draft) -> None:
    extremes: list[dict[str, object]] = [
        {"repetition_penalty": 0.01, "frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"repetition_penalty": 10.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"top_p": 5e-324, "min_p": 1.0, "top_k": 1},
        {"top_p": 5e-324},
        {"min_p": 5e-324, "top_k": 2**31 - 1},
        {"logit_bias": {i: 100.0 if i % 2 else -100.0 for i in range(VOCAB)}},
    ]
    samplings: list[dict[str, object]] = [{"temperature": 0.0}, {"temperature": 1e-5}, {"temperature": 2.0, "seed": 3}]
    asked = [
        request(f"{number}", PROMPTS[number % 4], max_tokens=12, logprobs=2, **sampling, **extreme)
        for number, (sampling, extreme) in enumerate(itertools.product(samplings, extremes))
    ]
    for engine in both(target, draft):
        for answer in run(engine, asked).values():
            assert len(answer.token_ids) == 12
            assert all(0 <= token < VOCAB for token in answer.token_ids)


def test_a_repetition_penalty_is_that_of_transformers(
    model: PreTrainedModel, target: Target, draft: Eagle3Draft
) -> None:
    answers = tokens(run(make_engine(target, copy.deepcopy(draft)), requests(repetition_penalty=1.4)))
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=1.4
        )
        assert answers[str(i)] == out[0, len(prompt) :].tolist()


def test_min_tokens_is_that_of_transformers_and_changes_no_other_request(
    target: Target, draft: Eagle3Draft, model: PreTrainedModel
) -> None:
    for engine in both(target, draft):
        for prompt in PROMPTS:
            without = run(engine, [request("a", prompt, max_tokens=20, temperature=0.0)])["a"].token_ids
            stop = without[1]
            how = {"max_new_tokens": 20, "min_new_tokens": 7, "do_sample": False, "eos_token_id": stop}
            (expected,) = model.generate(torch.tensor([prompt]), **how)[:, len(prompt) :].tolist()
            asked = request("a", prompt, max_tokens=20, temperature=0.0, min_tokens=7, stop_token_ids=(stop,))
            other = request("b", prompt, max_tokens=20, temperature=0.0)
            answers = run(engine, [asked, other])
            assert answers["a"].token_ids == expected
            assert len(expected) >= 7
            assert stop not in expected[:7]
            assert answers["b"].token_ids == without


def test_a_sampled_answer_does_not_end_before_its_min_tokens(target: Target, draft: Eagle3Draft) -> None:
    stop, engines = tuple(range(0, VOCAB, 2)), tuple(both(target, draft))
    for params in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}):
        how = {"temperature": 1.0, "seed": 4, "min_tokens": 6, "stop_token_ids": stop, **params}
        found = [tokens(run(engine, requests(**how))) for engine in engines]
        assert all(len(each) > 6 and not set(each[:6]) & set(stop) for each in found[0].values())
        assert found[0] == found[1]


@pytest.mark.parametrize("k", [1, 4])
def test_a_seed_gives_the_same_output_alone_in_a_batch_and_with_any_draft(
    k: int, target: Target, draft: Eagle3Draft
) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    seeded = requests(**options)
    alone = {r.request_id: run(make_engine(target), [r])[r.request_id].token_ids for r in seeded}
    assert alone != {
        r.request_id: run(make_engine(target), [r])[r.request_id].token_ids for r in requests(**{**options, "seed": 6})
    }
    for kind in (copy.deepcopy(draft), random_draft(target)):
        engine = make_engine(target, kind, max_draft_tokens=k, max_batch_size=6)
        others = [request(f"x{i}", PROMPTS[i], max_tokens=9 * i + 1, temperature=1.0) for i in range(4)]
        answers = tokens(run(engine, [*others, *seeded], arrivals=[0, 1, 2, 5, 0, 3, 4, 9]))
        assert {name: answers[name] for name in alone} == alone
    assert tokens(run(make_engine(target, copy.deepcopy(draft)), seeded[:1]))["0"] == alone["0"]


@pytest.mark.parametrize("speculate", [False, True])
def test_log_probabilities_are_the_models_own(
    speculate: bool, model: PreTrainedModel, target: Target, draft: Eagle3Draft
) -> None:
    """Raw: without temperature, penalties and bias. For greedy, seeded and unseeded requests alike."""
    engine = make_engine(target, copy.deepcopy(draft) if speculate else None, max_draft_tokens=4)
    mixed_requests = [
        request("0", PROMPTS[0], max_tokens=20, logprobs=3, prompt_logprobs=2),
        request("1", PROMPTS[1], max_tokens=20, logprobs=0, prompt_logprobs=0, temperature=0.8, seed=1),
        request("2", PROMPTS[2], max_tokens=20, logprobs=5, temperature=1.2, repetition_penalty=1.3),
        request("3", PROMPTS[3], max_tokens=20, prompt_logprobs=4, logit_bias={3: 2.0}),
    ]
    answers = run(engine, mixed_requests)
    assert not speculate or engine.counters.accepted > 5
    for item in mixed_requests:
        answer, prompt, params = answers[item.request_id], list(item.prompt_ids), item.params
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([prompt + answer.token_ids])).logits[0].log_softmax(-1)
        if params.logprobs is None:
            assert answer.logprobs == []
        else:
            assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
        if params.prompt_logprobs is None:
            assert answer.prompt_logprobs is None
        else:
            assert answer.prompt_logprobs is not None
            assert answer.prompt_logprobs[0] is None
            assert [entry.token_id for entry in answer.prompt_logprobs[1:] if entry] == prompt[1:]
        placed = [(len(prompt) + i, entry, params.logprobs) for i, entry in enumerate(answer.logprobs)]
        placed += [(i, entry, params.prompt_logprobs) for i, entry in enumerate(answer.prompt_logprobs or ()) if entry]
        for place, entry, num_top in placed:
            logprob_V = logprobs_TV[place - 1]
            assert entry.logprob == pytest.approx(logprob_V[entry.token_id].item(), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(
                logprob_V.topk(num_top or 0).values.tolist(), abs=1e-4
            )
            assert [value for _, value in entry.top] == pytest.approx(
                [logprob_V[t].item() for t, _ in entry.top], abs=1e-4
            )


def test_a_prompt_of_one_token_has_one_empty_prompt_logprob(target: Target) -> None:
    answers = run(make_engine(target), [request("a", [5], max_tokens=2, prompt_logprobs=1)])
    assert answers["a"].prompt_logprobs == (None,)


@pytest.mark.skipif(native.library() is None, reason="torch's own sums depend on the batch")
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_speculation_is_plain_decoding_bit_for_bit(precision: str, folder: Path, draft: Eagle3Draft) -> None:
    target = load_target(folder, precision=precision)
    kinds: dict[str, dict[str, object]] = {"greedy": {}, "seeded": {"temperature": 0.9, "seed": 3}}
    asked = [
        replace(r, request_id=f"{kind} {r.request_id}")
        for kind, options in kinds.items()
        for r in requests(logprobs=0, **options)
    ]
    plain = {r.request_id: run(make_engine(target), [r])[r.request_id] for r in asked}
    if precision != "bf16":  # rounding changes so small a model that the draft must be trained again
        texts = [[*r.prompt_ids[-2:], *plain[r.request_id].token_ids] for r in asked]
        draft = trained_draft(target, torch.tensor(texts), steps=20)
    accepted = dict.fromkeys(kinds, 0)
    for k in range(1, 7):
        engine = make_engine(target, copy.deepcopy(draft), max_draft_tokens=k, prefill_chunk_tokens=5)
        for name, answer in run(engine, asked, arrivals=[0, 2, 3, 1, 0, 2, 3, 1]).items():
            assert answer.token_ids == plain[name].token_ids
            assert answer.logprobs == plain[name].logprobs, "the same bits"
            accepted[name.split()[0]] += sum(output.num_accepted for output in answer.rounds)
    assert min(accepted.values()) > 10, accepted


@pytest.mark.parametrize(
    ("params", "k"),
    [({}, 3), ({"temperature": 0.6, "top_k": 7}, 1), ({"temperature": 1.5, "top_p": 0.8, "logit_bias": {2: 2.0}}, 2)],
    ids=["plain", "top_k", "top_p+bias"],
)
def test_sampled_pairs_have_the_models_probabilities(params: dict[str, object], k: int, tmp_path: Path) -> None:
    """Chi-square of the first two tokens of 3000 outputs, whose seeds are given, against the model's probabilities."""
    V, count, first = 10, 3000, 4
    folder = save_model("llama", tmp_path, vocab_size=V, num_hidden_layers=1)
    model, target = reference_model(folder), load_target(folder, precision="fp32")

    def probabilities(logits_BV: torch.Tensor) -> torch.Tensor:
        bias = torch.zeros(V, dtype=torch.float64)
        for token, value in dict(params.get("logit_bias", {})).items():  # type: ignore[call-overload]
            bias[token] = value
        p_BV = torch.softmax((logits_BV.double() + bias) / float(params.get("temperature", 1.0)), -1)  # type: ignore[arg-type]
        order_BV = p_BV.argsort(-1, descending=True)
        sorted_BV = p_BV.gather(-1, order_BV)
        kept_BV = sorted_BV.cumsum(-1) - sorted_BV < float(params.get("top_p", 1.0))  # type: ignore[arg-type]
        kept_BV &= torch.arange(V) < int(params.get("top_k", V))  # type: ignore[call-overload]
        p_BV = p_BV * torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV)
        return p_BV / p_BV.sum(-1, keepdim=True)

    with torch.no_grad():
        p_V = probabilities(model(torch.tensor([[first]])).logits[:, -1])[0]
        pairs = torch.stack([torch.full((V,), first), torch.arange(V)], dim=1)
        expected_VV = p_V[:, None] * probabilities(model(pairs).logits[:, -1])

    torch.manual_seed(11)
    engine = make_engine(target, random_draft(target), max_draft_tokens=k, max_batch_size=300, max_seq_len=8)
    options = {"temperature": 1.0, **params}
    answers = run(engine, [request(str(i), [first], max_tokens=2 + i % 2, seed=i, **options) for i in range(count)])
    seen_VV = torch.zeros(V, V)
    for answer in answers.values():
        seen_VV[answer.token_ids[0], answer.token_ids[1]] += 1
    assert 0.05 < engine.counters.accepted / engine.counters.proposed < 0.95
    assert seen_VV[expected_VV == 0].sum() == 0

    expected = expected_VV.flatten() * count
    common = expected >= 5
    seen = [*seen_VV.flatten()[common].tolist(), float(seen_VV.flatten()[~common].sum())]
    expected_counts = [*expected[common].tolist(), float(expected[~common].sum())]
    if expected_counts[-1] < 5:
        seen, expected_counts = (
            [*seen[:-2], seen[-2] + seen[-1]],
            [*expected_counts[:-2], expected_counts[-2] + expected_counts[-1]],
        )
    assert len(expected_counts) > 20
    assert chisquare(seen, expected_counts).pvalue > 1e-3
