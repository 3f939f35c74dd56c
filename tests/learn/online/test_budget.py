"""The budget holds learning to a share of the processors' time."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_lit.learn.online import budget as budgets
from aurora_lit.learn.online.budget import Budget, ServerLoad, ShareLimit


class FakeMachine:
    """Wall and processor time, moved by hand."""

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0

    def work(self, cpu_s: float, *, slowdown: float = 1.0) -> None:
        self.cpu += cpu_s
        self.wall += cpu_s * slowdown

    def sleep(self, seconds: float) -> None:
        self.wall += seconds


def a_budget(machine: FakeMachine, **changes: Any) -> Budget:
    fields = {"idle_share": 0.0, "cpus": 2, **changes}
    return Budget(**fields, wall_s=lambda: machine.wall, cpu_s=lambda: machine.cpu)


@pytest.mark.parametrize(("share", "step_s", "slowdown"), [(0.04, 2.0, 1.0), (0.04, 0.05, 3.0), (0.3, 0.5, 1.5)])
@pytest.mark.parametrize(
    ("load", "least", "part"),
    [
        (ServerLoad.IDLE, 0.2, 1.0),
        (ServerLoad.SPARE, 0.0, 1.0),
        (ServerLoad.FULL, 0.0, 0.5),
        (ServerLoad.QUEUEING, 0.0, 0.125),
    ],
)
def test_the_budget_holds_its_share_within_a_fifth(
    share: float, step_s: float, slowdown: float, load: ServerLoad, least: float, part: float
) -> None:
    machine = FakeMachine()
    budget = a_budget(machine, idle_share=0.2, share=share)
    machine.sleep(30)  # nothing to do at first: only a little of that is kept
    began_wall, began_cpu = machine.wall, machine.cpu
    while machine.wall < began_wall + 3600:
        if wait_s := budget.wait_s(load):
            machine.sleep(min(wait_s, 0.2))
        else:
            machine.work(step_s, slowdown=slowdown)
    used = (machine.cpu - began_cpu) / (2 * (machine.wall - began_wall))
    assert used == pytest.approx(max(least, part * share), rel=0.2)


def test_a_long_idle_time_is_not_caught_up_with() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.04)
    machine.sleep(3600)
    began = machine.cpu
    while budget.wait_s(ServerLoad.SPARE) == 0:
        machine.work(0.05)
    assert machine.cpu - began < 1.0


def test_time_without_requests_is_not_saved_for_when_there_are_some() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, idle_share=0.5, share=0.04)
    for _ in range(100):
        machine.sleep(1)
        assert budget.wait_s(ServerLoad.IDLE) == 0
    began = machine.cpu
    while budget.wait_s(ServerLoad.SPARE) == 0:
        machine.work(0.05)
    assert machine.cpu - began < 1.0


def test_the_measured_share_is_that_of_the_last_minute() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.5)
    machine.work(60)
    assert budget.wait_s(ServerLoad.SPARE) == 0
    assert budget.measured_share == pytest.approx(0.5)
    for _ in range(100):
        machine.sleep(1)
        budget.wait_s(ServerLoad.SPARE)
    assert budget.measured_share == pytest.approx(0)


def test_debts_are_paid_off_at_the_rate_of_the_load() -> None:
    machine = FakeMachine()
    budget = a_budget(machine, share=0.5, cpus=1)
    machine.work(1)
    assert budget.wait_s(ServerLoad.QUEUEING) == pytest.approx(15.0), "what was worked earned a sixteenth of it"
    assert budget.wait_s(ServerLoad.FULL) == pytest.approx(3.75)
    assert budget.wait_s(ServerLoad.SPARE) == pytest.approx(1.875)


def test_a_kind_of_work_takes_its_share_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine()
    monkeypatch.setattr(budgets.time, "process_time", lambda: machine.cpu)
    limit, spent, began = ShareLimit(0.1), 0.0, machine.cpu
    for number in range(2000):
        if limit.is_due:
            with limit.measured():
                cost_s = (1.0, 0.2, 5.0)[number % 3]
                machine.work(cost_s)
                spent += cost_s
        machine.work(0.1)
        machine.sleep(10)  # only processor time counts
    assert spent / (machine.cpu - began) == pytest.approx(0.1, rel=0.15)
    with limit.measured():
        machine.work(100)
    assert not limit.is_due
