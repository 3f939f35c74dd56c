"""Traces with looping answers reach neither batches nor gate; the others wait for a trial and are then trained on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.learner_harness import MakeHarness
from support.live_traces import make_controller, serve, some_requests
from support.tiny_models import random_draft

from aurora_lit.learn.online.intake import MAX_REPEATED_SHARE, TraceIntake, is_looping, repeated_share
from aurora_lit.learn.online.trial import Trial
from aurora_lit.models.interface import Target
from aurora_lit.traces.record import Trace


@pytest.fixture(scope="module")
def traffic(target: Target) -> list[Trace]:
    return serve(target, random_draft(target), some_requests(24, max_tokens=40, temperature=1.0))


def test_the_share_of_repeated_grams() -> None:
    assert repeated_share(torch.arange(40)) == 0.0
    assert repeated_share(torch.arange(4).repeat(10)) == pytest.approx(1 - 4 / 37)
    assert repeated_share(torch.cat([torch.arange(23), torch.arange(20)])) == pytest.approx(17 / 40)
    assert repeated_share(torch.zeros(18)) == 0.0, "too short to tell"


def with_answer(trace: Trace, answer: torch.Tensor) -> Trace:
    """A trace without rounds whose answer is this."""
    start, length = trace.answer_start, trace.answer_start + len(answer)
    tokens = torch.cat([trace.token_ids_T[:start], answer.int()])
    none = replace(Trace(answer_start=0, token_ids_T=tokens, aux_T3H=trace.aux_T3H, last_TH=trace.last_TH))
    rounds = {name: getattr(none, name) for name in vars(none) if name.endswith(("_R", "_RK", "_NH"))}
    return replace(trace, token_ids_T=tokens, aux_T3H=trace.aux_T3H[:length], last_TH=trace.last_TH[:length], **rounds)


def test_only_repetition_in_the_answer_counts_and_the_setting_sets_how_much(traffic: list[Trace]) -> None:
    trace = traffic[0]
    loop = with_answer(trace, torch.arange(5).repeat(6))
    assert is_looping(loop, max_repeated_share=0.7)
    assert not is_looping(loop, max_repeated_share=1.0)
    in_prompt = replace(loop, answer_start=len(loop.token_ids_T) - 12)
    assert not is_looping(in_prompt, max_repeated_share=0.7), "the loop is in the prompt"


def test_loops_reach_neither_batches_nor_the_gate_and_are_counted(make: MakeHarness, traffic: list[Trace]) -> None:
    harness = make(max_repeated_share=MAX_REPEATED_SHARE)
    loops = [
        replace(with_answer(trace, torch.arange(5).repeat(7)), request_id=f"loop {n}")
        for n, trace in enumerate(traffic)
    ]
    harness.ring.records.extend([*loops, *traffic])
    harness.tick_until(lambda: not harness.ring.records)
    harness.loop.tick()
    page = harness.page.read()
    assert (page.looping, page.records) == (len(loops), len(loops) + len(traffic))
    assert not any(request.request_id.startswith("loop") for request in harness.loop.trial)
    names = {trace.request_id for _ in range(50) if (trace := harness.loop.batcher.reservoir.sample())}
    assert names
    assert not any(name.startswith("loop") for name in names)


def test_requests_wait_before_they_are_learned_from_and_at_the_start_every_second_one(traffic: list[Trace]) -> None:
    learned: list[tuple[str, int]] = []

    class Batches:
        def add(self, trace: Trace) -> None:
            learned.append((trace.request_id, trace.first_position))

        def rename_domain(self, removed: str, kept: str) -> None:
            renamed.append((removed, kept))

    batches: Any = Batches()
    trial, controller, renamed = Trial(seed=0, num_waiting=4), make_controller(), list[tuple[str, str]]()
    intake = TraceIntake(controller, batches, trial)
    intake.max_repeated_share = 1.0
    waiting, names = [], [f"r{n}" for n in range(40)]
    for name in names:
        intake.add(replace(traffic[0], request_id=name))
        waiting.append(len(trial.newest))
    assert waiting == [0, 1, 1, 2, 2, 3, 3, *[4] * 33]
    in_time = [name for name in names[:36] if not Trial.is_kept(name)]
    assert [name for name, _ in learned] == in_time
    assert [request.request_id for request in trial.newest] == names[36:]
    learned.clear()
    for name in (in_time[-1], names[-1]):  # another segment of each
        intake.add(replace(traffic[0], request_id=name, first_position=64))
    assert learned == [(in_time[-1], 64)], "what was learned from is not tried, not in part either"
    assert [len(request.traces) for request in trial.newest] == [1, 1, 1, 2]
    controller.on_merge("auto-1", "auto-2")
    assert renamed == [("auto-1", "auto-2")]


def test_what_speaks_against_challengers_is_forgotten_when_traffic_is_new(traffic: list[Trace]) -> None:
    """And not what speaks for them: the next one may well be as good."""
    batches: Any = SimpleNamespace(add=lambda trace: None)
    trial, number = Trial(seed=0, num_waiting=4), itertools.count()
    intake = TraceIntake(make_controller(), batches, trial)
    intake.max_repeated_share = 1.0

    def evidence_after(domain: str, changes: list[float]) -> float:
        trial.evidence.clear()
        trial.evidence.add(changes)
        intake.add(replace(traffic[0], request_id=f"r{next(number)}", domain=domain))
        return trial.evidence.value

    assert evidence_after("chat", [-0.2] * 3) == 1.0
    assert evidence_after("chat", [-0.2] * 3) < 0.5, "nothing is new"
    assert evidence_after("code", [-0.2] * 3) == 1.0
    assert evidence_after("mails", [0.2] * 3) > 2.0
