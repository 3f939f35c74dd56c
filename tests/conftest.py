"""One thread for tiny models: two would mostly wait for each other, on a busy machine most of all.

Where the number of threads matters, a test asks for it (`two_threads`). Set before torch is imported, so that processes
that tests start have it too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
