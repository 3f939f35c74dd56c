"""Labelled traces and online batches: what verifies each proposal, cropping, compatibility."""

from __future__ import annotations

from dataclasses import replace

import torch

from aurora_lit.learn.data.labelled_trace import (
    crop,
    first_trained_position,
    is_compatible,
    label_trace,
    online_batch,
)
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models.target import Target
from aurora_lit.traces.record import Trace, check


def test_each_proposal_is_verified_by_the_targets_distribution_after_the_proposals_before_it(
    target: Target, target_head: TargetHead, served: list[Trace]
) -> None:
    labelled_traces = [label_trace(trace, target_head) for trace in served]
    batch = online_batch(labelled_traces, [], oldest_fresh=0)
    assert len(batch.rounds.row_Q) > 60
    rejected = 0
    for q in range(len(batch.rounds.row_Q)):
        trace = served[int(batch.rounds.row_Q[q])]
        root, proposals = int(batch.rounds.root_Q[q]), batch.rounds.proposal_QK[q]
        count = int(batch.rounds.num_proposed_Q[q])
        ids = torch.cat([trace.token_ids_T[: root + 1].long(), proposals[: count - 1]])
        with torch.no_grad():
            last_TH = target.forward_uncached(ids[None])[1][0, root:]
            logits = target.logits(last_TH)
        free = float(batch.rounds.temperature_Q[q]) or 1.0
        torch.testing.assert_close(batch.rounds.path_last_QKH[q, :count].float(), last_TH, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(
            batch.rounds.path_lse_QK[q, :count], (logits / free).logsumexp(-1), atol=0.05, rtol=0
        )
        clear = logits.topk(2).values.diff().abs()[:, 0] > 0.1
        assert torch.equal(batch.rounds.path_top_QK[q, :count][clear], logits.argmax(-1)[clear])
        assert (batch.rounds.path_top_QK[q, count:] == -1).all()
        assert (proposals[count:] == -1).all()
        rejected += count - 1 - int(batch.rounds.num_accepted_Q[q]) > 0
    assert rejected > 5, "or the rejected paths were not looked at"


def test_only_drawn_proposals_have_log_probabilities_and_only_recent_ones_are_fresh(
    target_head: TargetHead, served: list[Trace]
) -> None:
    batch = online_batch([label_trace(trace, target_head) for trace in served], [], oldest_fresh=0)
    modes = [served[int(row)].verify for row in batch.rounds.row_Q]
    explored = torch.cat([t.explored_R[(t.num_proposed_R > 0) & (t.round_root_R > 0)] for t in served])
    assert 0 < int(explored.sum()) < len(explored)
    for q, mode in enumerate(modes):
        drawn = bool(explored[q]) or mode == "free"
        assert bool(batch.rounds.behaviour_logprob_QK[q, 0].isfinite()) == drawn
        assert bool(batch.rounds.verified_by_equality_Q[q]) == (mode != "free")
    assert batch.rounds.fresh_Q.all()
    assert not online_batch([label_trace(served[0], target_head)], [], oldest_fresh=1).rounds.fresh_Q.any()


def test_replay_is_marked_and_brings_no_rounds(target_head: TargetHead, served: list[Trace]) -> None:
    labelled_traces = [label_trace(trace, target_head) for trace in served[:4]]
    batch = online_batch(labelled_traces[:2], [labelled.trace for labelled in labelled_traces[2:]], oldest_fresh=0)
    assert batch.live_B.tolist() == [True, True, False, False]
    assert set(batch.rounds.row_Q.tolist()) == {0, 1}
    replay_only = online_batch([], [labelled_traces[0].trace], oldest_fresh=0)
    assert (len(replay_only.rounds.row_Q), replay_only.live_B.tolist()) == (0, [False])


def test_a_cropped_trace_is_a_valid_trace_of_its_last_positions(target_head: TargetHead, served: list[Trace]) -> None:
    trace = max(served, key=lambda t: int(t.num_rejected_R.sum()))
    short = crop(trace, 15)
    check(short)
    start = len(trace.token_ids_T) - 15
    assert (short.first_position, short.answer_start) == (trace.first_position + start, 0)
    assert crop(trace, 1000) is trace
    whole, part = (online_batch([label_trace(t, target_head)], [], oldest_fresh=0).rounds for t in (trace, short))
    kept = whole.root_Q > start
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(part.root_Q, whole.root_Q[kept] - start)
    for name in ("proposal_QK", "path_last_QKH", "path_top_QK", "path_lse_QK"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[kept]), name


def test_training_starts_at_the_position_that_predicts_the_answers_first_token(served: list[Trace]) -> None:
    assert first_trained_position(served[0]) == 2, "prompts have three tokens"
    length = len(served[0].token_ids_T)
    assert first_trained_position(replace(served[0], answer_start=length)) == length
    assert first_trained_position(replace(served[0], answer_start=length, verify="read")) == 0


def test_a_trace_of_another_target_is_not_compatible(target_head: TargetHead, served: list[Trace]) -> None:
    trace = served[0]
    assert is_compatible(trace, target_head)
    assert not is_compatible(replace(trace, last_TH=trace.last_TH[:, :8]), target_head)
    tokens_T = trace.token_ids_T.clone()
    tokens_T[1] = target_head.vocab_size
    assert not is_compatible(replace(trace, token_ids_T=tokens_T), target_head)
    proposals = trace.proposal_RK.clone()
    proposals[0, 0] = target_head.vocab_size
    assert not is_compatible(replace(trace, proposal_RK=proposals), target_head)
