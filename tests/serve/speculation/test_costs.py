"""CostTable and Costs: timed seconds, interpolated, and corrected by rounds."""

from __future__ import annotations

import itertools

import pytest

from aurora_lit.serve.speculation.costs import Costs, CostTable


def timed() -> CostTable:
    table = CostTable()
    for batch_size, seconds in ((1, {1: 0.010, 2: 0.011, 5: 0.014}), (8, {1: 0.020, 5: 0.060})):
        for length, each in seconds.items():
            table.set_initial(batch_size, length, each)
    return table


def test_between_what_was_timed_costs_are_interpolated_and_beyond_they_go_on_growing() -> None:
    table = timed()
    assert CostTable()(1, 1) == 0.0
    assert table(1, 1) == 0.010
    assert table(1, 3) == pytest.approx(0.012)
    assert table(1, 9) == pytest.approx(0.018), "columns that were not timed are not free"
    assert table(8, 2.5) == pytest.approx(0.035)
    assert table(4, 1) == pytest.approx(0.010 + 0.010 * 3 / 7)
    assert table(4, 1) < table(4, 2) < table(8, 2)


def test_rounds_say_how_much_longer_everything_takes_now() -> None:
    table = timed()
    for _ in range(200):
        table.update(1, 1, 0.015)
    assert table(1, 1) == pytest.approx(0.015, rel=0.01)
    assert table(8, 5) == pytest.approx(0.090, rel=0.1), "less what is put down to passes of one column"


def test_rounds_correct_the_lengths_that_were_timed_and_no_step_lies_between() -> None:
    """Two columns of eight sequences take a quarter more than was timed, one takes what was timed."""
    table = timed()
    for _ in range(3000):
        table.update(8, 1, 0.020)
        table.update(8, 2, 0.0375)
    prices = [table(8, 1 + count / 8) - table(8, 1) for count in range(9)]
    assert prices[8] == pytest.approx(0.0175, rel=0.1)
    steps = [after - before for before, after in itertools.pairwise(prices)]
    assert max(steps) < 1.01 * min(steps)


def test_a_length_that_rounds_seldom_have_is_corrected_by_those_few() -> None:
    """The start took columns for free, so that nearly all rounds have five."""
    table = CostTable()
    for length in (1, 5):
        table.set_initial(1, length, 0.020)
    for round_number in range(1000):
        if round_number % 20:
            table.update(1, 5, 0.030)
        else:
            table.update(1, 1, 0.024)
    assert table(1, 5) - table(1, 1) == pytest.approx(0.006, rel=0.1)


def test_a_size_between_those_timed_is_corrected_apart_from_them() -> None:
    table = timed()
    before = table(1, 2) / table(1, 1)
    for _ in range(500):
        table.update(4, 1, 0.030)
        table.update(4, 2, 0.090)
    assert table(4, 2) / table(4, 1) == pytest.approx(3.0, rel=0.1)
    assert table(1, 2) / table(1, 1) == before


def test_an_outlier_changes_little() -> None:
    table = timed()
    for _ in range(50):
        table.update(1, 1, 0.010)
    table.update(1, 1, 5.0)
    assert table(1, 1) < 0.0105


def test_the_first_round_of_a_size_outside_those_timed_is_taken_as_it_is() -> None:
    table = CostTable()
    table.update(2, 3, 0.5)
    assert table(2, 3) == 0.5
    table.update(5, 1, 2.0)
    assert table(5, 1) == pytest.approx(2.0)


@pytest.mark.parametrize(("ragged", "expected"), [(True, 0.020 + 0.040 / 32 * 4), (False, 0.060)])
def test_where_rows_are_padded_the_longest_counts(ragged: bool, expected: float) -> None:
    costs = Costs(ragged=ragged)
    costs.target = timed()
    assert costs.round_s(8, [4]) == pytest.approx(expected)
    assert costs.round_s(0, []) == 0.0


def test_drafting_and_catching_up_are_told_apart() -> None:
    """Reading a prompt says what a position takes, and nothing of the chain; a short one says the reverse."""
    costs = Costs(ragged=True)
    costs.chain.set_initial(1, 4, 0.010)
    costs.prefill_position_s = 1e-4
    assert costs.draft_s(1, 0) == 0.0
    assert costs.catch_up_s(1, uncached=2) == 0.0, "the first step reads these anyway"
    for _ in range(100):
        costs.observe_draft(1, 4, 0.010 + 1000 * 3e-4, uncached=1002)
    assert costs.prefill_position_s == pytest.approx(3e-4, rel=0.01)
    assert costs.draft_s(1, 4) == 0.010
    for _ in range(200):
        costs.observe_draft(1, 4, 0.020, uncached=2)
    assert costs.draft_s(1, 4) == pytest.approx(0.020, rel=0.01)
    for _ in range(100):
        costs.observe_draft(0, 0, 1000 * 5e-4, uncached=1000)
    assert costs.prefill_position_s == pytest.approx(5e-4, rel=0.01), "where nothing was drafted yet"
