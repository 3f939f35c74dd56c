"""Prefill: how many prompt tokens a round computes beside decoding sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.prefill import Prefill
from aurora_lit.serve.sequences.sequence import EngineStats, RunningSequence


def make_prefill(num_prefilling: int, *, token_s: float = 0.0005, adaptive: bool = True) -> Prefill:
    nothing: Any = None
    prefill = Prefill(
        nothing, nothing, nothing, tokens_SL=torch.zeros(1, 1), chunk_tokens=256, adaptive=adaptive, stats=EngineStats()
    )
    prefill._token_s = token_s
    asked = Request(request_id="a", prompt_ids=(1,) * 600, params=SamplingParams(max_tokens=1))
    prefill.sequences.extend(
        RunningSequence(request=asked, slot=0, acceptance_rate=0.5, prompt_length=600, length=600)
        for _ in range(num_prefilling)
    )
    return prefill


@pytest.mark.parametrize(
    ("num_prefilling", "num_decoding", "changes", "tokens"),
    [
        (1, 0, {}, 256),  # no sequence decodes
        (4, 4, {}, 80),  # as long as a round: 40 ms at 0.5 ms a token
        (6, 2, {}, 240),  # three times as long
        (7, 1, {}, 256),  # never more than a chunk
        (1, 7, {}, 64),  # never less than a quarter
        (7, 1, {"adaptive": False}, 64),
        (7, 1, {"token_s": 0.0}, 64),  # nothing measured yet
    ],
)
def test_prefilling_sequences_get_their_share_of_time(
    num_prefilling: int, num_decoding: int, changes: dict[str, Any], tokens: int
) -> None:
    assert make_prefill(num_prefilling, **changes)._chunk_budget(num_decoding, 0.040) == tokens
