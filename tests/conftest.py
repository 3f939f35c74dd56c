"""Fixtures for tests in more than one folder, and one CPU thread for all of them.

Tiny models run fastest on one thread, above all on a busy machine. The variable is set before torch is imported, so
that processes started by tests inherit it. A test that depends on the number of threads asks for `two_threads`.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the other worker's core

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aurora_lit.models.interface import Target

# Models are imported by the fixtures that need them: tests of settings and commands start without torch.


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let the garbage collector skip what is imported and thousands of collected tests, of which nothing is garbage: a
    full collection took a quarter of a second, which a test that measures a round took for the round's."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, for modules that define no other."""
    from support.tiny_models import save_model

    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    """The model in `folder`, in fp32."""
    from aurora_lit.models.loading import load_target

    return load_target(folder, precision="fp32")


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """torch computes with two threads while the module's tests run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
