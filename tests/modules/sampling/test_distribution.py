"""The options of a request: each against its definition and against transformers' logits processors."""

from dataclasses import replace

import pytest
import torch
from support.toy_sampling import BASE, OPTIONS, Toy, history, no_proposals, reference_p
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aurora_lit.modules.sampling.distribution import (
    History,
    LogitOptions,
    is_greedy,
    target_distribution,
    token_logprobs,
)
from aurora_lit.request import SamplingParams


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        (replace(BASE, temperature=0.7), TemperatureLogitsWarper(0.7)),
        (replace(BASE, top_k=50), TopKLogitsWarper(50)),
        (replace(BASE, top_k=10_000), TopKLogitsWarper(10_000)),
        (replace(BASE, top_p=0.5), TopPLogitsWarper(0.5)),
        (replace(BASE, top_p=0.99), TopPLogitsWarper(0.99)),
        (replace(BASE, min_p=0.1), MinPLogitsWarper(0.1)),
        (replace(BASE, repetition_penalty=1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (replace(BASE, logit_bias={5: 3.5}), SequenceBiasLogitsProcessor({(5,): 3.5})),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 3.0])  # flat (top-p needs the whole vocabulary) and peaked
def test_each_option_equals_the_processor_of_transformers(
    params: SamplingParams, processor: LogitsProcessor, scale: float
) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=gen) * scale
    tokens = torch.randint(5000, (4, 30), generator=gen)
    seen = History(token_BL=tokens, prompt_length_B=torch.full((4,), 20), length_B=torch.full((4,), 30))
    p = target_distribution(
        logits[:, None],
        options=LogitOptions.from_params([params] * 4),
        history=seen,
        proposals_BK=no_proposals(4).token_BK,
    )[:, 0]
    expected = processor(tokens, logits.clone()).softmax(-1)
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-9)
    if params.top_k != 10_000:
        assert not torch.allclose(p, logits.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_each_option_changes_the_distribution_and_equals_its_definition(name: str) -> None:
    toy = Toy.random(V=8, D=5, seed=3)
    tokens = torch.tensor([[3, 6]])
    p = target_distribution(
        toy.logits(tokens), options=LogitOptions.from_params([OPTIONS[name]]), history=history(1), proposals_BK=tokens
    )[0]
    plain = toy.logits(tokens)[0].softmax(-1)
    assert (p - plain).abs().max() > 1e-3
    for t, output in enumerate(((), (3,), (3, 6))):
        expected = reference_p(toy.logits(tokens)[0, t], OPTIONS[name], output=output)
        torch.testing.assert_close(p[t], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_padding_of_the_history_does_not_count() -> None:
    logits = torch.randn(1, 1, 8)
    params = replace(BASE, repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0)

    def p(padding: list[int]) -> torch.Tensor:
        seen = History(
            token_BL=torch.tensor([[1, 2, 2, *padding]]), prompt_length_B=torch.tensor([1]), length_B=torch.tensor([3])
        )
        options = LogitOptions.from_params([params])
        return target_distribution(logits, options=options, history=seen, proposals_BK=no_proposals(1).token_BK)

    assert torch.equal(p([]), p([5, 5, 5]))


def test_ties_with_the_last_token_kept_by_top_p_are_kept() -> None:
    logits = torch.tensor([[[2.0, 1.0, 1.0, 0.0]]])
    p = target_distribution(
        logits,
        options=LogitOptions.from_params([replace(BASE, top_p=0.7)]),
        history=None,
        proposals_BK=no_proposals(1).token_BK,
    )
    assert (p[0, 0] > 0).tolist() == [True, True, True, False]


def test_temperatures_too_small_to_divide_by_are_greedy() -> None:
    assert is_greedy(replace(BASE, temperature=1e-7))
    assert not is_greedy(replace(BASE, temperature=1e-4))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(3, 10).bfloat16()
    expected = logits.float().log_softmax(-1)
    records = token_logprobs(logits, token_ids=[4, 9], num_top=2)
    assert [r.token_id for r in records] == [4, 9]
    for t, record in enumerate(records):
        assert record.logprob == pytest.approx(expected[t, record.token_id].item(), abs=1e-5)
        values, ids = expected[t].topk(2)
        assert [i for i, _ in record.top] == ids.tolist()
        assert [v for _, v in record.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token_logprobs(logits, token_ids=[1], num_top=0)[0].top == ()
