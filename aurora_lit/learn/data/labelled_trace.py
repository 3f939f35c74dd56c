"""From traces to what a draft module trains on: cropped, read by the target's head, padded, with their rounds.

What is left out: which traces (learn/data/feed.py), the losses (modules/losses/draft_module.py).

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

from aurora_lit.learn.data.batches import collate
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.traces.record import SOURCE_DRAFT, Trace


@dataclass(frozen=True, kw_only=True)
class LabelledTrace:
    """A trace and what the target's head says of it; what teaches nothing is 0."""

    trace: Trace
    """With its lse_T."""
    tempered_lse_T: Tensor
    """fp32. Log-sum-exp of the logits at the request's temperature."""
    top_T: Tensor
    """int64. The target's first choice; where a greedy answer goes on, what it goes on with."""
    rejected_tempered_lse_N: Tensor
    rejected_top_N: Tensor


def first_taught(trace: Trace) -> int:
    """The first position whose distribution teaches: the one behind which the answer begins; T when none does.

    Text that was only read teaches everywhere, a prompt without an answer nowhere.
    """
    length = len(trace.token_ids_T)
    if trace.answer_start == length:
        return 0 if trace.verify == "read" else length
    return max(0, trace.answer_start - 1)


def fits(trace: Trace, ends: TargetHead) -> bool:
    """Whether the trace is of this target: its width, and tokens of its vocabulary."""
    highest = int(trace.token_ids_T.max())
    if trace.proposal_RK.numel():
        highest = max(highest, int(trace.proposal_RK.max()))
    narrow = trace.aux_T3H.shape[1] == 3 * ends.hidden_size and trace.last_TH.shape[1] == ends.hidden_size
    return narrow and highest < ends.vocab_size


def crop(trace: Trace, max_length: int) -> Trace:
    """The last `max_length` positions of a trace: a long prompt loses its beginning, with the rounds rooted there."""
    start = len(trace.token_ids_T) - max_length
    if start <= 0:
        return trace
    kept_R = trace.round_root_R >= start
    kept_N = torch.repeat_interleave(kept_R, trace.num_rejected_R)
    per_round = {
        name: getattr(trace, name)[kept_R]
        for name in vars(trace)
        if name.endswith(("_R", "_RK")) and name != "round_root_R"
    }
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


def read_lse(trace: Trace, ends: TargetHead) -> Trace:
    """The trace with its log-sum-exp, of the positions that teach; one that has it is returned as it is."""
    if trace.lse_T is not None:
        return trace
    start = first_taught(trace)
    lse_T = torch.zeros(len(trace.token_ids_T))
    lse_T[start:] = ends.read(trace.last_TH[start:], temperature=0.0).lse_N
    return replace(trace, lse_T=lse_T)


def read_lesson(trace: Trace, ends: TargetHead) -> LabelledTrace:
    """Have the head read a trace: the positions that teach, and those behind rejections."""
    start, length = first_taught(trace), len(trace.token_ids_T)
    lse_T, tempered_T = torch.zeros(length), torch.zeros(length)
    top_T = torch.zeros(length, dtype=torch.int64)
    reading = ends.read(trace.last_TH[start:], temperature=trace.temperature)
    lse_T[start:], tempered_T[start:], top_T[start:] = reading.lse_N, reading.tempered_lse_N, reading.top_N
    if trace.verify == "greedy":  # penalties and bias included, and no tie is broken otherwise than it was served
        top_T[start:-1] = trace.token_ids_T[start + 1 :].long()
    rejected = ends.read(trace.rejected_last_NH, temperature=trace.temperature)
    return LabelledTrace(
        trace=replace(trace, lse_T=lse_T),
        tempered_lse_T=tempered_T,
        top_T=top_T,
        rejected_tempered_lse_N=rejected.tempered_lse_N,
        rejected_top_N=rejected.top_N,
    )


def for_gate(trace: Trace, ends: TargetHead) -> LabelledTrace:
    """As `read_lesson`, where only a draft's acceptance is wanted: that of greedy and seeded answers asks no head."""
    if trace.verify == "free":
        return read_lesson(trace, ends)
    zeros_T, zeros_N = torch.zeros(len(trace.token_ids_T)), torch.zeros(len(trace.rejected_last_NH))
    return LabelledTrace(
        trace=replace(trace, lse_T=zeros_T),
        tempered_lse_T=zeros_T,
        top_T=zeros_T.long(),
        rejected_tempered_lse_N=zeros_N,
        rejected_top_N=zeros_N.long(),
    )


def online_batch(live: Sequence[LabelledTrace], replay: Sequence[Trace], *, oldest_fresh: int) -> OnlineBatch:
    """Pad live and remembered traces together, with the rounds of the live ones.

    oldest_fresh: number of the oldest version whose proposals may still teach the policy.
    """
    traces = [lesson.trace for lesson in live] + list(replay)
    parts = [_drafted_rounds(lesson, oldest_fresh=oldest_fresh) for lesson in live]
    width = max([1, *(part["proposal_QK"].shape[1] for part in parts)])
    hidden = traces[0].last_TH.shape[1]
    parts.append(_no_rounds(hidden))  # so that there is something to join
    rounds: dict[str, Any] = {
        name: torch.cat([_widen(name, part[name], width) for part in parts]) for name in parts[-1]
    }
    counts = [len(part["root_Q"]) for part in parts]
    return OnlineBatch(
        traces=collate(traces, with_prompt=[False] * len(traces)),
        live_B=torch.arange(len(traces)) < len(live),
        row_Q=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts)),
        **rounds,
    )


def _drafted_rounds(lesson: LabelledTrace, *, oldest_fresh: int) -> dict[str, Tensor]:
    """The fields of an OnlineBatch for the rounds of one trace in which the draft proposed."""
    trace = lesson.trace
    proposed_R, accepted_R, root_R = trace.num_proposed_R.long(), trace.num_accepted_R.long(), trace.round_root_R.long()
    kept = ((trace.source_R == SOURCE_DRAFT) & (proposed_R > 0) & (root_R > 0)).nonzero()[:, 0]
    T, K, Q = len(trace.token_ids_T), trace.proposal_RK.shape[1], len(kept)
    place_QK = torch.arange(K).expand(Q, K)
    inside_QK = place_QK < proposed_R[kept, None]
    # Proposal i is judged at root + i while all before it were accepted, and behind that among the rejected rows.
    rejected_from_R = trace.num_rejected_R.cumsum(0) - trace.num_rejected_R
    committed_QK = root_R[kept, None] + place_QK
    rejected_QK = T + rejected_from_R[kept, None] + place_QK - accepted_R[kept, None] - 1
    index_QK = torch.where(place_QK <= accepted_R[kept, None], committed_QK, rejected_QK)
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
        "greedy_verify_Q": torch.full((Q,), trace.verify != "free"),
        "path_last_QKH": along_path(trace.last_TH, trace.rejected_last_NH, 0.0),
        "path_lse_QK": along_path(lesson.tempered_lse_T, lesson.rejected_tempered_lse_N, 0.0),
        "path_top_QK": along_path(lesson.top_T, lesson.rejected_top_N, -1),
        "fresh_Q": trace.round_version_R[kept] >= oldest_fresh,
    }


def _no_rounds(hidden: int) -> dict[str, Tensor]:
    """The same fields of no round at all."""
    whole, real, truth = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    return {
        "root_Q": whole,
        "proposal_QK": whole[:, None],
        "num_proposed_Q": whole,
        "num_accepted_Q": whole,
        "behaviour_logprob_QK": real[:, None],
        "temperature_Q": real,
        "draft_temperature_Q": real,
        "greedy_verify_Q": truth,
        "path_last_QKH": torch.zeros(0, 1, hidden, dtype=torch.bfloat16),
        "path_lse_QK": real[:, None],
        "path_top_QK": whole[:, None],
        "fresh_Q": truth,
    }


def _widen(name: str, values: Tensor, width: int) -> Tensor:
    """Pad the proposals' dimension with what stands beyond a round's number."""
    if not name.endswith(("_QK", "_QKH")):
        return values
    fill = {"proposal_QK": -1, "path_top_QK": -1, "behaviour_logprob_QK": float("nan")}.get(name, 0)
    missing = width - values.shape[1]
    return pad(values, (0, 0, 0, missing) if name == "path_last_QKH" else (0, missing), value=fill)
