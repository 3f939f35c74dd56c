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
    """The two clocks that rounds are timed with."""
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
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


def test_a_core_is_given_up_at_once_after_a_disturbed_pass_that_took_long() -> None:
    contention = Contention(monotonic_s=lambda: 0.0)
    contention.observe(wall_s=0.2, cpu_s=0.39, threads=2)
    assert not contention.is_on, "a long prompt"
    contention.observe(wall_s=0.2, cpu_s=0.2, threads=2)
    assert contention.is_on


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


def test_rounds_beside_a_busy_process_run_on_one_thread(clocks: dict[str, float]) -> None:
    """Processor time is that of the process: one thread that sleeps instead of computing is a core that others have."""
    now = [0.0]
    budget = ThreadBudget(threads=2, cores=2, contention=Contention(monotonic_s=lambda: now[0]))

    def round_on(cores: float) -> tuple[int, bool]:
        uses_all = budget.before_round()
        threads = torch.get_num_threads()
        budget.begin_pass()
        clocks["perf_counter"] += 0.010
        clocks["process_time"] += 0.010 * min(cores, threads)
        budget.end_pass()
        clocks["perf_counter"] += 0.050  # the rest of a round, which one thread computes
        clocks["process_time"] += 0.050
        return threads, uses_all

    assert [round_on(2.0) for _ in range(4)] == [(2, True)] * 4
    assert [round_on(1.2) for _ in range(4)] == [(2, True)] * 3 + [(1, False)]
    budget.give_back()
    assert torch.get_num_threads() == 2, "other code of this process is not slowed down"
    assert round_on(1.2) == (1, False)
    now[0] += 0.6
    assert round_on(2.0) == (2, True)
    assert round_on(2.0) == (2, True)
