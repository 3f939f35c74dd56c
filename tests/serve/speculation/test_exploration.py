"""Rounds that explore: proposals are drawn at another temperature and with other noise; the output does not change."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, request, run, save_model, trained_draft

from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Output
from aurora_lit.serve.speculation.sources.drafter import Drafter

PROMPT = (3, 14, 15, 9, 26)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder: Path = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return load_target(folder, precision="fp32")


@pytest.fixture(scope="module")
def draft(target: Target) -> Eagle3Draft:
    answer = run(make_engine(target), [request("a", PROMPT, max_tokens=30)])["a"].token_ids
    return trained_draft(target, torch.tensor([[*PROMPT, *answer]]), steps=30)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 8.0])
def test_output_is_that_of_plain_decoding(
    target: Target, draft: Eagle3Draft, temperature: float, adaptive: bool
) -> None:
    gen = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=gen).tolist() for n in (1, 5, 17, 8)]
    kinds = {"greedy": {}, "seeded": {"temperature": 0.9, "seed": 8}, "unseeded": {"temperature": 1.0}}
    requests = [request("first", PROMPT)] + [
        request(f"{kind}{i}", prompt, max_tokens=20, **params)
        for i, prompt in enumerate(prompts)
        for kind, params in kinds.items()
    ]
    plain = run(make_engine(target), requests)
    engine = make_engine(
        target, copy.deepcopy(draft), adaptive=adaptive, explore_share=0.7, explore_temperature=temperature
    )
    answers = run(engine, requests)
    for request_id, answer in answers.items():
        assert answer.token_ids == plain[request_id].token_ids, request_id
    assert engine.counters.explored_drafts > 10 or adaptive


def test_requests_that_teach_no_policy_do_not_explore(target: Target) -> None:
    """Their rewards are not of the model's own distribution. Truncation leaves a greedy request as it is."""
    for params, explores in (
        ({"temperature": 0.7, "seed": 1}, False),
        ({"temperature": 0.7}, False),
        ({"presence_penalty": 0.5}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"top_p": 0.5}, True),
    ):
        engine = make_engine(target, random_draft(target), explore_share=1.0, explore_temperature=1.0)
        run(engine, [request("a", PROMPT, **params)])
        assert engine.counters.drafts > 0
        assert engine.counters.explored_drafts == (engine.counters.drafts if explores else 0), params
    run(engine, [request("greedy", PROMPT), request("sampled", PROMPT, temperature=0.7)])
    assert 0 < engine.counters.explored_drafts < engine.counters.drafts, "beside each other"


def test_the_configured_share_of_drafted_rounds_explores(target: Target) -> None:
    def outputs_of(share: float, *, new: int = 60) -> list[Output]:
        engine = make_engine(target, random_draft(target), explore_share=share, explore_seed=4)
        answers = run(engine, [request(str(i), PROMPT, max_tokens=new) for i in range(16)])
        outputs = [output for answer in answers.values() for output in answer.rounds]
        explored = sum(output.explored for output in outputs)
        assert explored == engine.counters.explored_drafts
        assert new < 60 or explored / engine.counters.drafts == pytest.approx(share, abs=0.05)
        return outputs

    outputs_of(0.0)
    outputs_of(1.0)
    first, again = (outputs_of(0.25, new=new) for new in (60, 24))
    assert [o.explored for o in first][:16] == [o.explored for o in again][:16], "the seed decides"


def test_exploring_samples_from_the_draft_at_the_exploration_temperature(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a high temperature many different tokens are proposed for one prompt, at a low one only the argmax."""
    proposed: dict[float, set[int]] = {}
    original = Drafter.propose
    for temperature in (0.05, 10.0):
        calls: list[Drafted] = []

        def propose(*args: object, **options: object) -> Drafted:
            drafted = original(*args, **options)  # type: ignore[arg-type]
            calls.append(drafted)  # noqa: B023
            return drafted

        monkeypatch.setattr(Drafter, "propose", propose)
        engine = make_engine(target, random_draft(target), explore_share=1.0, explore_temperature=temperature)
        run(engine, [request(str(i), PROMPT, max_tokens=2) for i in range(64)])
        monkeypatch.undo()
        proposed[temperature] = {token for drafted in calls for token, *_ in drafted.tokens}
    assert len(proposed[10.0]) > 20
    assert len(proposed[0.05]) <= 3


def test_rounds_that_explore_do_not_change_the_acceptance_rate(target: Target) -> None:
    engine = make_engine(target, random_draft(target), explore_share=1.0)
    before = engine.proposer.draft.rates.mean_rate(sampled=False)
    run(engine, [request("a", PROMPT, max_tokens=20)])
    assert engine.proposer.draft.rates.mean_rate(sampled=False) == before
    plain = make_engine(target, random_draft(target))
    run(plain, [request("a", PROMPT, max_tokens=20)])
    assert plain.proposer.draft.rates.mean_rate(sampled=False) != before


def test_exploration_may_change_between_rounds(target: Target) -> None:
    engine = make_engine(target, random_draft(target), explore_seed=4)
    run(engine, [request(f"a{n}", [n + 1, 5, 6], max_tokens=8) for n in range(4)])
    assert engine.counters.explored_drafts == 0
    engine.proposer.draft.explore_share = 1.0
    run(engine, [request(f"b{n}", [n + 1, 5, 6], max_tokens=8) for n in range(4)])
    assert engine.counters.explored_drafts > 4
