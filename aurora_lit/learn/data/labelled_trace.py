"""What a draft module trains on: traces cropped, labelled by the target's head, and padded together with their rounds.

Leaves out which traces a batch takes (learn/data/online_batcher.py) and the losses (modules/losses/draft_module.py).

Shapes: T positions of a trace, B rows, R rounds of a trace, N rejected positions of it, Q drafted rounds of all rows,
K proposals of the widest round, H target hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from aurora_lit.learn.data.collate import collate
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.losses.batch import OnlineBatch, Rounds
from aurora_lit.traces.record import SOURCE_DRAFT, Trace

_OTHER_ROUND_FIELDS = (
    "round_version_R",
    "num_proposed_R",
    "num_accepted_R",
    "source_R",
    "explored_R",
    "draft_temperature_R",
    "proposal_RK",
    "behaviour_logprob_RK",
)
"""The trace's tensors with one entry a round, but `round_root_R`."""
_PADDING_OF_PROPOSALS = {
    "proposal_QK": -1,
    "behaviour_logprob_QK": float("nan"),
    "path_last_QKH": 0,
    "path_lse_QK": 0,
    "path_top_QK": -1,
}
"""The batch's tensors with one entry a proposal, and their value beyond a round's number of proposals."""


@dataclass(frozen=True, kw_only=True)
class LabelledTrace:
    """A trace and what the target's head computes for it; positions that are not trained on hold 0."""

    trace: Trace
    """Its `lse_T` is set."""
    tempered_lse_T: Tensor
    """fp32. Log-sum-exp of the logits at the request's temperature."""
    top_T: Tensor
    """int64. The target's first choice; within a greedy answer, the token that follows."""
    rejected_tempered_lse_N: Tensor
    rejected_top_N: Tensor


def first_trained_position(trace: Trace) -> int:
    """The first position whose distribution is trained on: the one before the answer's first token; T if none is.

    All of a text without an answer is trained on, and nothing of a prompt without an answer.
    """
    length = len(trace.token_ids_T)
    if trace.answer_start == length:
        return 0 if trace.verify == "read" else length
    return max(0, trace.answer_start - 1)


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
    start = len(trace.token_ids_T) - max_length
    if start <= 0:
        return trace
    kept_R = trace.round_root_R >= start
    kept_N = torch.repeat_interleave(kept_R, trace.num_rejected_R)
    per_round = {name: getattr(trace, name)[kept_R] for name in _OTHER_ROUND_FIELDS}
    return replace(
        trace,
        first_position=trace.first_position + start,
        answer_start=max(0, trace.answer_start - start),
        token_ids_T=trace.token_ids_T[start:],
        aux_T3H=trace.aux_T3H[start:],
        last_TH=trace.last_TH[start:],
        lse_T=None if trace.lse_T is None else trace.lse_T[start:],
        round_root_R=trace.round_root_R[kept_R] - start,
        rejected_last_NH=trace.rejected_last_NH[kept_N],
        **per_round,
    )


def add_lse(trace: Trace, target_head: TargetHead) -> Trace:
    """The trace with its log-sum-exp at the positions that are trained on; unchanged if it has one already."""
    if trace.lse_T is not None:
        return trace
    start = first_trained_position(trace)
    lse_T = torch.zeros(len(trace.token_ids_T))
    lse_T[start:] = target_head.evaluate(trace.last_TH[start:], temperature=0.0).lse_N
    return replace(trace, lse_T=lse_T)


def label_trace(trace: Trace, target_head: TargetHead) -> LabelledTrace:
    """Apply the head to a trace: at the positions that are trained on, and at those after rejected proposals."""
    start, length = first_trained_position(trace), len(trace.token_ids_T)
    lse_T, tempered_T = torch.zeros(length), torch.zeros(length)
    top_T = torch.zeros(length, dtype=torch.int64)
    output = target_head.evaluate(trace.last_TH[start:], temperature=trace.temperature)
    lse_T[start:], tempered_T[start:], top_T[start:] = output.lse_N, output.tempered_lse_N, output.top_N
    if trace.verify == "greedy":  # the served token, since penalties, bias or a near tie may make it another
        top_T[start:-1] = trace.token_ids_T[start + 1 :].long()
    rejected = target_head.evaluate(trace.rejected_last_NH, temperature=trace.temperature)
    return LabelledTrace(
        trace=replace(trace, lse_T=lse_T),
        tempered_lse_T=tempered_T,
        top_T=top_T,
        rejected_tempered_lse_N=rejected.tempered_lse_N,
        rejected_top_N=rejected.top_N,
    )


def label_for_gate(trace: Trace, target_head: TargetHead) -> LabelledTrace:
    """As `label_trace`, for computing acceptance only: that of greedy and seeded answers does not need the head."""
    if trace.verify == "free":
        return label_trace(trace, target_head)
    zeros_T, zeros_N = torch.zeros(len(trace.token_ids_T)), torch.zeros(len(trace.rejected_last_NH))
    return LabelledTrace(
        trace=replace(trace, lse_T=zeros_T),
        tempered_lse_T=zeros_T,
        top_T=zeros_T.long(),
        rejected_tempered_lse_N=zeros_N,
        rejected_top_N=zeros_N.long(),
    )


def online_batch(live: Sequence[LabelledTrace], replay: Sequence[Trace], *, oldest_fresh: int) -> OnlineBatch:
    """Pad live and replayed traces together, with the rounds of the live ones.

    oldest_fresh: number of the oldest version whose proposals may still be used for the policy gradient.
    """
    traces = [labelled.trace for labelled in live] + list(replay)
    parts = [_drafted_rounds(labelled, oldest_fresh=oldest_fresh) for labelled in live]
    width = max([1, *(part["proposal_QK"].shape[1] for part in parts)])
    hidden = traces[0].last_TH.shape[1]
    parts.append(_no_rounds(hidden))  # torch.cat needs at least one part
    rounds: dict[str, Any] = {
        name: torch.cat([_widen(name, part[name], width) for part in parts]) for name in parts[-1]
    }
    counts = [len(part["root_Q"]) for part in parts]
    return OnlineBatch(
        traces=collate(traces, with_prompt=[False] * len(traces)),
        live_B=torch.arange(len(traces)) < len(live),
        rounds=Rounds(row_Q=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts)), **rounds),
    )


def _drafted_rounds(labelled: LabelledTrace, *, oldest_fresh: int) -> dict[str, Tensor]:
    """The fields of `Rounds` but `row_Q`, for those rounds of one trace in which the draft proposed."""
    trace = labelled.trace
    proposed_R, accepted_R, root_R = trace.num_proposed_R.long(), trace.num_accepted_R.long(), trace.round_root_R.long()
    kept = ((trace.source_R == SOURCE_DRAFT) & (proposed_R > 0) & (root_R > 0)).nonzero()[:, 0]
    T, K, Q = len(trace.token_ids_T), trace.proposal_RK.shape[1], len(kept)
    step_QK = torch.arange(K).expand(Q, K)
    inside_QK = step_QK < proposed_R[kept, None]
    # Proposal i is verified at position root + i while all before it were accepted, else at a position after a
    # rejection, whose states follow those of the committed positions.
    rejected_from_R = trace.num_rejected_R.cumsum(0) - trace.num_rejected_R
    committed_QK = root_R[kept, None] + step_QK
    rejected_QK = T + rejected_from_R[kept, None] + step_QK - accepted_R[kept, None] - 1
    index_QK = torch.where(step_QK <= accepted_R[kept, None], committed_QK, rejected_QK)
    index_QK = torch.where(inside_QK, index_QK, 0)

    def along_path(of_T: Tensor, of_N: Tensor, fill: float) -> Tensor:
        joined = torch.cat([of_T, of_N]) if len(of_N) else of_T
        inside = inside_QK.view(*inside_QK.shape, *[1] * (joined.dim() - 1))
        return joined[index_QK].masked_fill(~inside, fill)

    explored_Q = trace.explored_R[kept]
    drawn_Q = explored_Q | (trace.verify == "free")
    return {
        "root_Q": root_R[kept],
        "proposal_QK": trace.proposal_RK[kept].long(),
        "num_proposed_Q": proposed_R[kept],
        "num_accepted_Q": accepted_R[kept],
        "behaviour_logprob_QK": trace.behaviour_logprob_RK[kept].masked_fill(~drawn_Q[:, None], float("nan")),
        "temperature_Q": torch.full((Q,), trace.temperature),
        "draft_temperature_Q": trace.draft_temperature_R[kept],
        "verified_by_equality_Q": torch.full((Q,), trace.verify != "free"),
        "path_last_QKH": along_path(trace.last_TH, trace.rejected_last_NH, 0.0),
        "path_lse_QK": along_path(labelled.tempered_lse_T, labelled.rejected_tempered_lse_N, 0.0),
        "path_top_QK": along_path(labelled.top_T, labelled.rejected_top_N, -1),
        "fresh_Q": trace.round_version_R[kept] >= oldest_fresh,
    }


def _no_rounds(hidden: int) -> dict[str, Tensor]:
    """The same fields for no rounds."""
    whole, real, truth = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    return {
        "root_Q": whole,
        "proposal_QK": whole[:, None],
        "num_proposed_Q": whole,
        "num_accepted_Q": whole,
        "behaviour_logprob_QK": real[:, None],
        "temperature_Q": real,
        "draft_temperature_Q": real,
        "verified_by_equality_Q": truth,
        "path_last_QKH": torch.zeros(0, 1, hidden, dtype=torch.bfloat16),
        "path_lse_QK": real[:, None],
        "path_top_QK": whole[:, None],
        "fresh_Q": truth,
    }


def _widen(name: str, values: Tensor, width: int) -> Tensor:
    """Pad the proposals' dimension, if the field has one, to `width`."""
    if name not in _PADDING_OF_PROPOSALS:
        return values
    missing = width - values.shape[1]
    of_last_dim = (0, 0) * (values.dim() - 2)
    return pad(values, (*of_last_dim, 0, missing), value=_PADDING_OF_PROPOSALS[name])
