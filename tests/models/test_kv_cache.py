"""Memory of the KV cache grows with what is written, and never changes what is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from aurora_lit.models.kv_cache import KVCache, zeros


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_short_sequences_in_every_slot_take_a_fraction_of_the_slots_memory() -> None:
    before = resident_bytes()
    cache = KVCache(num_layers=8, num_slots=8, num_kv_heads=4, head_dim=64, capacity=2048, dtype=torch.bfloat16)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in [*cache.keys_SGCDP, *cache.values_SGLD])
    assert resident_bytes() - before < 0.02 * whole
    for keys_SGCDP, values_SGLD in zip(cache.keys_SGCDP, cache.values_SGLD, strict=True):
        keys_SGCDP[:, :, :2] = 1.0
        values_SGLD[:, :, :128] = 1.0
    taken = resident_bytes() - before
    assert 0.05 * whole < taken < 0.09 * whole, taken / whole  # 128 of 2,048 positions are 0.0625


def test_what_was_never_written_is_zero_and_what_was_written_stays() -> None:
    tensor = zeros((4, 3, 1 << 18), torch.bfloat16, "cpu")
    assert not tensor[2].any()
    tensor[1, 1, 5:900] = 2.0
    assert float(tensor.float().sum()) == 2.0 * 895
    assert torch.equal(tensor[1, 1, 5:900], torch.full((895,), 2.0, dtype=torch.bfloat16))
