"""Threads of rounds: what the learner and other processes take is given up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from aurora_lit.serve.engine.thread_budget import Contention, ThreadBudget


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The clocks that rounds are timed with."""
    clocks = {"perf_counter": 0.0, "process_time": 0.0, "thread_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(time, name, lambda name=name: clocks[name])
    return clocks


def test_rounds_leave_the_cores_to_a_learner_that_computes_on_them() -> None:
    busy = [0]
    budget = ThreadBudget(threads=4, cores=5, busy_cores=lambda: busy[0])

    def with_busy(cores: int) -> tuple[int, bool]:
        busy[0] = cores
        uses_all = budget.before_round()
        return torch.get_num_threads(), uses_all

    torch.set_num_threads(4)
    assert with_busy(0) == (4, True)
    assert with_busy(1) == (4, True), "there is a core for it"
    assert with_busy(3) == (2, False)
    assert with_busy(9) == (1, False)
    assert with_busy(0) == (4, True)


def observe(contention: Contention, *shares: float) -> list[bool]:
    """Passes of a 64th of a second on two threads that got these shares of their processor time."""
    seen = []
    for share in shares:
        contention.observe(wall_s=1 / 64, cpu_s=share / 32, threads=2)
        seen.append(contention.is_on)
    return seen


def test_a_core_is_given_up_after_a_tenth_of_a_second_of_disturbed_passes() -> None:
    now = [0.0]
    contention = Contention(monotonic_s=lambda: now[0])
    assert observe(contention, *[0.95, 0.6, 0.6, 0.95, 0.6, 0.95, 0.95] * 5) == [False] * 35, "short disturbances"
    assert observe(contention, *[0.6] * 7) == [False] * 6 + [True]
    now[0] += 0.49
    assert contention.is_on
    now[0] += 0.02
    assert not contention.is_on, "all threads are tried again"


def test_a_core_is_given_up_at_once_after_a_disturbed_pass_that_took_long() -> None:
    contention = Contention(monotonic_s=lambda: 0.0)
    contention.observe(wall_s=0.2, cpu_s=0.39, threads=2)
    assert not contention.is_on, "a long prompt"
    contention.observe(wall_s=0.2, cpu_s=0.2, threads=2)
    assert contention.is_on


@pytest.mark.parametrize(
    ("tick_s", "pass_s"), [(0.001, 0.0027), (0.004, 0.0005), (0.004, 0.009), (0.010, 0.0027), (0.010, 0.04)]
)
@pytest.mark.parametrize(("threads", "of_others", "gives_up"), [(2, 1.0, False), (2, 0.3, True), (16, 1.0, False)])
def test_the_time_of_other_threads_is_known_as_of_the_last_tick_only(
    tick_s: float, pass_s: float, threads: int, of_others: float, gives_up: bool, clocks: dict[str, float]
) -> None:
    """On Linux. Here the others compute for `of_others` of the time of passes, and wait between them."""
    budget, of_other_s, told_s = ThreadBudget(threads=threads, cores=threads), 0.0, 0.0

    def pass_time(seconds: float, cores_of_others: float) -> None:
        nonlocal of_other_s, told_s
        of_other_s += seconds * cores_of_others
        clocks["perf_counter"] += seconds
        clocks["thread_time"] += seconds
        if clocks["perf_counter"] // tick_s != (clocks["perf_counter"] - seconds) // tick_s:
            told_s = of_other_s
        clocks["process_time"] = clocks["thread_time"] + told_s

    torch.set_num_threads(threads)
    used = set()
    for _ in range(round(3.0 / pass_s)):
        used.add(budget.before_round())
        budget.begin_pass()
        pass_time(pass_s, (threads - 1) * of_others)
        budget.end_pass()
        pass_time(0.0003, 0.0)
    assert used == ({True, False} if gives_up else {True})


def test_each_failure_in_a_row_doubles_the_time_on_one_thread() -> None:
    now, waits = [0.0], []
    contention = Contention(monotonic_s=lambda: now[0])
    for _ in range(7):
        observe(contention, *[0.5] * 7)
        began = now[0]
        while contention.is_on:
            now[0] += 0.125
        waits.append(now[0] - began)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    observe(contention, *[0.95] * 7)
    observe(contention, *[0.5] * 7)
    now[0] += 0.5
    assert not contention.is_on, "undisturbed passes reset it"


@pytest.mark.parametrize("rest_s", [0.0003, 0.050])
def test_rounds_beside_a_busy_process_run_on_one_thread(rest_s: float, clocks: dict[str, float]) -> None:
    """Processor time is that of the process: one thread that sleeps instead of computing is a core that others have."""
    now = [0.0]
    budget = ThreadBudget(threads=2, cores=2, contention=Contention(monotonic_s=lambda: now[0]))

    def round_on(cores: float) -> tuple[int, bool]:
        uses_all = budget.before_round()
        threads = torch.get_num_threads()
        budget.begin_pass()
        clocks["perf_counter"] += 1 / 64
        clocks["process_time"] += min(cores, threads) / 64
        budget.end_pass()
        for clock in clocks:
            clocks[clock] += rest_s  # the rest of a round, which one thread computes
        return threads, uses_all

    assert [round_on(2.0) for _ in range(7)] == [(2, True)] * 7
    assert [round_on(1.2) for _ in range(8)] == [(2, True)] * 7 + [(1, False)]
    budget.give_back()
    assert torch.get_num_threads() == 2, "other code of this process is not slowed down"
    assert round_on(1.2) == (1, False)
    now[0] += 0.6
    assert round_on(2.0) == (2, True)
    assert round_on(2.0) == (2, True)
