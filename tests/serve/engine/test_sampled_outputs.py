"""Sampled outputs under speculation are token for token those of plain decoding, so they have its law.

The noise that a token is drawn with depends on the request's key and the token's place alone. So a request has one
output, whatever is proposed, beside any other requests, in every precision.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from support.tiny_models import VOCAB, Answer, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.kernels import native
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources import draft as draft_source

needs_kernels = pytest.mark.skipif(native.library() is None, reason="torch's own sums depend on the batch")
PRECISIONS = [
    "fp32",
    pytest.param("int4", marks=needs_kernels),
    *(pytest.param(precision, marks=[needs_kernels, pytest.mark.slow]) for precision in ("bf16", "int8")),
]
WAYS: dict[str, dict[str, Any]] = {
    "chains": {},
    "branches": {"branches": True},
    "lookup": {"copied_tokens": 15},
    "all": {"branches": True, "copied_tokens": 15, "adaptive": True},
}
PROMPTS = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 11, 2, 23)]
PROMPTS[1] = PROMPTS[1][:4] * 4  # repeats itself, so that there is something to look up
NEW = 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """A target, and a draft trained on its sampled outputs."""

    target: Target
    draft: Eagle3Draft

    def plain(self, requests: list[Request]) -> dict[str, Answer]:
        """Each request alone, without speculation."""
        return {r.request_id: run(make_engine(self.target), [r])[r.request_id] for r in requests}

    def engine(self, **changes: Any) -> Engine:
        return make_engine(self.target, copy.deepcopy(self.draft), **changes)


def sampled_requests() -> list[Request]:
    """Of every kind, with and without a seed."""
    kinds: dict[str, dict[str, Any]] = {
        "unseeded": {"temperature": 1.0},
        "cool": {"temperature": 0.5},
        "seeded": {"temperature": 0.8, "seed": 7},
        "cut": {"temperature": 0.9, "top_p": 0.8, "min_p": 0.02, "seed": 3},
        "top_k": {"temperature": 1.3, "top_k": 5},
        "penalised": {"temperature": 0.7, "presence_penalty": 0.8, "frequency_penalty": 0.4, "seed": 1},
        "repeating": {"temperature": 0.7, "repetition_penalty": 0.7},
        "biased": {"temperature": 0.7, "logit_bias": {7: 2.0, 11: -5.0}},
        "logprobs": {"temperature": 0.9, "logprobs": 2},
        "greedy": {},
    }
    return [
        replace(request(f"{name}{i}", PROMPTS[i], max_tokens=NEW, **kind), noise_key=100 * i + number)
        for number, (name, kind) in enumerate(kinds.items())
        for i in sorted({number % 4, 1})  # the second prompt repeats itself
    ]


@pytest.fixture(scope="module", params=PRECISIONS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    target = load_target(folder, precision=request.param)
    answers = run(make_engine(target), sampled_requests())
    texts = [answer.token_ids for answer in answers.values()]
    return Case(target=target, draft=trained_draft(target, torch.tensor(texts), steps=18))


@pytest.fixture(scope="module")
def plain(case: Case) -> dict[str, Answer]:
    return case.plain(sampled_requests())


@pytest.mark.parametrize(
    ("way", "batch"), [*itertools.product(WAYS, (3, 8)), ("chains", 1), ("all", 1)]
)  # the last request of every batch is alone too
def test_outputs_are_those_of_plain_decoding_without_other_requests(
    case: Case, plain: dict[str, Answer], way: str, batch: int
) -> None:
    requests = sampled_requests()
    engine = case.engine(**WAYS[way], max_batch_size=batch)
    answers = run(engine, requests, arrivals=[number // 2 for number in range(len(requests))])
    for name, answer in answers.items():
        assert answer.token_ids == plain[name].token_ids, name
        assert [entry.token_id for entry in answer.logprobs] == [entry.token_id for entry in plain[name].logprobs]
        if native.library() is not None:
            assert answer.logprobs == plain[name].logprobs, "the same bits"
    assert engine.counters.accepted > (40 if way != "all" else 0), "the test needs proposals that are accepted"
    if way == "lookup":
        assert any(output.only_copied for answer in answers.values() for output in answer.rounds)


def test_a_request_without_a_seed_has_another_output_for_another_key(case: Case) -> None:
    """So n choices of one prompt differ; the same key gives the same output again, also beside the others."""
    keyed = [replace(request(str(key), PROMPTS[0], max_tokens=NEW, temperature=1.0), noise_key=key) for key in range(8)]
    plain = case.plain(keyed)
    answers = run(case.engine(branches=True), keyed)
    assert [answers[r.request_id].token_ids for r in keyed] == [plain[r.request_id].token_ids for r in keyed]
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 8
    seeded = [request(str(n), PROMPTS[0], max_tokens=NEW, temperature=1.0, seed=n) for n in range(8)]
    again = run(case.engine(), seeded)
    assert [again[str(n)].token_ids for n in range(8)] == [plain[str(n)].token_ids for n in range(8)], "a seed is a key"


def test_keys_of_requests_are_secrets_that_do_not_repeat() -> None:
    keys = {request("a", [1]).noise_key for _ in range(1000)}
    assert len(keys) == 1000
    assert all(0 <= key < 2**63 for key in keys)


@needs_kernels
def test_a_rows_output_does_not_depend_on_options_of_the_rows_beside_it(case: Case, plain: dict[str, Answer]) -> None:
    """Rows that need their logits and rows that do not share the head's product."""
    requests = sampled_requests()
    subject = next(r for r in requests if r.request_id.startswith("unseeded"))
    for other in requests:
        if other is not subject:
            both = run(case.engine(branches=True), [other, subject])
            assert both[subject.request_id].token_ids == plain[subject.request_id].token_ids, other.request_id
            assert both[other.request_id].token_ids == plain[other.request_id].token_ids


def test_the_draft_predicts_sampled_tokens_better_with_the_targets_noise(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that is as good at temperature 1 as the target itself, nearly all would be accepted."""
    keyed = [
        replace(request(str(key), PROMPTS[key % 4], max_tokens=NEW, temperature=1.0), noise_key=key)
        for key in range(24)
    ]

    def acceptance() -> float:
        engine = case.engine(max_draft_tokens=1)
        run(engine, keyed)
        return engine.counters.accepted / engine.counters.proposed

    with_noise = acceptance()
    shared = draft_source._shared_noise

    def other_noise(sequences: list[RunningSequence]) -> ColumnDraws | None:
        noise = shared(sequences)
        return None if noise is None else noise._replace(keys=[key + 1000 for key in noise.keys])

    monkeypatch.setattr(draft_source, "_shared_noise", other_noise)
    assert with_noise > 1.3 * acceptance()


def test_many_keys_have_the_law_of_the_targets_softmax(tmp_path: Path) -> None:
    """Chi-square of the first two tokens of six thousand outputs against the model's probabilities.

    With branches; test_sampling_params.py has the law of chains, at temperature 1 and with options.
    """
    vocab, count, first, temperature = 10, 6000, 4, 0.6
    target = load_target(save_model("llama", tmp_path, vocab_size=vocab, num_hidden_layers=1), precision="fp32")
    engine = make_engine(
        target, random_draft(target), max_batch_size=400, max_seq_len=8, max_draft_tokens=3, branches=True
    )
    keyed = [
        replace(request(str(key), [first], max_tokens=3, temperature=temperature), noise_key=key)
        for key in range(count)
    ]
    seen_VV = torch.zeros(vocab, vocab, dtype=torch.float64)
    for answer in run(engine, keyed).values():
        seen_VV[answer.token_ids[0], answer.token_ids[1]] += 1
    assert engine.counters.accepted > count / 10
    pairs = torch.tensor([[first, token] for token in range(vocab)])
    with torch.no_grad():
        p_BTV = (target.logits(target.in_torch.forward_uncached(pairs)[1]).double() / temperature).softmax(-1)
    expected_VV = p_BTV[0, 0][:, None] * p_BTV[:, 1] * count
    common = expected_VV >= 5
    statistic = ((seen_VV - expected_VV)[common] ** 2 / expected_VV[common]).sum()
    rest, expected_rest = seen_VV[~common].sum(), expected_VV[~common].sum()
    statistic += (rest - expected_rest) ** 2 / expected_rest.clamp_min(1)
    assert chi2.sf(statistic.item(), int(common.sum())) > 1e-4
