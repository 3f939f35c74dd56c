"""Native noise is that of modules/sampling/noise.py."""

from __future__ import annotations

import ctypes

import pytest
import torch

from aurora_lit.kernels import native, sampler
from aurora_lit.modules.sampling.noise import _GOLDEN, _mix64, gumbel, noise_bits

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

DRAWS = [(0, 0), (1, 0), (-1, 7), (2**63 - 1, 2**40), (-(2**63), 1), (0x123456789ABCDEF, 4095)]


@pytest.mark.parametrize(("key", "position"), DRAWS)
def test_native_bits_equal_torchs_and_native_noise_is_close(key: int, position: int) -> None:
    rng = torch.Generator().manual_seed(key % 1000)
    token_id_V = torch.cat([torch.arange(100_003), torch.randint(0, 2**32, (5000,), generator=rng)])
    draw = torch.tensor([key]), torch.tensor([position])
    bits_V, noise_V = sampler.noise(key, position, token_id_V)
    assert torch.equal(bits_V, noise_bits(*draw, token_id_V)[0])
    assert (noise_V - gumbel(*draw, token_id_V)[0]).abs().max() < 1e-5


def token_with_bits(bits: int, key: int, position: int) -> int:
    """The token that a draw's hash takes to these bits: both steps of the hash, which is one-to-one, undone."""
    word = _mix64(_mix64(torch.tensor([key])) + torch.tensor([position + 1]) * _GOLDEN).item()
    low, high = int(word) % 2**32, int(word) // 2**32 % 2**32
    return unmixed((unmixed(bits) - high) % 2**32) ^ low


def unmixed(h: int) -> int:
    """The inverse of MurmurHash3's fmix32."""
    h = (h ^ h >> 16) * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h = (h ^ h >> 13 ^ h >> 26) * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize(("key", "position"), DRAWS)
def test_native_noise_is_torchs_for_the_extremes_of_the_hash(key: int, position: int) -> None:
    extremes = [0, 1, 127, 2**23 - 1, 2**24 + 1, 2**31, 2**32 - 256, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    token_id_V = torch.tensor([token_with_bits(bits, key, position) for bits in extremes])
    bits_V, noise_V = sampler.noise(key, position, token_id_V)
    assert bits_V.tolist() == extremes
    assert (noise_V - gumbel(torch.tensor([key]), torch.tensor([position]), token_id_V)[0]).abs().max() < 1e-5


def test_the_native_logarithm_is_accurate_to_three_in_ten_million() -> None:
    kernels = native.library()
    assert kernels is not None
    spread = torch.logspace(-37, 38, 1 << 16, dtype=torch.float64).float()
    near_one = 1 + torch.linspace(-0.3, 0.45, 1 << 16)
    x = torch.cat(
        [spread, near_one, torch.tensor([1.0, 2.0, 0.5, 2.0**-33, 1 - 2.0**-24, 1 + 2.0**-23, 10.0, 3.0] * 2)]
    )
    y = torch.empty_like(x)
    kernels.aurora_log(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(y.data_ptr()))
    expected = x.double().log()
    assert ((y - expected).abs() <= 3e-7 * expected.abs()).all()
