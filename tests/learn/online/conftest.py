"""Traffic that the tests of the online learner share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.learner_harness import LearnerHarness, MakeHarness
from support.live_traces import serve, some_requests
from support.tiny_models import random_draft

from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace


@pytest.fixture
def make(target: Target, traffic: list[Trace], tmp_path: Path) -> MakeHarness:
    def make(folder: Path = tmp_path, **settings: Any) -> LearnerHarness:
        return LearnerHarness(target, folder, traffic=traffic, **settings)

    return make


@pytest.fixture(scope="session")
def traffic(target: Target) -> list[Trace]:
    """Few prompts asked often: what a draft of a random target can learn. Some requests draw."""
    asked = [*some_requests(10), *some_requests(4, seed=1, temperature=0.5)]
    requests = [replace(r, request_id=f"{n}-{r.request_id}") for n in range(4) for r in asked]
    return serve(target, random_draft(target), requests)
