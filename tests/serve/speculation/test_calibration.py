"""The start's measurements: few before the first request is taken, the others while none is there."""

from __future__ import annotations

import pytest
from support.tiny_models import make_engine, random_draft, request, run

from aurora_lit.models.interface import Target
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.speculation import calibration


def calibrated(target: Target) -> Engine:
    return make_engine(target, random_draft(target), adaptive=True, max_batch_size=4)


def sizes(engine: Engine) -> set[int]:
    return {size for size, _, _ in engine.costs.target.all_initial}


def test_a_start_waits_for_one_sequence_and_a_full_batch_and_idle_moments_measure_the_rest(target: Target) -> None:
    engine = calibrated(target)
    assert sizes(engine) == {1, 4}
    while engine.refine_costs():
        pass
    assert sizes(engine) == {1, 2, 4}
    assert {size for size, _, _ in engine.costs.chain.all_initial} == {1, 2, 4}


def test_beside_other_work_a_start_waits_for_one_sequence_alone(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_MOST_S", 0.0)
    assert sizes(calibrated(target)) == {1}


def test_the_median_counts_and_no_operation_takes_longer_than_a_longer_one(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the calls are disturbed; passes of two tokens always."""
    calls = iter(range(1 << 20))

    def timed_s(run: object) -> float:
        length = getattr(run, "args", (0,))[0]
        return (0.002 if isinstance(length, int) and length != 2 else 0.005) + (next(calls) % 3 == 0)

    monkeypatch.setattr(calibration, "_timed_s", timed_s)
    engine = calibrated(target)
    while engine.refine_costs():
        pass
    assert {seconds for _, length, seconds in engine.costs.target.all_initial} == {0.002}


def test_a_request_ends_the_measurements_and_is_answered_as_ever(target: Target) -> None:
    engine, plain = calibrated(target), make_engine(target)
    for _ in range(5):
        assert engine.refine_costs()
    asked = [request("a", [3, 4, 5], max_tokens=12)]
    answers = run(engine, asked), run(plain, asked)
    assert answers[0]["a"].token_ids == answers[1]["a"].token_ids
    assert not engine.refine_costs(), "slots hold what later prompts may begin with"
