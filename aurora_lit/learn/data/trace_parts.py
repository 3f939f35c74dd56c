"""What of a trace is trained on, and parts of traces: the last positions, pieces of a long one.

Leaves out padding traces together (learn/data/collate.py) and which of them a batch takes
(learn/data/online_batcher.py).

Shapes: T positions of a trace, R rounds of a trace.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.traces.record import ROUND_FIELDS, Trace

CONTEXT_COST = 0.25
"""Of a position before those that are trained on, as a share of that of one of these: only its key and value are
computed, without gradient (`StepwiseChains`)."""


def first_trained_position(trace: Trace) -> int:
    """The first position whose distribution is trained on: the one before the answer's first token; T if none is.

    All of a text without an answer is trained on, and nothing of a prompt without an answer.
    """
    length = len(trace.token_ids_T)
    if trace.answer_start == length:
        return 0 if trace.verify == "read" else length
    return max(0, trace.answer_start - 1)


def trained_positions(trace: Trace) -> int:
    """How many of its positions are trained on."""
    return len(trace.token_ids_T) - first_trained_position(trace)


def batch_size(traces: Sequence[Trace]) -> int:
    """Size of a batch of these traces, in positions that are trained on: others count by what they cost."""
    trained = sum(map(trained_positions, traces))
    context = sum(first_trained_position(trace) for trace in traces)
    return trained + int(CONTEXT_COST * context)


def is_compatible(trace: Trace, target_head: TargetHead) -> bool:
    """True if the trace can be of this target: the same hidden size, and token ids within its vocabulary."""
    highest = int(trace.token_ids_T.max())
    if trace.proposal_RK.numel():
        highest = max(highest, int(trace.proposal_RK.max()))
    same_width = (
        trace.aux_T3H.shape[1] == 3 * target_head.hidden_size and trace.last_TH.shape[1] == target_head.hidden_size
    )
    return same_width and highest < target_head.vocab_size


def crop(trace: Trace, max_length: int) -> Trace:
    """The last `max_length` positions of a trace; rounds whose root lies before them are dropped."""
    begin, end = len(trace.token_ids_T) - max_length, len(trace.token_ids_T)
    if begin <= 0:
        return trace
    answer_start = max(0, trace.answer_start - begin)
    return _part(trace, begin, end, answer_start=answer_start, kept_R=trace.round_root_R >= begin)


def pieces_of(trace: Trace, *, most_trained: int, most_context: int) -> list[Trace]:
    """The trace in pieces of about equal length, that together are trained on at the same positions.

    Each has at most `most_trained` of them, and up to `most_context` positions before. A round is part of the piece
    that has its root and all that it accepted; one that reaches into the next piece is dropped.
    """
    start, end = first_trained_position(trace), len(trace.token_ids_T)
    number = -(-(end - start) // most_trained)
    if number <= 1:
        return [crop(trace, end - start + most_context)]
    borders = [start + (end - start) * i // number for i in range(number + 1)]
    return [_piece(trace, *each, most_context=most_context) for each in itertools.pairwise(borders)]


def _piece(trace: Trace, first: int, last: int, *, most_context: int) -> Trace:
    """What is trained on at positions first, …, last - 1, and what comes before."""
    begin = max(0, first - most_context)
    kept_R = (trace.round_root_R >= first) & (trace.round_root_R + trace.num_accepted_R < last)
    return _part(trace, begin, last, answer_start=first + 1 - begin, kept_R=kept_R)


def _part(trace: Trace, begin: int, end: int, *, answer_start: int, kept_R: Tensor) -> Trace:
    """The positions begin, …, end - 1, with some of the rounds."""
    rounds = {name: getattr(trace, name)[kept_R] for name in ROUND_FIELDS}
    rounds["round_root_R"] = rounds["round_root_R"] - begin
    return replace(
        trace,
        first_position=trace.first_position + begin,
        answer_start=answer_start,
        token_ids_T=trace.token_ids_T[begin:end],
        aux_T3H=trace.aux_T3H[begin:end],
        last_TH=trace.last_TH[begin:end],
        lse_T=None if trace.lse_T is None else trace.lse_T[begin:end],
        **rounds,
    )
