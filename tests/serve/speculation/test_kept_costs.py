"""Kept cost tables: used by the same machine, code and configuration only, and never delay or change an answer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_models import make_engine, random_draft

from aurora_lit.models.interface import Target
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.speculation import calibration, kept_costs
from aurora_lit.serve.speculation.costs import Costs, CostTable
from aurora_lit.serve.speculation.kept_costs import KeptCosts

KEY = {"machine": "this one", "code": "1"}
Start = Callable[[Target, Path, float], tuple[Costs, float]]


def engine_with(target: Target, folder: Path, **key: str) -> Engine:
    return make_engine(
        target,
        random_draft(target),
        adaptive=True,
        max_batch_size=2,
        kept_costs=KeptCosts(folder, key={**KEY, **key}),
    )


def idle_engine_with(target: Target, folder: Path) -> Engine:
    """An engine whose start waited for its first request until all was measured."""
    engine = engine_with(target, folder)
    while engine.refine_costs():
        pass
    return engine


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
    first = idle_engine_with(target, tmp_path)
    assert all(tables(first.costs).values())
    monkeypatch.setattr(calibration, "_measure", lambda *_, **__: pytest.fail("measures"))
    assert tables(engine_with(target, tmp_path).costs) == tables(first.costs)


def test_a_start_replaces_what_an_earlier_one_measured_beside_other_work(target: Target, tmp_path: Path) -> None:
    idle_engine_with(target, tmp_path)
    spoil(tmp_path, "target", seconds=1000.0)
    engine = engine_with(target, tmp_path)
    assert engine.costs.target(1, 1) < 10.0, "at once"
    kept = Costs(ragged=True)
    assert KeptCosts(tmp_path, key=KEY).load_into(kept)
    assert kept.target(1, 1) < 10.0, "and for the starts that follow"


def test_a_disturbed_start_does_not_replace_what_a_quiet_one_measured(target: Target, tmp_path: Path) -> None:
    idle_engine_with(target, tmp_path)
    spoil(tmp_path, "target", "chain", seconds=1e-9)
    engine = idle_engine_with(target, tmp_path)
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
    other = idle_engine_with(target, tmp_path)
    assert all(tables(other.costs).values()), "an idle start measures them"
    assert list(tmp_path.iterdir())


@pytest.fixture
def timed_start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes an engine, whose timed calls each seem to take so many seconds; its costs, and how long measuring took."""
    now_s = 0.0

    def start(target: Target, folder: Path, seconds: float) -> tuple[Costs, float]:
        def timed_s(_: calibration._Operation) -> float:
            nonlocal now_s
            now_s += seconds
            return seconds

        began_s = now_s
        monkeypatch.setattr(calibration._Operation, "timed_s", timed_s)
        monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: now_s))
        costs = engine_with(target, folder).costs
        return costs, now_s - began_s

    return start


def seconds_by_batch_size(costs: Costs) -> dict[int, set[float]]:
    found: dict[int, set[float]] = {}
    for size, _, seconds in costs.target.all_initial:
        found.setdefault(size, set()).add(seconds)
    return found


def test_a_first_start_measures_one_sequence_and_a_full_batch(
    target: Target, tmp_path: Path, timed_start: Start
) -> None:
    costs, took_s = timed_start(target, tmp_path, 0.1)
    assert seconds_by_batch_size(costs) == {1: {0.1}, 2: {0.1}}
    assert costs.chain(2, 1) == 0.1
    assert 2.0 < took_s < 5.0, "and no more"
    assert timed_start(target, tmp_path, 0.1)[1] < 1.0, "nothing is missing"


def test_a_start_goes_on_where_an_earlier_one_was_cut_off(target: Target, tmp_path: Path, timed_start: Start) -> None:
    """Outside a server nobody measures the rest, or measures again what was measured beside other work."""
    costs, took_s = timed_start(target, tmp_path, 0.4)
    assert seconds_by_batch_size(costs) == {1: {0.4}}, "there was no time for two sequences"
    assert took_s >= 10.0
    costs, _ = timed_start(target, tmp_path, 0.02)
    assert seconds_by_batch_size(costs) == {1: {0.4}, 2: {0.02}}


def test_times_of_a_few_calls_are_used_but_not_kept(target: Target, tmp_path: Path, timed_start: Start) -> None:
    costs, took_s = timed_start(target, tmp_path, 0.9)
    assert took_s >= 10.0
    assert costs.target(1, 1) == costs.chain(1, 1) == 0.9
    assert not list(tmp_path.iterdir())


def test_what_idle_moments_have_measured_when_the_first_request_comes_is_kept(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what that request's own rounds took: they have cold caches, and other work beside them."""
    monkeypatch.setattr(calibration, "_CALIBRATED_AT_START_S", 0.0)
    engine = engine_with(target, tmp_path)
    while not engine.costs.target.all_initial:
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
        engine = idle_engine_with(target, tmp_path)
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


def test_the_newest_files_are_kept(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_costs, "_KEPT_FILES", 2)
    costs = engine_with(target, tmp_path).costs
    for number in range(4):
        kept = KeptCosts(tmp_path, key={"number": str(number)})
        kept.save(costs)
        os.utime(kept.path, (number, number))
    KeptCosts(tmp_path, key={"number": "4"}).save(costs)
    newest = (KEY, {"number": "4"})
    assert set(tmp_path.iterdir()) == {KeptCosts(tmp_path, key=key).path for key in newest}


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
    idle_engine_with(target, tmp_path)
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
