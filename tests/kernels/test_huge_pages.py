"""Memory of growing tensors is taken where they are written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from aurora_lit.kernels import huge_pages


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
