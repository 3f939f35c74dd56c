"""A target's own token with a request's options: native choices equal torch's, in the law of distribution.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toy_sampling import BASE, OPTIONS, PROMPT, Toy, reference_p

from aurora_lit.kernels import native, sampler
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.sampler import DenseRows
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.modules.sampling import choice
from aurora_lit.modules.sampling.choice import choose, choose_dense, choose_dense_in_torch
from aurora_lit.modules.sampling.distribution import is_greedy
from aurora_lit.request import SamplingParams

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")


def slow(value: Any) -> Any:
    """A case that CI tries."""
    return pytest.param(value, marks=pytest.mark.slow)


def temperature_of(params: SamplingParams) -> float:
    return 0.0 if is_greedy(params) else params.temperature


def draws_of(params: list[SamplingParams], *, first: int = 0) -> dict[str, torch.Tensor]:
    D = len(params)
    return {
        "temperature_D": torch.tensor([temperature_of(p) for p in params]),
        "key_D": torch.arange(first, first + D) * 7919,
        "position_D": torch.arange(D) % 13,
    }


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    """Each option is set in about a third of the requests."""

    def maybe(value: float, off: float) -> float:
        return value if rng.random() < 0.35 else off

    return SamplingParams(
        max_tokens=1,
        temperature=maybe(0.0, rng.choice([0.05, 0.3, 1.0, 1.7])),
        top_k=int(maybe(rng.choice([1, 2, 5, 50, 2 * vocab]), 0)),
        top_p=maybe(rng.choice([1e-6, 0.3, 0.9, 0.999, 0.99999]), 1.0),
        min_p=maybe(rng.choice([1.0, 0.2, 0.01]), 0.0),
        repetition_penalty=maybe(rng.choice([0.8, 1.3]), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias={rng.randrange(vocab): rng.uniform(-5, 5) for _ in range(5)} if rng.random() < 0.3 else {},
    )


def random_rows(vocab: int, *, seed: int, rows: int = 60) -> tuple[torch.Tensor, dict[str, object]]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    params = [random_params(rng, vocab) for _ in range(rows)]
    lengths = [rng.randrange(40) for _ in range(rows)]
    of_rows = {
        "params": params,
        "contexts": [torch.randint(0, vocab, (length,), generator=generator) for length in lengths],
        "prompt_lengths": [rng.randint(0, length) for length in lengths],
    }
    return torch.randn(rows, vocab, generator=generator) * 4, of_rows | draws_of(params)


@needs_kernels
@pytest.mark.parametrize(("vocab", "seed"), itertools.product([1, 15, 33, 1000, 20_001], range(5)))
def test_native_choices_with_options_equal_torchs(vocab: int, seed: int) -> None:
    """But for thresholds that rounding moves past a token, and for perturbed logits equal up to rounding: rare."""
    logits_DV, of_rows = random_rows(vocab, seed=seed)
    expected_D = choose_dense_in_torch(logits_DV.clone(), DenseRows(**of_rows))
    assert (sampler.choose_dense(logits_DV.clone(), DenseRows(**of_rows)) != expected_D).sum() <= 1


@needs_kernels
def test_native_choices_do_not_depend_on_rows_beside_them_or_on_threads() -> None:
    logits_DV, of_rows = random_rows(1000, seed=3)
    together_D = sampler.choose_dense(logits_DV.clone(), DenseRows(**of_rows))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert torch.equal(sampler.choose_dense(logits_DV.clone(), DenseRows(**of_rows)), together_D)
    finally:
        torch.set_num_threads(before)
    for row in range(len(logits_DV)):
        part = {name: value[row : row + 1] for name, value in of_rows.items()}  # type: ignore[index]
        assert sampler.choose_dense(logits_DV[row : row + 1].clone(), DenseRows(**part)) == together_D[row]


@needs_kernels
@pytest.mark.parametrize("temperature", [slow(0.3), 1.0, slow(2.0)])
@pytest.mark.parametrize("option", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.7}])
def test_exactly_the_tokens_that_the_options_keep_are_drawn(option: dict[str, float], temperature: float) -> None:
    """Of forty tokens, some equal, so that ties are kept; the support and the law are those of the definition."""
    logits_V = (torch.randn(40, generator=torch.Generator().manual_seed(4)) * 2).round(decimals=0)
    assert_support_and_law(logits_V, replace(BASE, temperature=temperature, **option))


@needs_kernels
@pytest.mark.parametrize(
    "option",
    [
        {"top_p": 0.5},
        {"top_k": 21},
        *(slow({"top_p": p}) for p in (0.2, 0.9)),
        *(slow({"top_k": k}) for k in (1, 2, 22, 40)),
    ],
)
@pytest.mark.parametrize("min_p", [0.0, 0.5148])
def test_thresholds_are_exact_among_nearly_equal_probabilities(min_p: float, option: dict[str, float]) -> None:
    """Fifty-nine of sixty tokens have weights in one bin of csrc/sampler.hpp, and min-p lies between them."""
    weights = torch.cat([torch.tensor([1.0]), 0.515 + 0.0006 * torch.arange(20), 0.5 + 0.0003 * torch.arange(39)])
    params = replace(BASE, min_p=min_p, **option)
    assert_support_and_law(weights.log()[torch.randperm(60, generator=torch.Generator().manual_seed(1))], params)


@needs_kernels
@pytest.mark.parametrize("num_kept", [slow(1), 2, slow(5), 9])
@pytest.mark.parametrize("factor", [0.995, 1.005])
def test_top_p_ends_where_it_must_between_bins(num_kept: int, factor: float) -> None:
    """Each token has a bin of csrc/sampler.hpp of its own, and top-p is hardly less or more than some of them hold."""
    weights = 0.75 ** torch.arange(11.0)
    top_p = factor * float(weights[:num_kept].sum() / weights.sum())
    assert_support_and_law(weights.log(), replace(BASE, top_p=top_p))


def assert_support_and_law(logits_V: torch.Tensor, params: SamplingParams) -> None:
    draws, V = 60_000, len(logits_V)
    no_context = torch.empty(0, dtype=torch.int64)
    of_rows = {"params": [params] * draws, "contexts": [no_context] * draws, "prompt_lengths": [0] * draws}
    count = torch.bincount(
        sampler.choose_dense(logits_V.repeat(draws, 1), DenseRows(**of_rows, **draws_of([params] * draws))), minlength=V
    )
    p_V = with_ties(logits_V, params)
    assert torch.equal(count > 0, p_V * draws > 12), "with so many draws every likely token occurs"
    assert (p_V * draws > 12).sum() == (p_V > 0).sum(), "every kept token is likely enough"
    assert in_law(count, p_V)


def with_ties(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The definition's distribution, where tokens as likely as the last one that is kept are kept too."""
    p_V = (logits_V.double() / params.temperature).softmax(-1)
    least = params.min_p * p_V.max()
    if params.top_k:
        least = torch.maximum(least, p_V.sort(descending=True).values[params.top_k - 1])
    kept = p_V[p_V >= least - 1e-12].sort(descending=True).values
    before = kept.cumsum(0) - kept
    least = torch.maximum(least, kept[before < params.top_p * kept.sum()].min())
    return torch.where(p_V >= least - 1e-12, p_V, 0)


def in_law(count: torch.Tensor, p: torch.Tensor) -> bool:
    """Pearson's statistic lies less than five standard deviations above its mean, over tokens of positive p."""
    expected = p[p > 0] / p.sum() * count.sum()
    freedom = max(1, len(expected) - 1)
    statistic = ((count[p > 0] - expected) ** 2 / expected).sum()
    return bool((statistic - freedom) / (2 * freedom) ** 0.5 < 5) and not bool((count[p == 0] > 0).any())


def after_repetitions(params: SamplingParams, *, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Logits of one token and its probabilities by a definition that is written down option by option; equal rows."""
    logits_V, output = Toy.random(V=6, seed=1, dtype=torch.float32).target[0], (1, 4, 1)
    of_rows = {
        "params": [params] * rows,
        "contexts": [torch.tensor([*PROMPT, *output])] * rows,
        "prompt_lengths": [len(PROMPT)] * rows,
    }
    p_V = torch.tensor(reference_p(logits_V, params, output=output), dtype=torch.float64)
    return logits_V.repeat(rows, 1), p_V, of_rows | draws_of([params] * rows)


@needs_kernels
@pytest.mark.parametrize("name", OPTIONS)
def test_native_draws_have_every_options_law(name: str) -> None:
    logits_DV, p_V, of_rows = after_repetitions(OPTIONS[name], rows=40_000)
    assert in_law(torch.bincount(sampler.choose_dense(logits_DV, DenseRows(**of_rows)), minlength=6), p_V)


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_draws_from_every_options_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that `choose` draws from, which gives the fused choice's tokens (below)."""
    drawn_from: list[torch.Tensor] = []

    def recorded(logits_NV: torch.Tensor, **draws: torch.Tensor) -> torch.Tensor:
        drawn_from.append((logits_NV.double() / draws["temperature_N"][:, None]).softmax(-1))
        return choose(logits_NV, **draws)

    logits_DV, p_V, of_rows = after_repetitions(OPTIONS[name], rows=2)
    monkeypatch.setattr(choice, "choose", recorded)
    choose_dense_in_torch(logits_DV, DenseRows(**of_rows))
    (p_DV,) = drawn_from
    assert torch.allclose(p_DV, p_V.expand(2, -1), rtol=1e-5, atol=1e-12)


@needs_kernels
def test_a_row_without_options_gets_the_token_of_the_fused_choice() -> None:
    """A request gets the same tokens whether its logits are stored, for log-probabilities, or not."""
    torch.manual_seed(0)
    layer, x_NI = PackedLinear(torch.nn.Linear(64, 3001, bias=False), WeightFormat.FP32), torch.randn(300, 64) * 5
    params = [replace(BASE, temperature=t) for t in (0.0, 1.0, 0.01, 0.5)] * 75
    temperature_N, key_N, position_N = draws_of(params).values()
    fused = {"temperature_N": temperature_N, "key_N": key_N, "position_N": position_N}
    token_N, _ = layer.choose(x_NI, **fused, dense_N=torch.full((300,), -1))
    of_rows = {"params": params, "contexts": [torch.empty(0)] * 300, "prompt_lengths": [0] * 300}
    assert torch.equal(choose_dense(layer(x_NI), DenseRows(**of_rows, **draws_of(params))), token_N)
    assert (choose(layer(x_NI), **fused) == token_N).float().mean() > 0.99


@needs_kernels
@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.5}, {}])
def test_logits_that_are_infinite_or_no_numbers_choose_some_token(option: dict[str, float]) -> None:
    infinity = float("inf")
    logits_DV = torch.zeros(5, 40)
    logits_DV[0], logits_DV[1], logits_DV[2, ::2], logits_DV[3, 7] = float("nan"), -infinity, float("nan"), infinity
    logits_DV[4, 1:] = -infinity
    params = [replace(BASE, **option)] * 5
    of_rows = {"params": params, "contexts": [torch.empty(0)] * 5, "prompt_lengths": [0] * 5}
    token_D = choose_dense(logits_DV, DenseRows(**of_rows, **draws_of(params)))
    assert ((token_D >= 0) & (token_D < 40)).all()
    assert token_D[4] == 0


@needs_kernels
def test_a_bias_is_converted_once_for_all_columns_of_its_request() -> None:
    reads: list[int] = []

    class Read(dict[int, float]):
        def values(self) -> Any:
            reads.append(len(self))
            return super().values()

    long, short = (replace(BASE, temperature=0.0, logit_bias=Read({t: 50.0 for t in ts})) for ts in ((3, 5), (7,)))
    params = [long, long, short, long, BASE, short]
    of_rows = {"params": params, "contexts": [torch.empty(0)] * 6, "prompt_lengths": [0] * 6} | draws_of(params)
    logits_DV = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    token_D = sampler.choose_dense(logits_DV.clone(), DenseRows(**of_rows))
    assert sorted(reads) == [1, 2]
    assert torch.equal(token_D, choose_dense_in_torch(logits_DV.clone(), DenseRows(**of_rows)))
    assert set(token_D[[0, 1, 3]].tolist()) <= {3, 5}
    assert token_D[[2, 5]].tolist() == [7, 7]


@needs_kernels
def test_a_token_outside_the_vocabulary_is_refused() -> None:
    row = {"contexts": [torch.tensor([3])], "prompt_lengths": [0]}
    for params, vocab in ((replace(BASE, logit_bias={9: 1.0}), 9), (replace(BASE, presence_penalty=1.0), 3)):
        with pytest.raises(IndexError, match="not in the vocabulary"):
            choose_dense(torch.zeros(1, vocab), DenseRows(params=[params], **row, **draws_of([params])))


def test_torch_chooses_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_DV, of_rows = random_rows(1000, seed=1)
    expected_D = choose_dense_in_torch(logits_DV.clone(), DenseRows(**of_rows))
    monkeypatch.setattr(choice.native, "library", lambda: None)
    assert torch.equal(choose_dense(logits_DV.clone(), DenseRows(**of_rows)), expected_D)
