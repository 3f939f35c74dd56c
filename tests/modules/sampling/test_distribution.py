"""The options of a request: each against its definition and against transformers' logits processors."""

from dataclasses import replace

import pytest
import torch
from support.toy_sampling import BASE, GREEDY, OPTIONS, PROMPT, Toy, reference_p
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
    apply_bias_and_penalties,
    has_options,
    is_greedy,
    probabilities,
    token_logprobs,
)
from aurora_lit.request import SamplingParams


def distribution(
    logits_V: torch.Tensor, params: SamplingParams, context: list[int], *, prompt_length: int = 0
) -> torch.Tensor:
    shifted_V = apply_bias_and_penalties(
        logits_V, params, context_L=torch.tensor(context, dtype=torch.int64), prompt_length=prompt_length
    )
    return probabilities(shifted_V, params, temperature=params.temperature)


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
@pytest.mark.parametrize("scale", [0.3, 3.0])  # flat and peaked
def test_each_option_equals_the_processor_of_transformers(
    params: SamplingParams, processor: LogitsProcessor, scale: float
) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=gen) * scale
    tokens = torch.randint(5000, (4, 30), generator=gen)
    rows = zip(logits, tokens.tolist(), strict=True)
    p = torch.stack([distribution(row_V, params, context, prompt_length=20) for row_V, context in rows])
    expected = processor(tokens, logits.clone()).softmax(-1)
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-9)
    if params.top_k != 10_000:
        assert not torch.allclose(p, logits.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
@pytest.mark.parametrize("output", [(), (3,), (3, 6), (3, 6, 6)])
def test_each_option_changes_the_distribution_and_equals_its_definition(name: str, output: tuple[int, ...]) -> None:
    """After outputs with and without repetitions."""
    logits_V, before = Toy.random(V=8, seed=3).target[0], Toy.random(V=8, seed=3).target[0]
    p = distribution(logits_V, OPTIONS[name], [*PROMPT, *output], prompt_length=len(PROMPT))
    assert torch.equal(logits_V, before), "the logits themselves do not change"
    of_output_alone = name in ("presence", "frequency")
    assert ((p - logits_V.softmax(-1)).abs().max() > 1e-3) == (bool(output) or not of_output_alone)
    expected = torch.tensor(reference_p(logits_V, OPTIONS[name], output=output), dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_ties_with_the_last_token_kept_by_top_p_are_kept() -> None:
    p = distribution(torch.tensor([2.0, 1.0, 1.0, 0.0]), replace(BASE, top_p=0.7), [])
    assert (p > 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("params", [replace(BASE, logit_bias={8: 1.0}), replace(BASE, presence_penalty=1.0)])
def test_a_token_outside_the_vocabulary_is_refused(params: SamplingParams) -> None:
    with pytest.raises(IndexError):
        distribution(torch.zeros(8), params, [8])


@pytest.mark.parametrize(
    ("params", "temperature_only"),
    [
        (GREEDY, True),
        (BASE, True),
        (replace(GREEDY, top_p=0.5, top_k=3, min_p=0.1), True),  # none of them removes the argmax
        (replace(BASE, top_p=0.5), False),
        (replace(BASE, top_k=3), False),
        (replace(BASE, min_p=0.1), False),
        (replace(GREEDY, repetition_penalty=1.1), False),
        (replace(GREEDY, presence_penalty=0.1), False),
        (replace(GREEDY, frequency_penalty=0.1), False),
        (replace(GREEDY, logit_bias={1: 1.0}), False),
    ],
)
def test_which_requests_need_nothing_but_temperature(params: SamplingParams, temperature_only: bool) -> None:
    assert has_options(params) != temperature_only


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
