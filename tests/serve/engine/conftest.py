"""A tiny target and a draft for it, for files that bring none of their own."""

from __future__ import annotations

import pytest
from support.tiny_models import random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return load_target(folder, precision="bf16" if native.library() is not None else "fp32")


@pytest.fixture(scope="module")
def draft(target: Target) -> Eagle3Draft:
    return random_draft(target)
