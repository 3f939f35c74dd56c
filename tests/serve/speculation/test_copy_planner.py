"""CopyPlanner: how many copied tokens are proposed, by listed costs.

Costs are in seconds; a plain forward pass of the target takes 10 ms.
"""

from __future__ import annotations

import pytest

from aurora_lit.serve.speculation.copy_planner import CopyPlanner
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.planner import SpeculationLimits, SpeculationPlanner

PLAIN_S = 0.010


def copy_planner(*, column_s: float, ragged: bool = True, drafts: bool = True, adaptive: bool = True) -> CopyPlanner:
    """`column_s`: seconds of each further query position in a round."""
    costs = Costs(ragged=ragged)
    for size in (1, 2, 4):
        for query_length in (1, 2, 4, 8, 16):
            costs.target.set_initial(size, query_length, PLAIN_S + size * (query_length - 1) * column_s)
        for levels in range(1, 5):
            costs.chain.set_initial(size, levels, 0.0008 + 0.0002 * levels)
    limits = SpeculationLimits(draft_tokens=4 * drafts, copied_tokens=15, adaptive=adaptive)
    return CopyPlanner(SpeculationPlanner(limits, costs))


def geometric(rate: float, count: int = 15) -> list[float]:
    return [rate ** (j + 1) for j in range(count)]


@pytest.mark.parametrize(
    ("rate", "column_s", "counts"),
    [
        (0.9, 0.0, range(15, 16)),  # query positions that take no time
        (0.9, 0.001, range(4, 15)),
        (0.5, 0.001, range(2, 4)),  # as long as 0.5 ** j is more than a tenth of a token
        (0.9, 0.02, range(1)),  # a query position takes the time of two tokens
        (0.02, 0.001, range(1)),
    ],
)
def test_proposals_end_where_the_next_token_does_not_pay(rate: float, column_s: float, counts: range) -> None:
    (count,) = copy_planner(column_s=column_s, drafts=False).choose([geometric(rate)], [0.0], batch_size=1).counts
    assert count in counts


def test_each_sequence_proposes_as_many_tokens_as_pay_for_it() -> None:
    survivals = [geometric(0.95), geometric(0.5), geometric(0.05)]
    probable, uncertain, improbable = copy_planner(column_s=0.0005).choose(survivals, [0.1] * 3, batch_size=4).counts
    assert probable > uncertain > improbable == 0


def test_where_all_sequences_compute_the_longest_query_proposals_are_shorter() -> None:
    survivals = [geometric(0.8)]
    (ragged,) = copy_planner(column_s=0.0002).choose(survivals, [0.1], batch_size=4).counts
    (padded,) = copy_planner(column_s=0.0002, ragged=False).choose(survivals, [0.1], batch_size=4).counts
    assert 0 < padded < ragged


def test_a_sequence_is_left_to_the_draft_where_that_promises_more() -> None:
    survivals = [geometric(0.5)] * 2
    assert copy_planner(column_s=0.0).choose(survivals, [0.95, 0.2], batch_size=2).counts == [0, 4]
    assert copy_planner(column_s=0.0, drafts=False).choose(survivals, [0.95, 0.2], batch_size=2).counts == [4, 4]


def test_without_adaptation_all_tokens_are_proposed() -> None:
    assert copy_planner(column_s=0.02, adaptive=False).choose([geometric(0.1, 7)], [0.9], batch_size=4).counts == [7]
