"""Text is cut into pieces, and every position is labelled with the target's own distribution."""

from __future__ import annotations

import torch
from support.tiny_models import (
    VOCAB,
)

from aurora_lit.learn.pretrain.record_text import record_pieces
from aurora_lit.models.target import Target
from aurora_lit.traces.record import Trace


def check_trace(target: Target, trace: Trace) -> None:
    with torch.no_grad():
        aux, last = target.forward_uncached(trace.token_ids_T.long()[None])
    rounding = {"atol": 1e-4, "rtol": 2**-8}  # traces are bf16
    torch.testing.assert_close(trace.aux_T3H.float(), aux[0], **rounding)
    torch.testing.assert_close(trace.last_TH.float(), last[0], **rounding)


def test_labelled_text_has_the_targets_states_without_padding(target: Target) -> None:
    gen = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, VOCAB, (n,), generator=gen).tolist() for n in (20, 33, 16)]
    traces = record_pieces(target, pieces, domain="text")
    for trace, piece in zip(traces, pieces, strict=True):
        assert trace.token_ids_T.tolist() == piece
        assert (trace.domain, trace.answer_start) == ("text", len(piece))
        check_trace(target, trace)
