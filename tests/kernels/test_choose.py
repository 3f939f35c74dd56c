"""Tokens chosen while the head's product is computed: those of torch, in the softmax's law, whatever is beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.kernel_formats import GROUPED, PER_OUTPUT, UNQUANTIZED
from torch import nn

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.modules.sampling.choice import choose
from aurora_lit.modules.sampling.noise import gumbel

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
FORMATS = [*UNQUANTIZED, *GROUPED, *PER_OUTPUT]
N = 40


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def head(outputs: int, weight_format: WeightFormat, *, inputs: int = 64, scale: float = 3.0) -> PackedLinear:
    torch.manual_seed(outputs)
    linear = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        linear.weight.normal_(std=scale * inputs**-0.5)
    return PackedLinear(linear, weight_format)


def mixed_draws(rows: int) -> dict[str, torch.Tensor]:
    """Greedy rows, rows at several temperatures, and dense rows whose numbers are not in the order of the rows."""
    row_N = torch.arange(rows)
    dense_N = torch.where(row_N % 5 == 4, (rows - 1 - row_N) // 5, -1)
    dense_N[dense_N >= 0] = dense_N[dense_N >= 0].argsort().argsort()
    return {
        "temperature_N": torch.tensor([0.0, 1.0, 0.3, 2.5, 1.0, 1e-5, 0.0])[row_N % 7],
        "key_N": (row_N - 20) * 0x123456789ABCDEF,
        "position_N": row_N * 31 % 17,
        "dense_N": dense_N,
    }


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("outputs", [1, 31, 33, 96, 1000, 5003])
def test_chosen_tokens_are_torchs_and_dense_rows_are_the_product(outputs: int, weight_format: WeightFormat) -> None:
    """Tokens may differ only where the two largest perturbed logits are equal up to rounding."""
    layer, x_NI, draws = head(outputs, weight_format), torch.randn(N, 64), mixed_draws(N)
    logits_NV = layer(x_NI)
    token_N, dense_DV = layer.choose(x_NI, **draws)
    dense_N, temperature_N = draws.pop("dense_N"), draws["temperature_N"]
    rows = (dense_N >= 0).nonzero()[:, 0]
    assert torch.equal(dense_DV[dense_N[rows]], logits_NV[rows])
    assert len(dense_DV) == len(rows)
    expected_N = choose(logits_NV, **draws)
    noise_NV = gumbel(draws["key_N"], draws["position_N"], torch.arange(outputs))
    perturbed_NV = logits_NV / temperature_N.clamp_min(1e-9)[:, None] + noise_NV
    for row in ((dense_N < 0) & (token_N != expected_N)).nonzero()[:, 0].tolist():
        assert temperature_N[row] > 0
        gap = perturbed_NV[row, expected_N[row]] - perturbed_NV[row, token_N[row]]
        assert abs(gap) < 1e-4 * max(1.0, perturbed_NV[row].abs().max().item() * 1e-2)
    assert (token_N == expected_N)[dense_N < 0].float().mean() > 0.9


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_choice_does_not_depend_on_rows_beside_it_or_on_threads(weight_format: WeightFormat, threads: int) -> None:
    layer, x_NI, draws = head(3001, weight_format), torch.randn(N, 64), mixed_draws(N)
    token_N, dense_DV = layer.choose(x_NI, **draws)
    torch.set_num_threads(3 - threads)
    assert_same(layer.choose(x_NI, **draws), (token_N, dense_DV), draws["dense_N"])
    for row in range(N):
        part = {name: value[row : row + 1].clone() for name, value in draws.items()}
        is_dense = bool(part["dense_N"] >= 0)
        part["dense_N"].clamp_(max=0)
        alone_1, dense_1V = layer.choose(x_NI[row : row + 1], **part)
        if is_dense:
            assert torch.equal(dense_1V[0], dense_DV[draws["dense_N"][row]])
        else:
            assert alone_1 == token_N[row]


def assert_same(
    ours: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], dense_N: torch.Tensor
) -> None:
    assert torch.equal(ours[0][dense_N < 0], expected[0][dense_N < 0])
    assert torch.equal(ours[1], expected[1])


def test_greedy_rows_alone_are_the_argmax_and_the_first_of_equal_outputs_is_chosen() -> None:
    linear, x_NI = nn.Linear(64, 96, bias=False), torch.randn(N, 64)
    with torch.no_grad():
        linear.weight[48:] = linear.weight[:48].clone()
    layer = PackedLinear(linear, WeightFormat.FP32)
    none_N = torch.full((N,), -1)
    draws = {"key_N": torch.arange(N), "position_N": torch.arange(N)}
    greedy_N, dense_DV = layer.choose(x_NI, temperature_N=torch.zeros(N), dense_N=none_N, **draws)
    assert torch.equal(greedy_N, layer.argmax(x_NI))
    assert dense_DV.shape == (0, 96)
    temperature_N = torch.arange(N) % 2.0
    token_N, _ = layer.choose(x_NI, temperature_N=temperature_N, dense_N=none_N, **draws)
    assert torch.equal(token_N[::2], greedy_N[::2])
    assert (token_N[::2] < 48).all()
    assert (token_N[1::2] >= 48).any(), "noise differs where logits do not"


@pytest.mark.parametrize(("varied", "temperature"), [("position_N", 0.7), ("key_N", 1.0)])
def test_chosen_tokens_have_the_softmaxs_law(varied: str, temperature: float) -> None:
    """Two million draws over positions of one key, or over keys at one position; 40 tokens, so two blocks."""
    layer = head(40, WeightFormat.FP32, inputs=4, scale=1.5)
    x_1I, count, rows = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(40), 100_000
    constant = {
        "key_N": torch.full((rows,), 5),
        "position_N": torch.full((rows,), 5),
        "dense_N": torch.full((rows,), -1),
    }
    for start in range(0, 2_000_000, rows):
        draws = constant | {varied: torch.arange(start, start + rows)}
        token_N, _ = layer.choose(x_1I.expand(rows, -1), temperature_N=torch.full((rows,), temperature), **draws)
        count += torch.bincount(token_N, minlength=40)
    expected = (layer(x_1I)[0].double() / temperature).softmax(-1) * count.sum()
    assert expected.min() > 20
    statistic = ((count - expected) ** 2 / expected).sum()
    assert (statistic - 39) / (2 * 39) ** 0.5 < 5
