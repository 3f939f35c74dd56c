"""A trained draft that the tests of replay share."""

from __future__ import annotations

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import trained_draft

from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


@pytest.fixture(scope="session")
def good_draft(target: Target) -> Eagle3Draft:
    """A draft trained on the answers to the prompts of `some_requests`.

    With two threads, since traces keep states in bf16 and this draft has no near ties along these answers.
    """
    answers = serve(target, None, some_requests(10, max_tokens=40))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return trained_draft(target, torch.stack([trace.token_ids_T.long() for trace in answers]))
    finally:
        torch.set_num_threads(before)
