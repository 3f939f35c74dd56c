"""CostTable and Costs: listed seconds, interpolated, slowed down by other work, and updated by rounds."""

from __future__ import annotations

import random

import pytest

from aurora_lit.serve.speculation.costs import Costs, CostTable


def test_a_time_between_two_query_lengths_updates_the_nearer_one() -> None:
    table = CostTable()
    for query_length, seconds in ((1, 0.010), (2, 0.014), (3, 0.018)):
        table.set_initial(4, query_length, seconds)
    assert table(4, 2.25) == pytest.approx(0.015)
    before = table(4, 3)
    for _ in range(200):
        table.update(4, 2.25, 0.030)
    assert table(4, 2.25) == pytest.approx(0.030, rel=0.02)
    assert table(4, 2) < 0.030
    assert table(4, 3) > before, "costs without a measurement are slowed down as the others are"


def test_costs_between_measurements_are_interpolated() -> None:
    table = CostTable()
    assert table(1, 1) == 0.0
    table.update(1, 1, 1.0)
    assert table(7, 3) == 1.0
    table.update(4, 1, 4.0)
    assert [table(size, 1) for size in (1, 2, 3, 4, 9)] == pytest.approx([1, 2, 3, 4, 4])


def test_a_cost_changes_slowly_and_an_outlier_changes_it_little() -> None:
    table = CostTable()
    table.update(1, 1, 1.0)
    table.update(1, 1, 50.0)
    assert table(1, 1) <= 1.2
    for _ in range(100):
        table.update(1, 1, 0.5)
    assert table(1, 1) == pytest.approx(0.5, abs=0.01)


def calibrated() -> CostTable:
    """Seconds of one sequence: 0.003 for whatever it does, and 0.0005 a column."""
    table = CostTable()
    for columns in range(1, 9):
        table.set_initial(1, columns, 0.003 + 0.0005 * (columns - 1))
    return table


@pytest.mark.parametrize(("memory", "computing"), [(1.5, 1.0), (1.0, 1.8), (1.4, 1.4), (1.0, 1.0), (0.8, 1.2)])
def test_rounds_tell_what_other_work_slows_down(memory: float, computing: float) -> None:
    """Rounds of one width, with a plain one now and then, say what all other widths take."""

    def seconds(columns: int) -> float:
        return 0.003 * memory + 0.0005 * (columns - 1) * computing

    table, rng = calibrated(), random.Random(0)
    for i in range(600):
        columns = 1 if i % 16 == 0 else 4
        table.update(1, columns, seconds(columns) * max(0.5, rng.gauss(1, 0.05)))
    assert table(1, 1) == pytest.approx(seconds(1), rel=0.06)
    assert table(1, 4) == pytest.approx(seconds(4), rel=0.06)
    assert table(1, 8) == pytest.approx(seconds(8), rel=0.12)


def test_before_anything_else_is_known_all_operations_are_slowed_down_together() -> None:
    table = calibrated()
    for _ in range(100):
        table.update(1, 1, 0.0045)
    assert table(1, 1) == pytest.approx(0.0045, rel=0.02)
    assert 1.4 < table(1, 8) / calibrated()(1, 8) < 1.6


def test_an_operation_that_differs_from_what_was_calibrated_is_learned_and_leaves_the_others_alone() -> None:
    table = calibrated()
    for i in range(3000):
        table.update(1, 1 + i % 3, calibrated()(1, 1 + i % 3) * (1.3 if i % 3 == 1 else 1.0))
    ratios = [table(1, columns) / calibrated()(1, columns) for columns in (1, 2, 3)]
    assert ratios == pytest.approx([1.0, 1.3, 1.0], rel=0.05)


def test_a_single_slow_round_of_a_rare_operation_changes_its_place_little() -> None:
    """Neither among the others, nor theirs."""
    table = calibrated()
    for _ in range(200):
        table.update(1, 3, 0.004)
    table.update(1, 5, 0.5)
    for columns in range(1, 9):
        assert table(1, columns) == pytest.approx(0.003 + 0.0005 * (columns - 1), rel=0.08)


@pytest.fixture
def costs() -> Costs:
    costs = Costs(ragged=True)
    for query_length in (1, 2, 4, 8):
        costs.target.set_initial(4, query_length, 0.010 + 0.001 * query_length)
    for levels in (1, 2, 3):
        costs.chain.set_initial(2, levels, 0.0005 + 0.0005 * levels)
    return costs


def test_a_round_costs_the_mean_query_length_or_without_ragged_rows_the_longest(costs: Costs) -> None:
    assert costs.round_s(4, []) == pytest.approx(0.011)
    assert costs.round_s(4, [4, 0, 0, 0]) == costs.round_s(4, [4]) == pytest.approx(0.012)
    costs.ragged = False
    assert costs.round_s(4, [3]) == pytest.approx(0.014)
    assert costs.round_s(0, []) == 0.0


@pytest.mark.parametrize(("ragged", "seconds"), [(True, 0.012), (False, 0.015)])
def test_a_round_of_uneven_rows_takes_what_was_expected_and_changes_nothing(
    costs: Costs, ragged: bool, seconds: float
) -> None:
    costs.ragged = ragged
    for _ in range(200):
        costs.observe_round(4, [4], seconds)
    assert costs.round_s(4, [4]) == pytest.approx(seconds)
    assert costs.round_s(4, []) == pytest.approx(0.011)


def test_of_chains_that_nothing_is_known_of_a_first_round_tells_nothing() -> None:
    """It reads a prompt, with cold caches."""
    costs = Costs(ragged=True)
    costs.observe_draft(2, 3, 1.0, uncached=0)
    assert costs.draft_s(2, 3) == 0.0


def test_drafting_costs_its_first_step_and_each_later_step(costs: Costs) -> None:
    assert costs.draft_s(2, 0) == 0.0
    assert costs.draft_s(2, 1) == pytest.approx(0.001)
    assert costs.draft_s(2, 3) == pytest.approx(0.002)


def test_the_first_rounds_are_believed_so_that_a_short_answer_learns_what_it_costs() -> None:
    table = CostTable()
    table.set_initial(1, 1, 0.0035)
    table.set_initial(1, 2, 0.0035)
    for _ in range(4):
        table.update(1, 2, 0.0042)
    assert 0.0041 < table(1, 2) < 0.0043
    assert 0.0040 < table(1, 1) < 0.0043, "which has not been measured"
    for _ in range(200):
        table.update(1, 2, 0.0042)
    table.update(1, 2, 0.0055)
    assert table(1, 2) == pytest.approx(0.0042, rel=0.04), "later ones change it slowly"


def test_prefill_of_the_drafts_cache_does_not_count_as_time_of_a_step(costs: Costs) -> None:
    """But for the positions that a first step reads anyway: two for each sequence."""
    costs.prefill_position_s = 1e-5
    for _ in range(20):
        costs.observe_draft(2, 2, 0.0015 + 300 * 1e-5, uncached=304)
    assert costs.draft_s(2, 2) == pytest.approx(0.0015)


def test_what_a_prefilled_position_takes_follows_the_machine(costs: Costs) -> None:
    """A long prompt is read in as many rounds as keep each short: by what reading takes now, not at the start."""
    costs.prefill_position_s = 1e-5
    costs.chain.set_initial(1, 2, 0.001)
    for _ in range(40):
        costs.observe_draft(1, 2, 0.001 + 500 * 2e-5, uncached=502)
    assert costs.catch_up_s(1, uncached=502) == pytest.approx(500 * 2e-5, rel=0.02)
    assert costs.draft_s(1, 2) == pytest.approx(0.001, rel=0.1)
    costs.observe_draft(1, 2, 60.0, uncached=502)  # a preempted process
    assert costs.catch_up_s(1, uncached=502) < 500 * 2.5e-5
    for _ in range(40):
        costs.observe_draft(1, 2, 0.001 + 500 * 1e-5, uncached=502)
    assert costs.catch_up_s(1, uncached=502) == pytest.approx(500 * 1e-5, rel=0.02)
    assert costs.prefill_position_s == 1e-5  # what is kept for the next start


def test_after_many_plain_rounds_one_slow_round_with_a_proposal_changes_the_price_of_columns_little() -> None:
    """Plain rounds say nothing of it, but not ever less."""
    costs = Costs(ragged=True)
    costs.target.set_initial(8, 1, 0.0154)
    costs.target.set_initial(8, 2, 0.0198)
    for _ in range(30_000):
        costs.observe_round(8, [], 0.0154)
    before = costs.column_s(8, 0)
    costs.observe_round(8, [1], 1.25 * costs.round_s(8, [1]))
    assert costs.column_s(8, 0) < 1.5 * before
