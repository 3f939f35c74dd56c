"""Labelled traces: cropping, which positions are trained on, compatibility."""

from __future__ import annotations

from dataclasses import replace

import torch

from aurora_lit.learn.data.labelled_trace import (
    crop,
    first_trained_position,
    is_compatible,
    label_for_batch,
    label_traces,
    pieces_of,
    unlabelled,
)
from aurora_lit.learn.data.online_batch import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace, check


def test_a_target_head_stands_in_for_its_target(target: Target, target_head: TargetHead) -> None:
    assert target_head.aux_layer_ids == target.aux_layer_ids, "drafts are checked against it"
    for ids_D in (torch.tensor([3, 5, 8]), torch.tensor([4, 9])):
        rows_DH = target_head.rows(ids_D)
        torch.testing.assert_close(rows_DH, target.head_rows(ids_D), atol=0, rtol=1e-2)
        assert target_head.rows(ids_D.clone()) is rows_DH, "gathered once"


def test_a_cropped_trace_is_a_valid_trace_of_its_last_positions(target_head: TargetHead, served: list[Trace]) -> None:
    trace = max(served, key=lambda t: int(t.num_rejected_R.sum()))
    short = crop(trace, 15)
    check(short)
    start = len(trace.token_ids_T) - 15
    assert (short.first_position, short.answer_start) == (trace.first_position + start, 0)
    assert crop(trace, 1000) is trace
    whole, part = (collate_online(label_traces([t], target_head), [], oldest_fresh=0).rounds for t in (trace, short))
    kept = whole.root_Q > start
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(part.root_Q, whole.root_Q[kept] - start)
    for name in ("proposal_QK", "path_last_QKH", "path_top_QK", "path_lse_QK"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[kept]), name


def test_the_pieces_of_a_long_answer_are_valid_and_hold_each_trained_position_once(served: list[Trace]) -> None:
    for trace in served:
        start, end = first_trained_position(trace), len(trace.token_ids_T)
        for most_trained in (5, 9, 1000):
            trained, rounds = list[int](), 0
            for piece in pieces_of(trace, most_trained=most_trained, most_context=6):
                check(piece)
                first = first_trained_position(piece)
                begin = piece.first_position - trace.first_position
                assert 2 <= len(piece.token_ids_T) - first <= most_trained
                assert first == min(6, begin + first)
                trained += range(begin + first, begin + len(piece.token_ids_T))
                there = slice(begin, begin + len(piece.token_ids_T))
                assert torch.equal(piece.token_ids_T, trace.token_ids_T[there])
                assert torch.equal(piece.last_TH, trace.last_TH[there])
                rounds += len(piece.round_root_R)
            assert trained == list(range(start, end))
            number = -(-(end - start) // most_trained)
            assert len(trace.round_root_R) - number < rounds <= len(trace.round_root_R), "one at each border is lost"


def test_traces_labelled_together_have_the_labels_that_each_has_alone(
    target_head: TargetHead, served: list[Trace]
) -> None:
    read = replace(served[0], verify="read", answer_start=len(served[0].token_ids_T))
    traces = [*served, read]
    assert {trace.verify for trace in traces} == {"greedy", "sampled", "read"}
    assert any(bool((trace.explored_R & (trace.num_rejected_R > 0)).any()) for trace in traces)
    for trace, together in zip(traces, label_traces(traces, target_head), strict=True):
        alone = label_traces([trace], target_head)[0]
        start = first_trained_position(trace)
        expected = target_head.evaluate(trace.last_TH[start:], temperature=trace.temperature)
        torch.testing.assert_close(together.tempered_lse_T[start:], expected.tempered_lse_N, atol=1e-2, rtol=0)
        assert (together.tempered_lse_T[:start] == 0).all()
        if trace.verify == "greedy":
            assert torch.equal(together.top_T[start:-1], trace.token_ids_T[start + 1 :].long())
        else:
            assert torch.equal(together.top_T[start:], expected.top_N)
        is_drawn_N = torch.repeat_interleave(trace.explored_R, trace.num_rejected_R)
        drawn = target_head.evaluate(trace.rejected_last_NH[is_drawn_N], temperature=trace.temperature)
        torch.testing.assert_close(
            together.rejected_tempered_lse_N[is_drawn_N], drawn.tempered_lse_N, atol=1e-2, rtol=0
        )
        assert torch.equal(together.rejected_top_N[is_drawn_N], drawn.top_N)
        for name in ("tempered_lse_T", "top_T", "rejected_tempered_lse_N", "rejected_top_N"):
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=1e-2, rtol=0)
    assert label_traces([], target_head) == []


def test_a_batch_labels_the_traces_that_the_policy_loss_can_use(target_head: TargetHead, served: list[Trace]) -> None:
    explored = [bool(trace.explored_R.any()) for trace in served]
    assert set(explored) == {True, False}
    for trace, has_policy, found in zip(served, explored, label_for_batch(served, target_head), strict=True):
        expected = label_traces([trace], target_head)[0] if has_policy else unlabelled(trace)
        assert found.trace.request_id == trace.request_id
        assert (found.tempered_lse_T != 0).any() == has_policy
        torch.testing.assert_close(found.tempered_lse_T, expected.tempered_lse_T, atol=1e-2, rtol=0)


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
