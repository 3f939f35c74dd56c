"""Scores along recorded traces equal the rounds that a live engine with the scored draft has."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.live_traces import online_module, serve, some_requests
from support.replay_harness import K, in_order, scored_rounds
from support.tiny_models import make_engine, random_draft, run
from support.trace_examples import keep_in

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.scoring import RoundScorer, RoundTotals
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace


def a_scorer(target: Target, draft: Eagle3Draft) -> RoundScorer:
    return RoundScorer(online_module(target, draft, num_steps=K), TargetHead(target), batch_positions=256)


def test_scored_rounds_of_another_draft_are_those_of_a_live_engine(target: Target, good_draft: Eagle3Draft) -> None:
    requests = some_requests(10, max_tokens=40)
    recorded = in_order(serve(target, random_draft(target), requests))
    live = in_order(serve(target, good_draft, requests))
    assert all(torch.equal(a.token_ids_T, b.token_ids_T) for a, b in zip(recorded, live, strict=True))
    found = a_scorer(target, good_draft).score(recorded)
    assert found == [scored_rounds(trace) for trace in live]
    assert sum(found, RoundTotals()).accepted_length > 1.8, "or hardly anything is accepted here"
    assert sum(map(scored_rounds, recorded), RoundTotals()).accepted_length < 1.5


def test_rounds_continue_in_the_next_segment_of_a_request(target: Target, good_draft: Eagle3Draft) -> None:
    requests = some_requests(6, max_tokens=60)

    def segments(draft: Eagle3Draft, **sizes: int) -> list[Trace]:
        traces: list[Trace] = []
        recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size, **sizes)
        run(make_engine(target, copy.deepcopy(draft), max_draft_tokens=K, observer=recorder), requests)
        return traces

    whole = in_order(segments(good_draft))
    pieces = in_order(segments(random_draft(target), segment_tokens=7, overlap_tokens=90))
    assert len(pieces) > 5 * len(whole)
    found: dict[str, RoundTotals] = {}
    scorer = a_scorer(target, good_draft)
    for piece in pieces:
        found[piece.request_id] = found.get(piece.request_id, RoundTotals()) + scorer.score([piece])[0]
    assert found == {trace.request_id: scored_rounds(trace) for trace in whole}
    together = a_scorer(target, good_draft).score(pieces)
    assert sum(together, RoundTotals()) == sum(found.values(), RoundTotals())


@pytest.mark.slow
def test_scores_of_sampled_requests_are_exact_in_expectation(target: Target, good_draft: Eagle3Draft) -> None:
    """With traces that another draft left, of the same noise."""
    requests = [
        replace(r, request_id=f"{n}-{r.request_id}", noise_key=1000 * n + i)
        for n in range(8)
        for i, r in enumerate(some_requests(10, max_tokens=40, temperature=0.8))
    ]
    live = in_order(serve(target, good_draft, requests))
    recorded = in_order(serve(target, random_draft(target), requests))
    assert all(torch.equal(a.token_ids_T, b.token_ids_T) for a, b in zip(recorded, live, strict=True))
    assert {trace.verify for trace in recorded} == {"sampled"}
    found = a_scorer(target, good_draft).score(recorded)
    assert any(rounds.count != int(rounds.count) for rounds in found)
    had = [scored_rounds(trace) for trace in live]
    # Paired by request, scored and actual rounds differ only by chance.
    for name in ("count", "tokens"):
        difference = torch.tensor([getattr(a, name) - getattr(b, name) for a, b in zip(found, had, strict=True)])
        errors = difference.mean() / (difference.std() / len(difference) ** 0.5)
        assert abs(errors) < 4, (name, errors)
    scored, actual = sum(found, RoundTotals()).accepted_length, sum(had, RoundTotals()).accepted_length
    assert scored == pytest.approx(actual, abs=0.05)
