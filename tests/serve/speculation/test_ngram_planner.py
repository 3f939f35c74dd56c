"""NgramPlanner: how many tokens lookup proposes, by listed costs; NgramAcceptance.

Costs are in seconds; a plain forward pass of the target takes 10 ms.
"""

from __future__ import annotations

import pytest

from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.ngram_planner import NgramAcceptance, NgramPlanner
from aurora_lit.serve.speculation.planner import SpeculationLimits, SpeculationPlanner

PLAIN_S = 0.010


def ngram_planner(*, column_s: float, ragged: bool = True, drafts: bool = True, adaptive: bool = True) -> NgramPlanner:
    """`column_s`: seconds of each further query position in a round."""
    costs = Costs(ragged=ragged)
    for size in (1, 2, 4):
        for query_length in (1, 2, 4, 8, 16):
            costs.target.set_initial(size, query_length, PLAIN_S + size * (query_length - 1) * column_s)
        costs.first_step.set_initial(size, 1, 0.001)
        costs.next_step.set_initial(size, 1, 0.0002)
    limits = SpeculationLimits(draft_tokens=4 * drafts, lookup_tokens=15, adaptive=adaptive)
    return NgramPlanner(SpeculationPlanner(limits, costs))


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
    (count,) = ngram_planner(column_s=column_s, drafts=False).choose([geometric(rate)], [0.0], batch_size=1)
    assert count in counts


def test_each_sequence_proposes_as_many_tokens_as_pay_for_it() -> None:
    survivals = [geometric(0.95), geometric(0.5), geometric(0.05)]
    probable, uncertain, improbable = ngram_planner(column_s=0.0005).choose(survivals, [0.1] * 3, batch_size=4)
    assert probable > uncertain > improbable == 0


def test_where_all_sequences_compute_the_longest_query_proposals_are_shorter() -> None:
    survivals = [geometric(0.8)]
    (ragged,) = ngram_planner(column_s=0.0002).choose(survivals, [0.1], batch_size=4)
    (padded,) = ngram_planner(column_s=0.0002, ragged=False).choose(survivals, [0.1], batch_size=4)
    assert 0 < padded < ragged


def test_a_sequence_is_left_to_the_draft_where_that_promises_more() -> None:
    survivals = [geometric(0.5)] * 2
    assert ngram_planner(column_s=0.0).choose(survivals, [0.95, 0.2], batch_size=2) == [0, 4]
    assert ngram_planner(column_s=0.0, drafts=False).choose(survivals, [0.95, 0.2], batch_size=2) == [4, 4]


def test_without_adaptation_all_tokens_are_proposed() -> None:
    assert ngram_planner(column_s=0.02, adaptive=False).choose([geometric(0.1, 7)], [0.9], batch_size=4) == [7]


def test_acceptance_is_counted_by_length_of_the_match() -> None:
    acceptance = NgramAcceptance()
    before = {match: acceptance.survival(match, 5) for match in (2, 9)}
    assert all(chance == sorted(chance, reverse=True) for chance in before.values())
    for _ in range(300):
        acceptance.observe(12, proposed=5, accepted=0)
    assert acceptance.survival(2, 5) == before[2]
    assert acceptance.survival(9, 5)[0] < 0.01
    for _ in range(300):
        acceptance.observe(9, proposed=5, accepted=2)
    first, second, third = acceptance.survival(20, 3)
    assert first > 0.95
    assert second > 0.95
    assert third < 0.05


def test_tokens_after_the_first_rejected_one_do_not_count() -> None:
    acceptance = NgramAcceptance()
    _, *later = acceptance.survival(4, 4)
    for _ in range(300):
        acceptance.observe(4, proposed=4, accepted=0)
    first = acceptance.survival(4, 4)[0]
    assert acceptance.survival(4, 4)[1:] == pytest.approx([first * chance / 0.7 for chance in later])
