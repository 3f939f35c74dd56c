"""A tiny target that all tests of learning share, its head, a draft trained on it, and traces of that draft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.live_traces import serve, some_requests
from support.tiny_models import save_model, trained_draft

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online import intake
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace


@pytest.fixture(autouse=True)
def looping_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Are learned from: those of a random target loop."""
    monkeypatch.setattr(intake, "MAX_REPEATED_SHARE", 1.0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="session")
def target(folder: Path) -> Target:
    return load_target(folder, precision="fp32")


@pytest.fixture(scope="session")
def target_head(target: Target) -> TargetHead:
    return TargetHead(target)


@pytest.fixture(scope="session")
def taught_draft(target: Target) -> Eagle3Draft:
    """A draft that has seen the answers it is asked for, so that some proposals are accepted and some are not."""
    traces = serve(target, None, some_requests(12))
    ids_BT = torch.stack([trace.token_ids_T.long() for trace in traces])
    return trained_draft(target, ids_BT, steps=40)


@pytest.fixture(scope="session")
def served(target: Target, taught_draft: Eagle3Draft) -> list[Trace]:
    """Greedy and sampled requests, with a seed and without."""
    requests = [
        *some_requests(4, seed=1),
        *some_requests(3, seed=2, temperature=0.8, domain="unseeded"),
        *some_requests(3, seed=3, temperature=0.7, domain="seeded"),
    ]
    requests = [replace(r, params=replace(r.params, seed=5)) if r.domain == "seeded" else r for r in requests]
    return serve(target, taught_draft, requests)
