"""Memory of growing tensors is taken where they are written."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_lit.kernels import huge_pages
from aurora_lit.models.kv_cache import KVCache


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_growing_tensor_takes_the_memory_that_was_written() -> None:
    before = resident_bytes()
    tensor = huge_pages.growing((8, 2048, 2048), torch.bfloat16)  # 64 MiB
    assert resident_bytes() - before < 4 << 20
    tensor[:, :128] = 1.0
    assert 3 << 20 < resident_bytes() - before < 8 << 20


def test_what_was_never_written_is_zero_and_what_was_written_stays() -> None:
    tensor = huge_pages.growing((4, 3, 1 << 18), torch.bfloat16)
    tensor[1, 1, 5:900] = 2.0
    assert float(tensor.float().sum()) == 2.0 * 895
    assert torch.equal(tensor[1, 1, 5:900], torch.full((895,), 2.0, dtype=torch.bfloat16))


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_a_cache_of_short_slots_takes_its_page_faults_before_anybody_writes() -> None:
    sizes: dict[str, Any] = {"num_layers": 4, "num_slots": 8, "num_kv_heads": 2, "head_dim": 64, "capacity": 4096}
    for is_counted in (False, True):  # in the first turn torch's own code takes page faults
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        cache = KVCache(**sizes, dtype=torch.bfloat16)  # 8 MiB of keys and 8 MiB of values a layer
        made = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for tensor in (*cache.keys_SGCQPE, *cache.values_SGMDE):
            assert not tensor.any()
            tensor += 1
        written = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        assert not is_counted or made - before >= 32, "pages of 2 MiB"
        assert not is_counted or written - made < 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cache_of_long_slots_takes_memory_as_they_fill() -> None:
    """On huge pages the first position of each head would take all of it."""
    before = resident_bytes()
    cache = KVCache(num_layers=2, num_slots=8, num_kv_heads=2, head_dim=64, capacity=16384, dtype=torch.bfloat16)
    assert resident_bytes() - before < 4 << 20, "of 128 MiB"
    for keys_SGCQPE, values_SGMDE in zip(cache.keys_SGCQPE, cache.values_SGMDE, strict=True):
        keys_SGCQPE[:, :, : 256 // keys_SGCQPE.shape[-2]] = 1.0
        values_SGMDE[:, :, : 256 // values_SGMDE.shape[-1]] = 1.0
    assert 2 << 20 <= resident_bytes() - before < 6 << 20, "256 positions of every slot"
