"""Gumbel noise and the tokens it draws."""

import pytest
import torch

from aurora_lit.modules.sampling import noise
from aurora_lit.modules.sampling.noise import gumbel, noise_bits


def chi_square(count: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic, in standard deviations above its mean under the law p."""
    expected = p.double() / p.sum() * count.sum()
    freedom = len(p) - 1
    return float((((count - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


LOGITS = torch.tensor([2.0, 1.5, -3.0, 0.0, 0.7, 1.9, -1.0, 0.2])


@pytest.mark.parametrize(
    ("varied", "draws"),
    [("position", 400_000), pytest.param("position", 2_000_000, marks=pytest.mark.slow), ("key", 400_000)],
)
def test_the_argmax_of_logits_plus_noise_has_the_softmaxs_law(varied: str, draws: int) -> None:
    """Over positions of one key, or consecutive keys at one position, of which test_sampling_law.py has two million."""
    count = torch.zeros(len(LOGITS))
    for start in range(0, draws, 200_000):
        varied_N, fixed_N = torch.arange(start, start + 200_000), torch.full((200_000,), 3)
        key_N, position_N = (fixed_N, varied_N) if varied == "position" else (varied_N, fixed_N)
        chosen_N = (LOGITS + gumbel(key_N, position_N, torch.arange(8))).argmax(-1)
        count += torch.bincount(chosen_N, minlength=8)
    assert chi_square(count, LOGITS.softmax(-1)) < 5


def test_noise_has_gumbels_law_and_its_bounds() -> None:
    values = gumbel(torch.arange(1000), torch.zeros(1000, dtype=torch.int64), torch.arange(1000)).flatten()
    assert values.min() > -2.9
    assert values.max() < 22.9
    u = torch.exp(-torch.exp(-values.double()))  # the distribution function
    assert chi_square(torch.bincount((u * 100).long(), minlength=100), torch.ones(100)) < 5


def test_noise_is_finite_for_every_extreme_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.tensor([[0, 1, 2**31, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(noise, "noise_bits", lambda *_: bits)
    zero_1 = torch.zeros(1, dtype=torch.int64)
    expected = [22.8739, 21.7753, 0.3665, -2.8115, -2.8115]
    assert gumbel(zero_1, zero_1, zero_1)[0].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "neighbour", ["position", *(pytest.param(each, marks=pytest.mark.slow) for each in ("token", "key"))]
)
def test_neighbouring_noise_is_independent(neighbour: str) -> None:
    """Chi-square of two million pairs of cells on a 16 x 16 grid, from high bits and from low bits of the hash."""
    key_N, position_N, token_V = torch.arange(1000) * 7, torch.arange(1000) % 50, torch.arange(0, 4000, 2)
    first = noise_bits(key_N, position_N, token_V)
    second = noise_bits(
        key_N + (neighbour == "key"), position_N + (neighbour == "position"), token_V + (neighbour == "token")
    )
    for shift in (28, 0):
        cells = ((first >> shift) % 16 * 16 + (second >> shift) % 16).flatten()
        assert chi_square(torch.bincount(cells, minlength=256), torch.ones(256)) < 5


def test_choices_at_neighbouring_positions_are_independent() -> None:
    chosen_N = (LOGITS + gumbel(torch.full((400_000,), 11), torch.arange(400_000), torch.arange(8))).argmax(-1)
    p = LOGITS.softmax(-1)
    pairs = torch.bincount(chosen_N[:-1] * 8 + chosen_N[1:], minlength=64)
    assert chi_square(pairs, torch.outer(p, p).flatten()) < 5
