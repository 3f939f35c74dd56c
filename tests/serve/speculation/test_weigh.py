"""What is worth its column, and one tree from the draft's proposals and copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.draft_steps import SHARE_CLASSES
from aurora_lit.kernels.suffix_index import NUM_CELLS, Copies
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, Proposal, SpeculationLimits, WeighedChain
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.sources.ngram import most_probable_path
from aurora_lit.serve.speculation.weigh import LEAST_SURVIVAL, Weigher, copied, with_copies

ALONE, AGREES, AGAINST = 0.5, 0.9, 0.2
OWN, REMEMBERED = 0, NUM_CELLS // 3


def reliability() -> CopyReliability:
    """The same rate in all cells of a table."""
    rates = CopyReliability()
    for relation, rate in (("alone", ALONE), ("agrees", AGREES), ("against", AGAINST)):
        rates.rate_RC[rates.table(sampled=False, relation=relation)] = rate
    return rates


def drafted(tokens: list[int], parents: list[int] | None = None) -> Proposal:
    return Proposal(tokens=tokens, parents=parents, source=Source.DRAFT, num_drafted=len(tokens))


def copies(tokens: list[int], parents: list[int] | None = None, cell: int = OWN) -> Copies:
    parents = list(range(len(tokens))) if parents is None else parents
    return Copies(tokens, parents, [1.0] * len(tokens), [cell] * len(tokens))


def merged(draft: Proposal, found: Copies, *, least: float = 0.15, most: int = 15) -> Proposal:
    return with_copies(draft, found, reliability=reliability(), sampled=False, least=least, most=most)


def test_copies_alone_are_a_chain_or_a_tree() -> None:
    chain = copied(copies([5, 6, 7]), 2, table=3)
    assert (chain.tokens, chain.parents, chain.source, chain.num_drafted) == ([5, 6], None, Source.NGRAM, 0)
    assert [(node.column, node.parent, node.table) for node in chain.copies] == [(1, 0, 3), (2, 1, 3)]
    tree = copied(copies([5, 6, 7], [0, 1, 0], REMEMBERED), 3, table=0)
    assert (tree.tokens, tree.parents, tree.source) == ([5, 6, 7], [0, 1, 0], Source.MEMORY)
    assert tree.remembered == [1, 2, 3]
    assert copied(copies([5]), 0, table=0) is NO_PROPOSAL


def test_the_most_probable_path() -> None:
    assert most_probable_path(copies([5, 6, 7, 8], [0, 0, 1, 3])).tokens == [5, 7, 8]


def test_where_the_draft_agrees_its_branch_goes_on_with_the_copies() -> None:
    proposal = merged(drafted([5, 6]), copies([5, 6, 7, 8]))
    assert (proposal.tokens, proposal.parents) == ([5, 6, 7, 8], None)  # 0.9² · 0.5, 0.9² · 0.5²
    assert proposal.num_drafted == 2
    assert proposal.first_choices == [1, 2]
    assert merged(drafted([5, 6]), copies([5, 6, 7, 8]), least=0.3).tokens == [5, 6, 7]


def test_a_copy_against_the_draft_is_another_branch() -> None:
    proposal = merged(drafted([5, 6]), copies([9, 10]), least=0.1)
    assert (proposal.tokens, proposal.parents) == ([5, 6, 9, 10], [0, 1, 0, 3])  # 0.2, 0.2 · 0.5
    assert proposal.first_choices == [1, 2]
    assert merged(drafted([5, 6]), copies([9, 10]), least=0.15).tokens == [5, 6, 9]
    assert merged(drafted([5, 6]), copies([9, 10]), least=0.25).tokens == [5, 6]


def test_copies_alone_remain_of_a_weighed_chain_of_which_nothing_is_worth_its_column() -> None:
    nothing = Proposal(tokens=[], weighed=WeighedChain([5, 6], [0.2, 0.1]))
    proposal = merged(nothing, copies([9, 10], cell=REMEMBERED))
    assert (proposal.tokens, proposal.parents, proposal.num_drafted) == ([9, 10], None, 0)
    assert proposal.source == Source.MEMORY
    assert proposal.weighed == nothing.weighed
    assert merged(nothing, copies([9])).source == Source.NGRAM
    beside = merged(Proposal(tokens=[5, 6, 7], parents=[0, 1, 0], source=Source.DRAFT, num_drafted=3), copies([7, 8]))
    assert (beside.tokens, beside.parents, beside.num_drafted) == ([5, 6, 7, 8], [0, 1, 0, 3], 3)


def test_copies_fit_into_the_drafts_tree() -> None:
    proposal = merged(drafted([5, 6, 7], [0, 0, 2]), copies([6, 8], [0, 1]))
    assert (proposal.tokens, proposal.parents) == ([5, 6, 7, 8], [0, 0, 2, 2])  # 0.9 · 0.2
    tables = reliability()
    agrees, against = (tables.table(sampled=False, relation=relation) for relation in ("agrees", "against"))
    assert [(node.column, node.table) for node in proposal.copies] == [(2, agrees), (4, against)]


def test_what_follows_a_left_out_copy_is_left_out_and_trees_stay_bounded() -> None:
    assert merged(drafted([5]), copies([9, 5, 6], [0, 1, 2]), least=0.3).tokens == [5]
    assert merged(drafted([5]), copies([5, 6, 7, 8]), least=0.0, most=3).tokens == [5, 6, 7]


@pytest.mark.parametrize("least", [0.0, 0.1, 0.3])
def test_every_node_follows_one_before_it_and_is_proposed_once(least: float) -> None:
    proposal = merged(drafted([1, 2, 3], [0, 1, 1]), copies([1, 3, 4, 2, 1], [0, 1, 2, 0, 4]), least=least)
    parents = proposal.parents or list(range(len(proposal.tokens)))
    assert all(parent < column for column, parent in enumerate(parents, start=1))
    assert len(set(zip(parents, proposal.tokens, strict=True))) == len(parents)


# -- what is worth its column --------------------------------------------------------------------------------------


def weigher(*, ragged: bool = True, tokens_per_s: float = 100.0, **limits: Any) -> Weigher:
    """A plain round takes 10 ms, and each further column of all sequences 1 ms; drafting takes 1 ms a token."""
    costs = Costs(ragged=ragged)
    for batch_size in (1, 4):
        for length in (1, 2, 9):
            costs.target.set_initial(batch_size, length, 0.010 + 0.001 * batch_size * (length - 1))
            costs.chain.set_initial(batch_size, length, 0.001 * batch_size * length)
    found = Weigher(SpeculationLimits(**{"draft_tokens": 4, "copied_tokens": 8, **limits}), costs)
    for batch_size in (1, 4):
        for _ in range(400):
            found.observe(batch_size, tokens=1, seconds=1 / tokens_per_s)
    return found


def test_the_price_is_the_tokens_that_the_columns_time_would_bring() -> None:
    assert weigher().speed(4) == pytest.approx(100.0, rel=1e-4)
    assert weigher().column_tokens(4) == pytest.approx(0.1, rel=1e-4)
    assert weigher(tokens_per_s=400.0).column_tokens(4, 3) == pytest.approx(0.4, rel=1e-4)
    assert weigher(tokens_per_s=50.0).least_survival(4) == LEAST_SURVIVAL
    assert weigher(tokens_per_s=400.0).least_survival(4) == pytest.approx(0.2, rel=1e-4)
    assert weigher(adaptive=False).column_tokens(4) == 0.0


def test_before_the_first_round_time_is_worth_what_plain_rounds_bring() -> None:
    costs = Costs(ragged=True)
    limits = SpeculationLimits(draft_tokens=4, copied_tokens=8)
    assert Weigher(limits, costs).speed(2) == 0.0
    costs.target.set_initial(1, 1, 0.010)
    assert Weigher(limits, costs).speed(1) == pytest.approx(100.0)


@pytest.mark.parametrize(("tokens_per_s", "expected"), [(100.0, [3, 1, 0]), (500.0, [2, 0, 0]), (2000.0, [0, 0, 0])])
def test_copies_of_all_sequences_are_proposed_best_first_while_they_repay_their_columns(
    tokens_per_s: float, expected: list[int]
) -> None:
    survivals = [[0.9, 0.7, 0.3], [0.4, 0.08], [0.06]]
    assert weigher(tokens_per_s=tokens_per_s).copies(survivals, [0.0] * 3, batch_size=4) == expected


def test_of_padded_rows_only_the_longest_costs() -> None:
    survivals = [[0.9, 0.9], [0.06, 0.06]]
    assert weigher(ragged=False, tokens_per_s=200.0).copies(survivals, [0.0] * 2, batch_size=4) == [2, 2]


def test_copies_that_promise_less_than_the_draft_are_left_to_it() -> None:
    found = weigher()
    assert found.copies([[0.6], [0.95, 0.9, 0.9]], [0.9, 0.9], batch_size=4) == [0, 3]
    assert found.copies([[0.6], [0.95, 0.9, 0.9]], [0.1, 0.1], batch_size=4) == [1, 3]


def test_a_copy_may_be_tried_whatever_it_promises() -> None:
    found = weigher(tokens_per_s=5000.0)
    assert found.copies([[0.2], [0.3, 0.1]], [0.0, 0.0], batch_size=4, at_least_one=True) == [0, 1]


def test_native_steps_get_the_price_and_what_columns_and_levels_take() -> None:
    acceptance_KC = torch.rand(2, SHARE_CLASSES)
    found = weigher(sibling_tokens=3).draft_weighing([0.5, 0.7], acceptance_KC, batch_size=4)
    assert found.speed == pytest.approx(100.0, rel=1e-4)
    assert found.level_rates == [0.5, 0.7]
    assert found.prices.acceptance_KC is acceptance_KC
    assert list(found.prices.columns_s)[:4] == pytest.approx([0.0, 0.001, 0.002, 0.003])
    assert len(found.prices.columns_s) == 1 + 4 * 8
    assert len(found.prices.levels_s) == 3
    assert list(found.prices.levels_s) == pytest.approx([0.001 * (1 + 3 / 3)] * 3)
