"""Rounds made from a recorded answer are those that a live engine with the same draft has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.live_traces import online_module, serve, some_requests
from support.replay_harness import K, in_order
from support.tiny_models import make_engine, random_draft, run
from support.trace_examples import keep_in

from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.offline.on_policy import RoundSimulator
from aurora_lit.learn.offline.scoring import RoundScorer, RoundWalk
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace, check, to_bytes

REACH = 6
"""Most tokens that a round accepts with copies."""


@pytest.fixture(scope="module")
def recorded(target: Target) -> list[Trace]:
    """Answered by way of a draft that knows nothing."""
    return in_order(serve(target, random_draft(target), some_requests(10, max_tokens=40)))


@pytest.fixture(scope="module")
def pieces(target: Target) -> list[Trace]:
    """The same in segments of seven tokens."""
    traces: list[Trace] = []
    recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size, segment_tokens=7, overlap_tokens=90)
    draft = random_draft(target)
    run(make_engine(target, draft, max_draft_tokens=K, observer=recorder), some_requests(10, max_tokens=40))
    return in_order(traces)


def make_simulator(target: Target, draft: Eagle3Draft, *, reach: int = 0) -> RoundSimulator:
    return RoundSimulator(module=online_module(target, draft, num_steps=K), reach=reach, batch_positions=256)


def whole_rounds(trace: Trace) -> list[tuple[int, int, tuple[int, ...]]]:
    """Root, accepted, and proposals up to the first rejection, of the rounds that end within the trace."""
    accepted, proposals = trace.num_accepted_R.tolist(), trace.proposal_RK.tolist()
    return [
        (trace.first_position + root, n, tuple(row[: min(n + 1, K)]))
        for root, n, row in zip(trace.round_root_R.tolist(), accepted, proposals, strict=True)
        if root <= len(trace.token_ids_T) - 1 - K
    ]


def test_simulated_rounds_are_those_of_a_live_engine(
    target: Target, good_draft: Eagle3Draft, recorded: list[Trace]
) -> None:
    live = in_order(serve(target, good_draft, some_requests(10, max_tokens=40)))
    found = make_simulator(target, good_draft).simulate_rounds(recorded, version=7)
    assert [whole_rounds(trace) for trace in found] == [whole_rounds(trace) for trace in live]
    assert sum(int(trace.num_accepted_R.sum()) for trace in found) > 20
    for trace in found:
        check(trace)
        assert set(trace.round_version_R.tolist()) == {7}


def some_copies(trace: Trace) -> list[int]:
    """Numbers of accepted copies, up to REACH, that depend on the position in the request alone."""
    return [(trace.first_position + root) * 7 % 11 % (REACH + 1) for root in range(len(trace.token_ids_T))]


def test_with_copies_the_rounds_are_those_that_a_replay_scores(
    target: Target, good_draft: Eagle3Draft, recorded: list[Trace]
) -> None:
    copied = [some_copies(trace) for trace in recorded]
    simulator = make_simulator(target, good_draft, reach=REACH)
    found = simulator.simulate_rounds(recorded, version=0, copied=copied)
    scorer = RoundScorer(simulator.module, TargetHead(target), batch_positions=256, reach=REACH)
    accept = scorer.accept_probabilities(recorded)
    walk = RoundWalk(reach=REACH)
    for trace, own, copied_T, accept_KT in zip(recorded, found, copied, accept, strict=True):
        served_R = torch.maximum(own.num_accepted_R, torch.tensor(copied_T)[own.round_root_R])
        totals = walk.walk(trace, accept_KT, copied_T)
        assert (totals.count, totals.tokens) == (len(served_R), float((1 + served_R).sum()))
        check(own)
    alone = {
        root: n
        for trace in make_simulator(target, good_draft).simulate_rounds(recorded, version=0)[:1]
        for root, n in zip(trace.round_root_R.tolist(), trace.num_accepted_R.tolist(), strict=True)
    }
    beside = dict(zip(found[0].round_root_R.tolist(), found[0].num_accepted_R.tolist(), strict=True))
    assert all(alone[root] == beside[root] for root in alone.keys() & beside.keys()), "the draft's own, without copies"


@pytest.mark.parametrize("copies", [pytest.param(False, marks=pytest.mark.slow), True])
def test_segments_of_a_request_have_the_rounds_of_the_whole(
    target: Target, good_draft: Eagle3Draft, recorded: list[Trace], pieces: list[Trace], copies: bool
) -> None:
    assert len(pieces) > 3 * len(recorded)
    simulator = make_simulator(target, good_draft, reach=REACH * copies)
    found: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for piece in pieces:
        copied = [some_copies(piece)] if copies else None
        # Asking again changes nothing.
        twice = [simulator.simulate_rounds([piece], version=0, copied=copied)[0] for _ in range(2)]
        assert whole_rounds(twice[0]) == whole_rounds(twice[1])
        check(twice[0])
        found.setdefault(piece.request_id, []).extend(whole_rounds(twice[0]))
    whole = make_simulator(target, good_draft, reach=REACH * copies).simulate_rounds(
        recorded, version=0, copied=[some_copies(trace) for trace in recorded] if copies else None
    )
    assert found == {trace.request_id: whole_rounds(trace) for trace in whole}


def test_requests_that_are_not_greedy_keep_their_rounds_which_are_of_no_version_here(
    target: Target, good_draft: Eagle3Draft
) -> None:
    for params in ({"temperature": 0.7, "seed": 5}, {"temperature": 0.7}):
        traces = serve(target, random_draft(target), some_requests(3, **params))
        found = make_simulator(target, good_draft).simulate_rounds(traces, version=9)
        for own, trace in zip(found, traces, strict=True):
            assert set(own.round_version_R.tolist()) == {-1}
            assert to_bytes(replace(own, round_version_R=trace.round_version_R)) == to_bytes(trace)
