"""How much is copied, by listed costs. Costs are in seconds; the target's plain pass takes 10 ms."""

from __future__ import annotations

import pytest

from aurora_lit.serve.speculation.ngram_planner import NgramAcceptance, NgramPlanner
from aurora_lit.serve.speculation.planner import SpeculationPlanner

PLAIN_S = 0.010


def copying(*, column_s: float, ragged: bool = True, drafts: bool = True, adaptive: bool = True) -> NgramPlanner:
    """`column_s`: of each column more in a round."""
    policy = SpeculationPlanner(max_draft_tokens=4 * drafts, max_proposals=15, adaptive=adaptive)
    for rows in (1, 2, 4):
        for width in (1, 2, 4, 8, 16):
            policy.target_cost.begin_with(rows, width, PLAIN_S + rows * (width - 1) * column_s)
        policy.first_step_cost.begin_with(rows, 1, 0.001)
        policy.next_step_cost.begin_with(rows, 1, 0.0002)
    policy.ragged = ragged
    return NgramPlanner(policy, most=15)


def geometric(rate: float, count: int = 15) -> list[float]:
    return [rate ** (j + 1) for j in range(count)]


@pytest.mark.parametrize(
    ("rate", "column_s", "counts"),
    [
        (0.9, 0.0, range(15, 16)),  # columns that cost nothing
        (0.9, 0.001, range(4, 15)),
        (0.5, 0.001, range(2, 4)),  # where 0.5 ** j is not worth a tenth of a token
        (0.9, 0.02, range(1)),  # a column as dear as two tokens
        (0.02, 0.001, range(1)),
    ],
)
def test_a_copy_ends_where_its_next_token_does_not_pay(rate: float, column_s: float, counts: range) -> None:
    (count,) = copying(column_s=column_s, drafts=False).choose([geometric(rate)], [0.0], num_others=0)
    assert count in counts


def test_each_row_copies_as_much_as_pays_for_it() -> None:
    survivals = [geometric(0.95), geometric(0.5), geometric(0.05)]
    sure, unsure, hopeless = copying(column_s=0.0005).choose(survivals, [0.1] * 3, num_others=1)
    assert sure > unsure > hopeless == 0


def test_where_all_rows_have_the_columns_of_the_longest_copies_are_shorter_beside_others() -> None:
    survivals = [geometric(0.8)]
    (alone,) = copying(column_s=0.0002).choose(survivals, [0.1], num_others=3)
    (side_by_side,) = copying(column_s=0.0002, ragged=False).choose(survivals, [0.1], num_others=3)
    assert 0 < side_by_side < alone


def test_a_row_whose_draft_promises_more_is_left_to_it() -> None:
    survivals = [geometric(0.5)] * 2
    assert copying(column_s=0.0).choose(survivals, [0.95, 0.2], num_others=0) == [0, 4]
    assert copying(column_s=0.0, drafts=False).choose(survivals, [0.95, 0.2], num_others=0) == [4, 4]


def test_without_a_choice_all_is_copied() -> None:
    assert copying(column_s=0.02, adaptive=False).choose([geometric(0.1, 7)], [0.9], num_others=3) == [7]


def test_what_is_right_is_counted_by_how_much_agreed_before() -> None:
    record = NgramAcceptance()
    before = {match: record.survival(match, 5) for match in (2, 9)}
    assert all(chance == sorted(chance, reverse=True) for chance in before.values())
    for _ in range(300):
        record.observe(12, proposed=5, accepted=0)
    assert record.survival(2, 5) == before[2]
    assert record.survival(9, 5)[0] < 0.01
    for _ in range(300):
        record.observe(9, proposed=5, accepted=2)
    first, second, third = record.survival(20, 3)
    assert first > 0.95
    assert second > 0.95
    assert third < 0.05


def test_tokens_behind_the_first_wrong_one_say_nothing() -> None:
    record = NgramAcceptance()
    _, *later = record.survival(4, 4)
    for _ in range(300):
        record.observe(4, proposed=4, accepted=0)
    first = record.survival(4, 4)[0]
    assert record.survival(4, 4)[1:] == pytest.approx([first * chance / 0.7 for chance in later])
