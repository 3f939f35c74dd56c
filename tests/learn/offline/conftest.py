"""A trained draft that the tests of replay share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.live_traces import serve, some_requests
from support.replay_harness import asked
from support.tiny_models import random_draft, trained_draft

from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace


@pytest.fixture(scope="session")
def good_draft(target: Target) -> Eagle3Draft:
    """A draft trained on the answers to the prompts of `some_requests`.

    Traces keep states in bf16, so that a near tie between two proposals may be broken differently than in an engine;
    this draft has none along these answers.
    """
    answers = serve(target, None, some_requests(10, max_tokens=40))
    return trained_draft(target, torch.stack([trace.token_ids_T.long() for trace in answers]), steps=80)


@pytest.fixture(scope="session")
def stream(target: Target) -> list[Trace]:
    """A few prompts asked again and again, of two domains, answered by way of a draft that knows nothing."""
    return serve(target, random_draft(target), asked())


@pytest.fixture(scope="session")
def of_another_target() -> Callable[[Trace], Trace]:
    """A trace with states that are twice as wide."""
    states = ("aux_T3H", "last_TH")
    return lambda trace: replace(trace, **{name: torch.cat([getattr(trace, name)] * 2, -1) for name in states})
