"""How fuzzers run: few examples, always the same ones; with `--fuzz-seconds N` new ones for N seconds each.

    pytest tests/fuzz --fuzz-seconds 600 --fuzz-seed 7

What a run has tried is printed at its end. Hypothesis prints an input that fails, which becomes a case of an ordinary
test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

LONGEST_S = 10.0
"""An input that takes longer hangs; on a busy machine others take a second."""
_AT_ONCE = 200
"""Examples from one seed, where time says how many there are."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.0, help="run each fuzzer so long; 0: few fixed examples")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the first seed")


class Fuzzer:
    """Runs checks on generated inputs, and counts them."""

    def __init__(self, *, seconds: float, first_seed: int) -> None:
        self._seconds, self._seed, self._started_s = seconds, first_seed, time.monotonic()
        self.counts = [0, 0.0]
        """Executions, and the seconds that they took."""

    def __call__(self, check: Callable[..., None], *inputs: st.SearchStrategy[Any], examples: int) -> None:
        """Call `check` with inputs; `examples`: so many if no time is given."""

        def timed(values: tuple[Any, ...]) -> None:
            self.counts[0] += 1
            started_s = time.monotonic()
            check(*values)
            assert time.monotonic() - started_s < LONGEST_S, "it hangs"

        def run(number: int, how: settings) -> None:
            seed(number)(how(given(st.tuples(*inputs))(timed)))()

        self._repeat(run, examples)

    def machine(self, machine: type[RuleBasedStateMachine], *, examples: int, steps: int = 30) -> None:
        """Run a state machine from its beginning, again and again."""
        fuzzer = self

        class Counted(machine):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                fuzzer.counts[0] += 1
                super().__init__()

        Counted.__name__ = machine.__name__

        def run(number: int, how: settings) -> None:
            run_state_machine_as_test(seed(number)(Counted), settings=settings(how, stateful_step_count=steps))

        self._repeat(run, examples)

    def _repeat(self, run: Callable[[int, settings], None], examples: int) -> None:
        how = settings(
            database=None,
            deadline=None,
            max_examples=max(examples, _AT_ONCE) if self._seconds else examples,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        while True:
            try:
                run(self._seed, how)
            finally:
                self.counts[1] = time.monotonic() - self._started_s
            if self.counts[1] >= self._seconds:
                return
            self._seed += 1


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Any:
    options = request.config
    fuzzer = Fuzzer(seconds=options.getoption("--fuzz-seconds", 0.0), first_seed=options.getoption("--fuzz-seed", 0))
    request.node.user_properties.append(("fuzzed", fuzzer.counts))
    return fuzzer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shrinking an input that fails takes its own time."""
    if seconds := config.getoption("--fuzz-seconds", 0.0):
        for item in items:
            if "fuzz" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.timeout(300 + 2 * seconds))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    found = {report.nodeid: dict(report.user_properties).get("fuzzed") for report in reports}
    rows = [(nodeid.rpartition("::")[2], *counts) for nodeid, counts in found.items() if counts]
    if rows and config.getoption("--fuzz-seconds", 0.0):
        for name, executions, seconds in rows:
            terminalreporter.write_line(f"{executions:9,} executions in {seconds:6.1f} s: {name}")
        total, spent_s = sum(row[1] for row in rows), sum(row[2] for row in rows)
        terminalreporter.write_line(f"{total:9,} executions in {spent_s / 60:.1f} minutes")
