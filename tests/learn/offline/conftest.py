"""A trained draft that the tests of replay share."""

from __future__ import annotations

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import trained_draft

from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


@pytest.fixture(scope="session")
def good_draft(target: Target) -> Eagle3Draft:
    """A draft trained on the answers to the prompts of `some_requests`.

    Traces keep states in bf16, so that a near tie between two proposals may be broken differently than in an engine;
    this draft has none along these answers.
    """
    answers = serve(target, None, some_requests(10, max_tokens=40))
    return trained_draft(target, torch.stack([trace.token_ids_T.long() for trace in answers]), steps=80)
