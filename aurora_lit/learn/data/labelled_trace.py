"""A trace with what the target's head computes for it, which is what training and the gate need of the target.

Leaves out padding such traces together (learn/data/online_batch.py) and which of them a batch takes
(learn/data/online_batcher.py).

Shapes: T positions of a trace, R rounds of a trace, N rejected positions of it, X rows of the head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.traces.record import ROUND_FIELDS, Trace

CONTEXT_COST = 0.25
"""Of a position before those that are trained on, as a share of that of one of these: only its key and value are
computed, without gradient (`StepwiseChains`)."""


@dataclass(frozen=True, kw_only=True)
class LabelledTrace:
    """A trace and what the target's head computes for it; positions that are not trained on hold 0."""

    trace: Trace
    tempered_lse_T: Tensor
    """fp32. Log-sum-exp of the logits at the request's temperature."""
    top_T: Tensor
    """int64. The target's first choice; within a greedy answer, the token that follows."""
    rejected_tempered_lse_N: Tensor
    """The same two after rejected proposals; 0 in rounds that do not explore, which the policy loss does not use."""
    rejected_top_N: Tensor


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
    kept_N = torch.repeat_interleave(kept_R, trace.num_rejected_R)
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
        rejected_last_NH=trace.rejected_last_NH[kept_N],
        **rounds,
    )


def label_traces(traces: Sequence[Trace], target_head: TargetHead) -> list[LabelledTrace]:
    """Apply the head to traces: at the positions that are trained on, and after rejected proposals that explored.

    Many traces in one call cost less than one at a time (`TargetHead.evaluate`).
    """
    hidden, temperatures, with_top = [], [], []
    for trace in traces:
        start = first_trained_position(trace)
        hidden.append(torch.cat([trace.last_TH[start:], trace.rejected_last_NH[_is_drawn(trace)]]))
        temperatures.append(torch.full((len(hidden[-1]),), trace.temperature))
        # Greedy answers are their first choices: penalties, a bias or a near tie may make these differ from the head's.
        known = len(trace.token_ids_T) - start - 1 if trace.verify == "greedy" else 0
        with_top.append(torch.arange(len(hidden[-1])) >= known)
    if not traces:
        return []
    output = target_head.evaluate(torch.cat(hidden), temperature=torch.cat(temperatures), with_top=torch.cat(with_top))
    sizes = [len(each) for each in hidden]
    columns = [torch.split(each, sizes) for each in (output.tempered_lse_N, output.top_N)]
    return [_labelled(trace, *of_trace) for trace, *of_trace in zip(traces, *columns, strict=True)]


def _is_drawn(trace: Trace) -> Tensor:
    """Which rejected positions are of rounds that explored [N]."""
    return torch.repeat_interleave(trace.explored_R, trace.num_rejected_R)


def _labelled(trace: Trace, tempered_X: Tensor, top_X: Tensor) -> LabelledTrace:
    """A trace with what the head says of its trained positions and then of its drawn ones."""
    start, length, is_drawn_N = first_trained_position(trace), len(trace.token_ids_T), _is_drawn(trace)
    trained = length - start
    top_T = pad(top_X[:trained], (start, 0))
    if trace.verify == "greedy":
        top_T[start:-1] = trace.token_ids_T[start + 1 :].long()
    rejected_tempered_N, rejected_top_N = torch.zeros(len(is_drawn_N)), torch.zeros(len(is_drawn_N), dtype=torch.int64)
    rejected_tempered_N[is_drawn_N], rejected_top_N[is_drawn_N] = tempered_X[trained:], top_X[trained:]
    return LabelledTrace(
        trace=trace,
        tempered_lse_T=pad(tempered_X[:trained], (start, 0)),
        top_T=top_T,
        rejected_tempered_lse_N=rejected_tempered_N,
        rejected_top_N=rejected_top_N,
    )


def label_for_batch(traces: Sequence[Trace], target_head: TargetHead) -> list[LabelledTrace]:
    """Label those traces that the policy loss can use; of others a step needs no labels, and they hold 0.

    The supervised loss takes the target's distribution within the draft vocabulary, for which the whole head is not
    needed.
    """
    wanted = iter(label_traces([trace for trace in traces if trace.explored_R.any()], target_head))
    return [next(wanted) if trace.explored_R.any() else unlabelled(trace) for trace in traces]


def unlabelled(trace: Trace) -> LabelledTrace:
    """A trace whose labels are 0."""
    zeros_T, zeros_N = torch.zeros(len(trace.token_ids_T)), torch.zeros(len(trace.rejected_last_NH))
    return LabelledTrace(
        trace=trace,
        tempered_lse_T=zeros_T,
        top_T=zeros_T.long(),
        rejected_tempered_lse_N=zeros_N,
        rejected_top_N=zeros_N.long(),
    )
