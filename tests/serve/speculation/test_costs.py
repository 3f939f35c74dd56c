"""CostTable and Costs: listed seconds, interpolated, drifting, and updated by rounds."""

from __future__ import annotations

import pytest

from aurora_lit.serve.speculation.costs import Costs, CostTable, DraftShape


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
    assert table(4, 3) > before, "costs without a measurement are scaled by the drift of the others"


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


def test_costs_that_no_round_has_measured_are_scaled_by_the_drift_of_the_others() -> None:
    table = CostTable()
    for query_length, seconds in ((1, 1.0), (2, 1.2), (4, 2.0)):
        table.set_initial(8, query_length, seconds)
    assert [table(8, query_length) for query_length in (1, 2, 3, 4)] == pytest.approx([1.0, 1.2, 1.6, 2.0])
    for _ in range(100):
        table.update(8, 1, 1.5)
    assert [table(8, query_length) for query_length in (1, 2, 3, 4)] == pytest.approx([1.5, 1.8, 2.4, 3.0], rel=0.02)
    for _ in range(100):
        table.update(8, 2, 1.5)
    assert table(8, 2) == pytest.approx(1.5, rel=0.02), "measured itself"
    table.update(8, 4, 1000.0)
    assert table(8, 4) < 4.0


@pytest.fixture
def costs() -> Costs:
    costs = Costs(ragged=True)
    for query_length in (1, 2, 4, 8):
        costs.target.set_initial(4, query_length, 0.010 + 0.001 * query_length)
    for levels in (1, 2, 3):
        costs.chain.set_initial(2, levels, 0.0005 + 0.0005 * levels)
        costs.tree.set_initial(2, levels, 0.002 * levels - 0.001)
    return costs


def test_a_round_costs_the_mean_query_length_or_without_ragged_rows_the_longest(costs: Costs) -> None:
    assert costs.round_s(4, []) == pytest.approx(0.011)
    assert costs.round_s(4, [4, 0, 0, 0]) == costs.round_s(4, [4]) == pytest.approx(0.012)
    costs.ragged = False
    assert costs.round_s(4, [3]) == pytest.approx(0.014)
    assert costs.round_s(0, []) == 0.0


def test_drafting_costs_its_first_step_and_each_later_step_or_level(costs: Costs) -> None:
    assert costs.draft_s(2, DraftShape()) == 0.0
    assert costs.draft_s(2, DraftShape(1)) == pytest.approx(0.001)
    assert costs.draft_s(2, DraftShape(3)) == pytest.approx(0.002)
    assert costs.draft_s(2, DraftShape(3, 7)) == pytest.approx(0.005)
    assert [DraftShape(3).num_tokens, DraftShape(3, 7).num_tokens] == [3, 7]


def test_a_slow_tree_says_nothing_about_chains(costs: Costs) -> None:
    costs.observe_draft(2, DraftShape(3, 7), 0.0075, uncached=0)
    assert costs.draft_s(2, DraftShape(3, 7)) == pytest.approx(0.00625)
    assert costs.draft_s(2, DraftShape(3)) == pytest.approx(0.002)
    Costs(ragged=True).observe_draft(2, DraftShape(3), 1.0, uncached=0)  # nothing is known there


def test_prefill_of_the_drafts_cache_does_not_count_as_time_of_a_step(costs: Costs) -> None:
    costs.prefill_position_s = 1e-5
    costs.observe_draft(2, DraftShape(2), 0.0015 + 300 * 1e-5, uncached=300)
    assert costs.draft_s(2, DraftShape(2)) == pytest.approx(0.0015)


def test_the_first_rounds_are_believed_so_that_a_short_answer_learns_what_it_costs() -> None:
    table = CostTable()
    table.set_initial(1, 1, 0.0035)
    table.set_initial(1, 2, 0.0035)
    for _ in range(4):
        table.update(1, 2, 0.0045)
    assert table(1, 2) == pytest.approx(0.0043), "the initial cost has the weight of one round"
    assert table(1, 1) == pytest.approx(0.0043), "which has not been measured, and drifts"
    for _ in range(200):
        table.update(1, 2, 0.0045)
    table.update(1, 2, 0.0055)
    assert table(1, 2) == pytest.approx(0.0046), "later ones change it slowly"
