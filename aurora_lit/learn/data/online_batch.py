"""Online batches: live and replayed traces padded together, with the rounds in which the draft proposed.

Leaves out which traces a batch takes (learn/data/online_batcher.py) and the losses (modules/losses/draft_module.py).

Shapes: T positions of a trace, R rounds of a trace, N rejected positions of it, Q drafted rounds of all traces, K
proposals of the longest round, H target hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from aurora_lit.learn.data.collate import collate
from aurora_lit.learn.data.labelled_trace import LabelledTrace
from aurora_lit.modules.losses.batch import OnlineBatch, Rounds
from aurora_lit.request import Source
from aurora_lit.traces.record import Trace

_PADDING_OF_PROPOSALS = {
    "proposal_QK": -1,
    "behaviour_logprob_QK": float("nan"),
    "path_last_QKH": 0,
    "path_lse_QK": 0,
    "path_top_QK": -1,
}
"""The batch's tensors with one entry a proposal, and their value beyond a round's number of proposals."""


def collate_online(live: Sequence[LabelledTrace], replay: Sequence[Trace], *, oldest_fresh: int) -> OnlineBatch:
    """Pad live and replayed traces together, with the rounds of the live ones.

    oldest_fresh: number of the oldest version whose proposals may still be used for the policy gradient.
    """
    traces = [labelled.trace for labelled in live] + list(replay)
    parts = [_drafted_rounds(labelled, oldest_fresh=oldest_fresh) for labelled in live]
    width = max([1, *(part["proposal_QK"].shape[1] for part in parts)])
    parts.append(vars(Rounds.none(traces[0].last_TH.shape[1])))  # torch.cat needs at least one part
    rounds: dict[str, Any] = {
        name: torch.cat([_widen(name, part[name], width) for part in parts]) for name in parts[-1] if name != "row_Q"
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
    kept = ((trace.source_R == Source.DRAFT) & (proposed_R > 0) & (root_R > 0)).nonzero()[:, 0]
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

    return {
        "root_Q": root_R[kept],
        "proposal_QK": trace.proposal_RK[kept].long(),
        "num_proposed_Q": proposed_R[kept],
        "num_accepted_Q": accepted_R[kept],
        # NaN already, except in older logs.
        "behaviour_logprob_QK": trace.behaviour_logprob_RK[kept].where(trace.explored_R[kept, None], float("nan")),
        "temperature_Q": torch.full((Q,), trace.temperature),
        "draft_temperature_Q": trace.draft_temperature_R[kept],
        "path_last_QKH": along_path(trace.last_TH, trace.rejected_last_NH, 0.0),
        "path_lse_QK": along_path(labelled.tempered_lse_T, labelled.rejected_tempered_lse_N, 0.0),
        "path_top_QK": along_path(labelled.top_T, labelled.rejected_top_N, -1),
        "fresh_Q": trace.round_version_R[kept] >= oldest_fresh,
    }


def _widen(name: str, values: Tensor, width: int) -> Tensor:
    """Pad the proposals' dimension, if the field has one, to `width`."""
    if name not in _PADDING_OF_PROPOSALS:
        return values
    missing = width - values.shape[1]
    of_last_dim = (0, 0) * (values.dim() - 2)
    return pad(values, (*of_last_dim, 0, missing), value=_PADDING_OF_PROPOSALS[name])
