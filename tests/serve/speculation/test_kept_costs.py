"""Kept cost tables: used by the same machine, code and configuration only, and never delay or change an answer."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_models import make_engine, random_draft

from aurora_lit.models.target import Target
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.speculation import calibration
from aurora_lit.serve.speculation.costs import Costs, CostTable
from aurora_lit.serve.speculation.kept_costs import KeptCosts

KEY = {"machine": "this one", "code": "1"}


def engine_with(target: Target, folder: Path, **key: str) -> Engine:
    return make_engine(
        target,
        random_draft(target),
        adaptive=True,
        max_batch_size=2,
        kept_costs=KeptCosts(folder, key={**KEY, **key}),
    )


def tables(costs: Costs) -> dict[str, object]:
    names = ("target", "chain")
    return {"prefill": costs.prefill_position_s, **{name: getattr(costs, name).all_initial for name in names}}


@pytest.fixture
def no_refinement_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_REFINED_AT_START_S", 0.0)


def spoil(folder: Path, *names: str, seconds: float) -> None:
    """Write a time into every row of these kept tables."""
    path = KeptCosts(folder, key=KEY).path
    content = json.loads(path.read_text())
    for name in names:
        content[name] = [[b, q, seconds] for b, q, _ in content[name]]
    path.write_text(json.dumps(content))


@pytest.mark.usefixtures("no_refinement_at_start")
def test_the_next_start_has_the_same_costs_without_measuring(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine_with(target, tmp_path)
    assert all(tables(first.costs).values())
    monkeypatch.setattr(calibration, "_measure", lambda *_, **__: pytest.fail("measures"))
    assert tables(engine_with(target, tmp_path).costs) == tables(first.costs)


def test_a_start_replaces_what_an_earlier_one_measured_beside_other_work(target: Target, tmp_path: Path) -> None:
    engine_with(target, tmp_path)
    spoil(tmp_path, "target", seconds=1000.0)
    engine = engine_with(target, tmp_path)
    assert engine.costs.target(1, 1) < 10.0, "at once"
    kept = Costs(ragged=True)
    assert KeptCosts(tmp_path, key=KEY).load_into(kept)
    assert kept.target(1, 1) < 10.0, "and for the starts that follow"


def test_a_disturbed_start_does_not_replace_what_a_quiet_one_measured(target: Target, tmp_path: Path) -> None:
    engine_with(target, tmp_path)
    spoil(tmp_path, "target", "chain", seconds=1e-9)
    engine = engine_with(target, tmp_path)
    while engine.refine_costs():
        pass
    assert engine.costs.target(1, 1) == engine.costs.chain(2, 1) == 1e-9


def test_a_first_start_does_not_wait_for_all_measurements_where_they_take_long(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CALIBRATED_AT_START_S", 0.0)
    engine = engine_with(target, tmp_path)
    assert not any(tables(engine.costs).values())
    assert not list(tmp_path.iterdir()), "there is nothing to keep"
    assert engine.planner.decide([0.9], batch_size=1).length == 0, "what takes nobody knows how long"
    engine.submit(Request(request_id="a", prompt_ids=[3, 4, 5], params=SamplingParams(max_tokens=4)))
    while engine.has_work:
        engine.round()
    other = engine_with(target, tmp_path)
    while other.refine_costs():
        pass
    assert all(tables(other.costs).values()), "an idle start measures them"
    assert list(tmp_path.iterdir())


def test_what_a_start_had_time_to_measure_is_kept_for_the_next_one(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside a server nobody measures the rest."""
    seconds = itertools.count()
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(calibration, "_CALIBRATED_AT_START_S", 60.0)
    first = engine_with(target, tmp_path)
    assert {size for size, _, _ in first.costs.target.all_initial} == {1}, "there was no time for two sequences"
    monkeypatch.setattr(calibration, "_measure", lambda *_, **__: pytest.fail("measures"))
    assert tables(engine_with(target, tmp_path).costs) == tables(first.costs)


def test_what_idle_moments_have_measured_when_the_first_request_comes_is_kept(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what that request's own rounds took: they have cold caches, and other work beside them."""
    monkeypatch.setattr(calibration, "_CALIBRATED_AT_START_S", 0.0)
    engine = engine_with(target, tmp_path)
    while not engine.costs.target.initial(1, 1):
        assert engine.refine_costs()
    for name in "ab":
        params = SamplingParams(max_tokens=4, temperature=0.0)
        engine.submit(Request(request_id=name, prompt_ids=[3, 4, 5], params=params))
    while engine.has_work:
        engine.round()
    assert any(engine.costs.target.initial(2, length) for length in range(1, 10)), "by rounds"
    assert not engine.refine_costs()
    kept = Costs(ragged=True)
    assert KeptCosts(tmp_path, key=KEY).load_into(kept)
    assert tables(kept) == tables(engine.costs)
    assert {size for size, _, _ in kept.target.all_initial} == {1}


def test_what_was_measured_together_stays_together(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*, seconds: float, seconds_of_pairs: float) -> dict[str, object]:
        def timed_s(operation: calibration._Operation) -> float:
            return seconds_of_pairs if operation.length == 2 else seconds

        monkeypatch.setattr(calibration._Operation, "timed_s", timed_s)
        engine = engine_with(target, tmp_path)
        while engine.refine_costs():
            pass
        return {**tables(engine.costs), "prefill": 0}

    quiet = start(seconds=1.0, seconds_of_pairs=0.5)
    assert start(seconds=2.0, seconds_of_pairs=0.1) == quiet, "a disturbed start, though it had a quiet moment"
    assert start(seconds=0.9, seconds_of_pairs=0.6) != quiet


def test_a_disturbed_measurement_of_a_shorter_query_does_not_last() -> None:
    tables = CostTable(), CostTable()
    operations = [
        calibration._Operation(table=table, length=length, run=list)
        for table, lengths in zip(tables, ([1, 4, 5, 8], [1, 2]), strict=True)
        for length in lengths
    ]
    assert calibration._monotonic(operations, [3.0, 9.0, 5.0, 7.0, 4.0, 2.0]) == [3.0, 5.0, 5.0, 7.0, 2.0, 2.0]


@pytest.mark.parametrize("changed", ["machine", "code"])
def test_costs_of_something_else_are_measured_anew(changed: str, target: Target, tmp_path: Path) -> None:
    engine_with(target, tmp_path)
    engine_with(target, tmp_path, **{changed: "another"})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["half", "empty", "no number", "negative", "another key", "no target"])
def test_a_damaged_file_counts_as_none(
    damage: str, target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine_with(target, tmp_path)
    costs = KeptCosts(tmp_path, key=KEY)
    text = costs.path.read_text()
    content = json.loads(text)
    content |= {
        "no number": {"chain": [[1, 1, "fast"]]},
        "negative": {"prefill_position_s": -1.0},
        "another key": {"key": {"machine": "another"}},
        "no target": {"target": []},
    }.get(damage, {})
    costs.path.write_text({"half": text[: len(text) // 2], "empty": ""}.get(damage, json.dumps(content)))
    empty = make_engine(target, adaptive=False).costs
    with caplog.at_level(logging.WARNING):
        assert not costs.load_into(empty)
    assert str(costs.path) in caplog.text
    assert not any(tables(empty).values()), "nothing was taken over"
    assert all(tables(engine_with(target, tmp_path).costs).values())
    assert costs.load_into(empty), "it was written again"


@pytest.mark.usefixtures("no_refinement_at_start")
def test_idle_moments_measure_again_until_all_is_measured(target: Target, tmp_path: Path) -> None:
    assert not engine_with(target, tmp_path).refine_costs(), "it has just been measured"
    spoil(tmp_path, "target", "chain", seconds=1000.0)
    engine = engine_with(target, tmp_path)
    assert engine.costs.target(1, 1) == 1000.0
    steps = 0
    while engine.refine_costs():
        steps += 1
    assert steps > 20
    assert engine.costs.target(1, 1) < 10.0
    assert tables(engine_with(target, tmp_path).costs) == tables(engine.costs), "and kept"


@pytest.mark.usefixtures("no_refinement_at_start")
def test_a_request_ends_the_measurements_and_is_answered_as_ever(target: Target, tmp_path: Path) -> None:
    engine_with(target, tmp_path)
    engine, plain = engine_with(target, tmp_path), make_engine(target)
    for _ in range(5):
        assert engine.refine_costs()
    answers = []
    for each in (engine, plain):
        params = SamplingParams(max_tokens=12, temperature=0.0)
        each.submit(Request(request_id="a", prompt_ids=[3, 4, 5], params=params))
        assert not each.refine_costs()
        found: list[int] = []
        while each.has_work:
            for output in each.round():
                found += output.token_ids
        answers.append(found)
    assert answers[0] == answers[1]
    assert not engine.refine_costs(), "slots hold what later prompts may begin with"


def test_a_cache_that_cannot_be_written_is_said(
    target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        engine = engine_with(target, tmp_path / "file")
    assert "every start measures them" in caplog.text
    assert all(tables(engine.costs).values())
