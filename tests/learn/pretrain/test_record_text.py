"""Text is cut into pieces, and the target's states at every position are recorded."""

from __future__ import annotations

import torch
from support.live_traces import check_trace
from support.tiny_models import (
    VOCAB,
)

from aurora_lit.learn.pretrain.record_text import record_pieces
from aurora_lit.models.interface import Target


def test_recorded_text_has_the_targets_states_without_padding(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, VOCAB, (n,), generator=gen).tolist() for n in (20, 33, 16)]
    traces = record_pieces(target, pieces, domain="text")
    assert sorted(trace.token_ids_T.tolist() for trace in traces) == sorted(pieces)
    for trace in traces:
        assert (trace.domain, trace.answer_start) == ("text", len(trace.token_ids_T))
        check_trace(target, trace)
