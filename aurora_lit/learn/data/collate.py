"""Pad traces together, and group sequences of similar length so that little of a batch is padding.

Leaves out which traces a batch takes (learn/data/online_batcher.py, learn/data/log_batches.py) and the loss
(modules/losses/draft_module.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from aurora_lit.modules.losses.batch import OnlineBatch, TraceBatch
from aurora_lit.request import Source
from aurora_lit.traces.record import Trace


def group_by_length(lengths: Sequence[int], batch_positions: int) -> Iterator[list[int]]:
    """Yield groups of indices of sequences of similar length, the shortest first.

    A group's padded batch holds at most `batch_positions` positions; a longer sequence is a group of its own. Sequences
    of equal length keep their order.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[index] * (len(group) + 1) > batch_positions:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def collate(traces: Sequence[Trace], *, with_prompt: Sequence[bool]) -> TraceBatch:
    """Right-pad traces together.

    `with_prompt`: per trace, true if its prompt's positions have weight 1 too, as far as the trace has the target's
    states there (they are 0 where serving did not compute them). The answer's positions always have weight 1, and so
    have all positions of text that was only read. If any trace has no `lse_T`, the batch has none.
    """
    weights = []
    for trace, whole in zip(traces, with_prompt, strict=True):
        weight_T = torch.ones(len(trace.token_ids_T))
        if trace.answer_start != len(weight_T):
            # The distribution of an answer's first token belongs to the position before it.
            prompt = slice(max(0, trace.answer_start - 1))
            weight_T[prompt] = trace.last_TH[prompt].any(-1).float() if whole else 0.0
        weights.append(weight_T)
    lse = [trace.lse_T for trace in traces if trace.lse_T is not None]
    return TraceBatch(
        token_ids_BT=pad_sequence([t.token_ids_T.long() for t in traces], batch_first=True),
        aux_BT3H=pad_sequence([t.aux_T3H for t in traces], batch_first=True),
        last_BTH=pad_sequence([t.last_TH for t in traces], batch_first=True),
        weight_BT=pad_sequence(weights, batch_first=True),
        domains=tuple(t.domain for t in traces),
        lse_BT=pad_sequence(lse, batch_first=True) if len(lse) == len(traces) else None,
    )


def collate_online(live: Sequence[Trace], replay: Sequence[Trace]) -> OnlineBatch:
    """Pad live and replayed traces together, with what the draft proposed in the rounds of the live ones."""
    traces = [*live, *replay]
    drafted = [(trace, (trace.source_R == Source.DRAFT) & (trace.num_proposed_R > 0)) for trace in live]
    proposed_Q, accepted_Q = (
        torch.cat([torch.zeros(0, dtype=torch.int64), *(getattr(trace, name)[of_R].long() for trace, of_R in drafted)])
        for name in ("num_proposed_R", "num_accepted_R")
    )
    step_K = torch.arange(int(proposed_Q.max()) if len(proposed_Q) else 1)
    is_proposal_QK = step_K < proposed_Q[:, None]
    proposals = [trace.proposal_RK[of_R].flatten().long() for trace, of_R in drafted]
    proposal_P = torch.cat([torch.zeros(0, dtype=torch.int64), *proposals])
    return OnlineBatch(
        traces=collate(traces, with_prompt=[False] * len(traces)),
        live_B=torch.arange(len(traces)) < len(live),
        proposed_P=proposal_P[proposal_P >= 0],
        tested_K=(is_proposal_QK & (step_K <= accepted_Q[:, None])).sum(0),
        accepted_K=(is_proposal_QK & (step_K < accepted_Q[:, None])).sum(0),
        at_rest=not live,
    )
