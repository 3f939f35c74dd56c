"""CopyPlanner: how many copied tokens are proposed, by listed costs.

Costs are in seconds; a plain forward pass of the target takes 10 ms.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import request

from aurora_lit.kernels.suffix_index import NO_COPIES, Copies, LookUp
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation import copy_finder
from aurora_lit.serve.speculation.copy_planner import LEAST_SURVIVAL, CopyPlan, CopyPlanner
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.planner import SpeculationLimits, SpeculationPlanner
from aurora_lit.serve.speculation.proposer import Proposer

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


def a_proposer(*, batch_size: int, draft_tokens: int) -> Proposer:
    """Without a draft of its own, and with columns that are dear."""
    costs = Costs(ragged=True)
    costs.target.set_initial(batch_size, 1, PLAIN_S)
    costs.target.set_initial(batch_size, 2, 1.5 * PLAIN_S)
    planner = SpeculationPlanner(SpeculationLimits(draft_tokens=draft_tokens, copied_tokens=4), costs)
    return Proposer(None, planner, tokens_SL=torch.zeros(batch_size, 1))


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


def test_a_trial_proposes_the_most_probable_node_where_none_pays() -> None:
    dear, cheap = copy_planner(column_s=0.02), copy_planner(column_s=0.001)
    survivals = [geometric(0.3), geometric(0.4)]
    assert dear.choose(survivals, [0.9] * 2, batch_size=2).counts == [0, 0]
    assert dear.choose(survivals, [0.9] * 2, batch_size=2, is_trial=True).counts == [0, 1]
    plain = cheap.choose(survivals, [0.0] * 2, batch_size=2)
    assert cheap.choose(survivals, [0.0] * 2, batch_size=2, is_trial=True) == plain, "nothing else changes"


def test_copies_that_do_not_pay_are_tried_in_one_of_64_rounds_and_proposed_again_when_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two sequences. A trial is looked up even if it is too improbable for other rounds."""
    proposer = a_proposer(batch_size=2, draft_tokens=0)
    proposer.reliability.rate_RC[:] = 0.15
    least = list[float]()

    def find(_tokens_SL: torch.Tensor, rows: LookUp, **_how: object) -> list[Copies]:
        least.append(rows.least)
        rates = [proposer.reliability.rate(table, 3) for table in rows.tables]
        return [Copies([5], [0], [rate], [3]) if rate >= rows.least else NO_COPIES for rate in rates]

    monkeypatch.setattr(copy_finder, "look_up_copies", find)
    sequences = [RunningSequence(request=request(str(i), [1]), slot=i, prompt_length=1, length=9) for i in range(2)]
    numbers = list[int]()
    for number in range(64 * 40):
        proposals, _ = proposer.propose(sequences)
        if any(proposal.tokens for proposal in proposals):
            numbers.append(number)
        for sequence, proposal in zip(sequences, proposals, strict=True):
            proposer.observe(sequence, proposal, path=[0, 1] if proposal.tokens else [0], finished=False)
    assert numbers[:3] == [63, 127, 191]
    assert sorted(set(least)) == [LEAST_SURVIVAL, pytest.approx(0.25)]
    assert numbers[-50:] == list(range(64 * 40 - 50, 64 * 40)), "they were right each time"


def test_copies_beside_a_drafts_chain_are_measured_so_that_none_has_to_be_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proposer = a_proposer(batch_size=1, draft_tokens=4)
    least = list[float]()

    def find(_tokens_SL: torch.Tensor, rows: LookUp, **_how: object) -> list[Copies]:
        least.append(rows.least)
        return [Copies([5], [0], [0.9], [3])]

    drafted = Proposal(tokens=[7], source=Source.DRAFT, num_drafted=1)
    monkeypatch.setattr(copy_finder, "look_up_copies", find)
    monkeypatch.setattr(CopyPlanner, "choose", lambda *_args, **_how: CopyPlan([0], 1.0))
    monkeypatch.setattr(proposer, "_draft", lambda _sequences, candidates, _times: [(i, drafted) for i in candidates])
    sequence = RunningSequence(request=request("a", [1], max_tokens=99), slot=0, prompt_length=1, length=9)
    for _ in range(64 * 3):
        ((proposal,), _) = proposer.propose([sequence])
        assert proposal.tokens == [7, 5]
    assert LEAST_SURVIVAL not in least


def test_without_adaptation_all_tokens_are_proposed() -> None:
    assert copy_planner(column_s=0.02, adaptive=False).choose([geometric(0.1, 7)], [0.9], batch_size=4).counts == [7]
