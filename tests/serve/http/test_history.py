"""History: bounded and in order, without loss of what totals add up to; events are changes between two samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from aurora_lit.ipc.engine_status import EngineStatus, EngineStatusPage, TrafficTotals, WorkerState
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.http.history import (
    ALL,
    MAX_EVENTS,
    MAX_POINTS,
    MIN_ROUNDS,
    History,
    changes,
    learned_domains,
    point_of,
)
from aurora_lit.serve.http.status import engine_json, learner_json, traffic_json

LATENCIES = {"time_to_first_token": (0.5, 3)}


@pytest.fixture
def report(tmp_path) -> dict[str, Any]:
    """As GET /v1/aurora/status makes it of fresh pages."""
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(state=WorkerState.READY, max_draft_tokens=2, generated_by_source=[5, 3, 1, 2], drafts=4, accepted=6)
    page.write(domain_names="sql\nprose", domain_numbers=[1, 8, 3, 9, 5, 1, 3, 1, 2, 1], draft_version="start")
    page.write(compared_us=2_000_000, compared_plain_us=3_000_000)
    status: EngineStatus = page.read()
    learner = LearnerStatusPage.create(tmp_path / "learner").read()
    kinds = traffic_json({"fim": TrafficTotals(2, 9, 4, 12, 5)})
    return engine_json(status, None) | {"model": "m", "kinds": kinds, "learner": learner_json(learner)}


def changed(report: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    now = copy.deepcopy(report)
    part = now
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = to
    return now


def test_a_point_has_the_totals_that_the_page_takes_differences_of(report) -> None:
    now = changed(report, "learner", "domains", "now", to="sql 75% (heat 0.99), unknown 25% (heat 1.00)")
    point = point_of(now, LATENCIES)
    assert point["sources"] == [5, 3, 1, 2]
    assert (point["drafts"], point["accepted"]) == (4, 6)
    assert point["against_plain"] == [3.0, 2.0]
    assert point["domains"] == {"sql": [8, 3, 5], "prose": [3, 1, 1]}
    assert point["kinds"] == {"fim": [9, 4, 5]}
    assert point["heat"] == {"sql": [0.75, 0.99], "unknown": [0.25, 1.0]}
    assert point["latencies"] == LATENCIES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("a, b 40% (heat 0.13), c 9% (heat 0.20)", ["a, b", "c"]),
        ("(odd) 5% 7% (heat 1.00)", ["(odd) 5%"]),
        ("auto-1 60% (heat 0.13), auto-2 30% (hea", ["auto-1"]),  # as the page's text field cuts it
    ],
)
def test_domains_of_the_learners_text(text: str, names: list[str]) -> None:
    assert list(learned_domains(text)) == names


def test_the_history_is_bounded_in_order_and_keeps_its_ends(report) -> None:
    history = History()
    for second in range(10 * MAX_POINTS):
        history.add(changed(report, "speculation", "drafts", to=second), latencies=LATENCIES, now_s=1000.0 + second)
        assert len(history.points) <= MAX_POINTS
    times = [point["time"] for point in history.points]
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == (1000.0, 999.0 + 10 * MAX_POINTS)
    assert [point["drafts"] for point in history.points] == [time - 1000 for time in times]
    gaps = [(times[-1] - later, later - earlier) for earlier, later in zip(times, times[1:], strict=False)]
    assert all(gap == 1 for age, gap in gaps if age < 60), "the last minute stays whole"
    assert all(gap <= 2 + 0.05 * age for age, gap in gaps)


def served(report: dict[str, Any], drafts: int, accepted: int, **domains: tuple[int, int]) -> dict[str, Any]:
    """After so many rounds with proposals and accepted tokens in all, and by domain."""
    now = {**report, "speculation": {**report["speculation"], "drafts": drafts, "accepted": accepted}}
    rows = {name: {"generated_tokens": 0, "drafts": row[0], "accepted": row[1]} for name, row in domains.items()}
    return now | {"domains": {**report["domains"], "served": rows}}


def test_the_first_accepted_lengths_stay_those_of_the_first_minute(report) -> None:
    """Through a day in which the draft learns, while the points of that minute go."""
    history = History()
    accepted = 0
    for minute in range(24 * 60):
        drafts, hour = 100 * minute, minute // 60
        now = served(report, drafts, accepted, sql=(drafts, accepted), late=(100 * hour, 250 * hour))
        history.add(now, latencies={}, now_s=60.0 * minute)
        accepted += 100 + minute // 10
    assert [point["time"] for point in history.points[:3]] != [0.0, 60.0, 120.0]
    assert history.first_lengths == {ALL: 2.0, "sql": 2.0, "late": 3.5}


def test_first_accepted_lengths_want_enough_rounds_and_a_settled_server(report) -> None:
    history = History()
    for now_s, drafts, lengths in [
        (0.0, 0, {}),
        (5.0, 2 * MIN_ROUNDS, {}),  # too young
        (70.0, 3 * MIN_ROUNDS - 1, {}),  # too few within a minute
        (80.0, 4 * MIN_ROUNDS, {ALL: 3.0, "sql": 3.0}),
    ]:
        history.add(served(report, drafts, 2 * drafts, sql=(drafts, 2 * drafts)), latencies={}, now_s=now_s)
        assert history.first_lengths == lengths


def test_first_accepted_lengths_are_as_many_as_domains_that_are_counted(report) -> None:
    """A domain whose row was lost begins at 0 if it comes back."""
    history = History()
    for hour in range(50):
        history.add(served(report, 0, 0), latencies={}, now_s=3600.0 * hour)
        row = {f"auto-{hour}": (100, 50)}
        history.add(served(report, 0, 0, **row), latencies={}, now_s=3600.0 * hour + 30)
        assert history.first_lengths == {f"auto-{hour}": 1.5}
    history.add(served(report, 0, 0), latencies={}, now_s=180_000.0)
    assert history.first_lengths == {}


def test_events_are_bounded_numbered_and_asked_for_by_number(report) -> None:
    history = History()
    for swap in range(MAX_EVENTS + 51):
        history.add(changed(report, "draft", "version", to=f"draft-{swap:06}"), latencies={}, now_s=float(swap))
    events = history.events_after(0)
    assert [event["number"] for event in events] == list(range(51, MAX_EVENTS + 51))
    assert events[-1] == {
        "number": MAX_EVENTS + 50,
        "time": float(MAX_EVENTS + 50),
        "kind": "swapped",
        "version": f"draft-{MAX_EVENTS + 50:06}",
        "count": 0,
    }
    assert history.events_after(MAX_EVENTS + 49) == events[-1:]
    assert history.events_after(MAX_EVENTS + 50) == []


def test_nothing_is_an_event_that_was_so_from_the_start(report) -> None:
    history = History()
    history.add(changed(report, "draft", "rollbacks", to=3), latencies={}, now_s=0.0)
    assert history.events_after(0) == []
    assert list(changes(report, copy.deepcopy(report))) == []


def test_what_changes_is_an_event(report) -> None:
    now = copy.deepcopy(report)
    now["learner"]["gate"] = {"published": 1, "refused": 2, "champion": 2.0, "challenger": 2.1}
    report["learner"]["domains"] |= {"rate_factor": 1.0}
    now["learner"] |= {"version": "draft-000001", "state": "running"}
    now["learner"]["domains"] |= {"shifts": 1, "last_shift": "to sql"}
    now["draft"] |= {"version": "draft-000001", "swaps": 1, "refusals": 1}
    now["draft"]["refused"] = {"version": "draft-000009", "reason": "torn"}
    now["draft"] |= {"alarms": 1, "alarm": {"version": "draft-000001", "reason": "worse for one"}}
    now["worker"] |= {"state": "failed", "error": "out of memory"}
    verdict = {"challenger": 2.1, "champion": 2.0}
    assert list(changes(report, now)) == [
        {"kind": "held_back", "count": 2, **verdict},
        {"kind": "published", "version": "draft-000001", "count": 1, **verdict},
        {"kind": "refused", "version": "draft-000009", "reason": "torn"},
        {"kind": "alarm", "version": "draft-000001", "reason": "worse for one"},
        {"kind": "swapped", "version": "draft-000001", "count": 1},
        {"kind": "shift", "reason": "to sql"},
        {"kind": "learner", "state": "running", "reason": None},
        {"kind": "worker", "state": "failed", "reason": "out of memory"},
    ]


def test_a_rollback_is_not_also_a_swap(report) -> None:
    before = changed(report, "draft", "version", to="draft-000002")
    now = changed(before, "draft", "version", to="draft-000001")
    now["draft"] |= {"rollbacks": 1, "swaps": 1, "rolled_back": {"version": "draft-000002", "reason": "accepts less"}}
    assert list(changes(before, now)) == [
        {"kind": "rolled_back", "version": "draft-000002", "reason": "accepts less", "to": "draft-000001"}
    ]


def test_a_rollback_is_told_when_another_draft_serves(report) -> None:
    """From the verdict until that is loaded, the bad one serves."""
    before = changed(report, "draft", "version", to="draft-000002")
    judged = copy.deepcopy(before)
    judged["draft"] |= {"rollbacks": 1, "rolled_back": {"version": "draft-000002", "reason": "accepts less"}}
    loaded = changed(judged, "draft", "version", to="draft-000001")
    assert list(changes(before, judged)) == []
    assert [(event["kind"], event["to"]) for event in changes(judged, loaded)] == [("rolled_back", "draft-000001")]
    later = changed(loaded, "draft", "version", to="draft-000003")
    assert [event["kind"] for event in changes(loaded, later)] == ["swapped"]


def test_shifts_before_a_restart_are_no_event(report) -> None:
    now = changed(report, "learner", "domains", "shifts", to=4)
    assert report["learner"]["domains"]["rate_factor"] == 0
    assert list(changes(report, now)) == []


@pytest.mark.parametrize("num_points", [MAX_POINTS - 1, MAX_POINTS])
def test_a_long_pause_leaves_a_gap_and_the_history_goes_on(report, num_points: int) -> None:
    history = History()
    for second in range(num_points):
        history.add(report, latencies={}, now_s=float(second))
    for second in range(3):
        history.add(report, latencies={}, now_s=10_000.0 + second)
    times = [point["time"] for point in history.points]
    assert len(times) == MAX_POINTS
    assert times[-3:] == [10_000.0, 10_001.0, 10_002.0]
