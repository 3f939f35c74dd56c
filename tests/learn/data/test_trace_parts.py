"""Cropping, which positions are trained on, compatibility; batches of traces and of what was proposed along them."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.trace_examples import trace_with_rounds

from aurora_lit.learn.data.collate import collate_online
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import (
    crop,
    first_trained_position,
    is_compatible,
    pieces_of,
)
from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace, check


def test_a_target_head_stands_in_for_its_target(target: Target, target_head: TargetHead) -> None:
    assert target_head.aux_layer_ids == target.aux_layer_ids, "drafts are checked against it"
    for ids_D in (torch.tensor([3, 5, 8]), torch.tensor([4, 9])):
        rows_DH = target_head.rows(ids_D)
        torch.testing.assert_close(rows_DH, target.head_rows(ids_D), atol=0, rtol=1e-2)
        assert target_head.rows(ids_D.clone()) is rows_DH, "gathered once"


def test_a_cropped_trace_is_a_valid_trace_of_its_last_positions(target_head: TargetHead, served: list[Trace]) -> None:
    trace = max(served, key=lambda t: len(t.token_ids_T))
    short = crop(trace, 15)
    check(short)
    start = len(trace.token_ids_T) - 15
    assert (short.first_position, short.answer_start) == (trace.first_position + start, 0)
    assert crop(trace, 1000) is trace
    kept_R = trace.round_root_R >= start
    assert 0 < int(kept_R.sum()) < len(kept_R)
    assert torch.equal(short.round_root_R, trace.round_root_R[kept_R] - start)
    assert torch.equal(short.proposal_RK, trace.proposal_RK[kept_R])


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


def test_a_batch_knows_what_the_draft_proposed_along_its_live_traces() -> None:
    """Rounds of n-gram lookup, which propose one token here, are left out."""
    live = [trace_with_rounds([(1, 3, 1), (4, 1, 1), (6, 2, 2)]), trace_with_rounds([(2, 2, 0)])]
    batch = collate_online(live, [trace_with_rounds([(2, 4, 4)])])
    assert sorted(batch.proposed_P.tolist()) == sorted([102, 153, 154, 107, 108, 153, 154])
    assert (batch.tested_K.tolist(), batch.accepted_K.tolist()) == ([3, 2, 0], [2, 1, 0])
    assert (batch.live_B.tolist(), batch.at_rest) == ([True, True, False], False)
    plain = collate_online([trace_with_rounds([])], [])
    assert (len(plain.proposed_P), plain.tested_K.tolist(), plain.at_rest) == (0, [0], False)
    rest = collate_online([], live)
    assert (len(rest.proposed_P), rest.live_B.tolist(), rest.at_rest) == (0, [False, False], True)
