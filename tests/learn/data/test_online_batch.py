"""Online batches: which distribution verifies each proposal, log-probabilities, freshness, replay."""

from __future__ import annotations

from dataclasses import replace

import torch

from aurora_lit.learn.data.labelled_trace import label_traces
from aurora_lit.learn.data.online_batch import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace


def test_each_proposal_is_verified_by_the_targets_distribution_after_the_proposals_before_it(
    target: Target, target_head: TargetHead, served: list[Trace]
) -> None:
    labelled_traces = label_traces(served, target_head)
    batch = collate_online(labelled_traces, [], oldest_fresh=0)
    assert len(batch.rounds.row_Q) > 60
    rejected = 0
    for q in range(len(batch.rounds.row_Q)):
        trace = served[int(batch.rounds.row_Q[q])]
        root, proposals = int(batch.rounds.root_Q[q]), batch.rounds.proposal_QK[q]
        count = int(batch.rounds.num_proposed_Q[q])
        ids = torch.cat([trace.token_ids_T[: root + 1].long(), proposals[: count - 1]])
        with torch.no_grad():
            last_TH = target.in_torch.forward_uncached(ids[None])[1][0, root:]
            logits = target.logits(last_TH)
        temperature = float(batch.rounds.temperature_Q[q]) or 1.0
        torch.testing.assert_close(batch.rounds.path_last_QKH[q, :count].float(), last_TH, atol=2e-2, rtol=2e-2)
        # Beyond the first rejection the head is applied only in rounds with a policy ratio.
        explored = bool(batch.rounds.behaviour_logprob_QK[q, 0].isfinite())
        labelled = count if explored else min(count, 1 + int(batch.rounds.num_accepted_Q[q]))
        torch.testing.assert_close(
            batch.rounds.path_lse_QK[q, :labelled],
            (logits[:labelled] / temperature).logsumexp(-1),
            atol=0.05,
            rtol=0,
        )
        clear = logits[:labelled].topk(2).values.diff().abs()[:, 0] > 0.1
        assert torch.equal(batch.rounds.path_top_QK[q, :labelled][clear], logits[:labelled].argmax(-1)[clear])
        assert (batch.rounds.path_lse_QK[q, labelled:count] == 0).all()
        assert (batch.rounds.path_top_QK[q, count:] == -1).all()
        assert (proposals[count:] == -1).all()
        rejected += explored and count - 1 - int(batch.rounds.num_accepted_Q[q]) > 0
    assert rejected > 5, "or the rejected paths were not looked at"


def test_only_drawn_proposals_have_log_probabilities_and_only_recent_ones_are_fresh(
    target_head: TargetHead, served: list[Trace]
) -> None:
    batch = collate_online(label_traces(served, target_head), [], oldest_fresh=0)
    assert {served[int(row)].verify for row in batch.rounds.row_Q} == {"greedy", "sampled"}
    explored = torch.cat([t.explored_R[(t.num_proposed_R > 0) & (t.round_root_R > 0)] for t in served])
    assert 0 < int(explored.sum()) < len(explored)
    assert torch.equal(batch.rounds.behaviour_logprob_QK[:, 0].isfinite(), explored)
    older = replace(served[0], behaviour_logprob_RK=torch.zeros_like(served[0].behaviour_logprob_RK))
    known = collate_online(label_traces([older], target_head), [], oldest_fresh=0).rounds.behaviour_logprob_QK
    assert torch.equal(known[:, 0].isfinite(), explored[: len(known)]), "older logs have 0 for an argmax"
    assert batch.rounds.fresh_Q.all()
    assert not collate_online(label_traces([served[0]], target_head), [], oldest_fresh=1).rounds.fresh_Q.any()


def test_replay_is_marked_and_brings_no_rounds(target_head: TargetHead, served: list[Trace]) -> None:
    labelled_traces = label_traces(served[:4], target_head)
    batch = collate_online(labelled_traces[:2], [labelled.trace for labelled in labelled_traces[2:]], oldest_fresh=0)
    assert batch.live_B.tolist() == [True, True, False, False]
    assert set(batch.rounds.row_Q.tolist()) == {0, 1}
    replay_only = collate_online([], [labelled_traces[0].trace], oldest_fresh=0)
    assert (len(replay_only.rounds.row_Q), replay_only.live_B.tolist()) == (0, [False])
