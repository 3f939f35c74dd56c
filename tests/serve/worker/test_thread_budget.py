"""Threads of rounds: what the learner and other processes take is given up."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.planner import SpeculationLimits, SpeculationPlanner
from aurora_lit.serve.worker import thread_budget
from aurora_lit.serve.worker.thread_budget import Contention, ThreadBudget


def test_rounds_leave_the_cores_to_a_running_learner_that_computes_on_them(tmp_path: Path) -> None:
    page, now = LearnerStatusPage.create(tmp_path / "page"), [0.0]
    planner = SpeculationPlanner(SpeculationLimits(draft_tokens=2, copied_tokens=0), Costs(ragged=True))
    num_threads = torch.get_num_threads()
    budget = ThreadBudget(planner, page, threads=4, cores=5, monotonic_s=lambda: now[0])

    def followed(busy_threads: int) -> tuple[int, bool]:
        now[0] += 1.0
        page.write(busy_threads=busy_threads)
        budget.before_round()
        planner.observe_round(1, [], 0.1)
        return torch.get_num_threads(), planner.updates_costs

    try:
        torch.set_num_threads(4)
        assert followed(3) == (4, True), "no learner"
        page.beat()
        page.write(pid=os.getpid())
        assert followed(1) == (4, True), "there is a core for it"
        assert planner.costs.target(1, 1) == 0.1
        assert followed(3) == (2, False)
        planner.observe_round(1, [], 9.0)
        assert planner.costs.target(1, 1) == 0.1, "times on fewer cores do not update the costs of rounds"
        assert followed(9) == (1, False)
        assert followed(0) == (4, True), "it rests"
        assert followed(3) == (2, False)
        page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
        assert followed(3) == (4, True), "it was killed at work"
    finally:
        torch.set_num_threads(num_threads)


def observe(contention: Contention, *shares: float) -> list[bool]:
    """Rounds of 10 ms on two threads that got these shares of their processor time."""
    seen = []
    for share in shares:
        contention.observe(wall_s=0.010, cpu_s=0.020 * share, threads=2)
        seen.append(contention.is_on)
    return seen


def test_a_core_is_given_up_after_a_few_disturbed_rounds_in_a_row() -> None:
    now = [0.0]
    contention = Contention(monotonic_s=lambda: now[0])
    assert observe(contention, 0.95, 0.6, 0.6, 0.95, 0.6, 0.6) == [False] * 6, "short disturbances"
    assert observe(contention, 0.6) == [True]
    now[0] += 0.49
    assert contention.is_on
    now[0] += 0.02
    assert not contention.is_on, "all threads are tried again"


def test_each_failure_in_a_row_doubles_the_time_on_one_thread() -> None:
    now, waits = [0.0], []
    contention = Contention(monotonic_s=lambda: now[0])
    for _ in range(7):
        observe(contention, 0.5, 0.5, 0.5)
        began = now[0]
        while contention.is_on:
            now[0] += 0.125
        waits.append(now[0] - began)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    observe(contention, 0.95)
    observe(contention, 0.5, 0.5, 0.5)
    now[0] += 0.5
    assert not contention.is_on, "an undisturbed round resets it"


def test_rounds_beside_a_busy_process_run_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time is that of the process: one thread that sleeps instead of computing is a core that others have."""
    page, planner = (
        LearnerStatusPage.create(tmp_path / "page"),
        SpeculationPlanner(SpeculationLimits(draft_tokens=2, copied_tokens=0), Costs(ragged=True)),
    )
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(thread_budget.time, name, lambda name=name: clocks[name])
    num_threads, now = torch.get_num_threads(), [0.0]
    contention = Contention(monotonic_s=lambda: now[0])
    budget = ThreadBudget(planner, page, threads=2, cores=2, contention=contention, monotonic_s=lambda: now[0])

    def round_on(cores: float) -> tuple[int, bool]:
        budget.before_round()
        threads = torch.get_num_threads()
        clocks["perf_counter"] += 0.010
        clocks["process_time"] += 0.010 * min(cores, threads)
        budget.after_round()
        return threads, planner.updates_costs

    try:
        torch.set_num_threads(2)
        assert [round_on(1.2) for _ in range(4)] == [(2, True)] * 3 + [(1, False)]
        now[0] += 0.6
        assert round_on(2.0) == (2, True)
        assert round_on(2.0) == (2, True)
    finally:
        torch.set_num_threads(num_threads)
