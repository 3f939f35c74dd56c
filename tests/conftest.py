"""One thread for tiny models: two would mostly wait for each other, on a busy machine most of all.

Where the number of threads matters, a test asks for it (`two_threads`). Set before torch is imported, so that processes
that tests start have it too.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_model

from aurora_lit.models.target import Target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, for modules that have no other."""
    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return Target.load(folder, precision="fp32")


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
