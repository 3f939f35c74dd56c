"""One tree from the draft's proposals and copies: which nodes it has, and what is learned from its outcome."""

from __future__ import annotations

import pytest

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import NUM_CELLS, Copies
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, Proposal, WeighedChain
from aurora_lit.serve.speculation.candidate_tree import chain_of, copied, with_copies

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
    assert chain_of(copies([5, 6, 7, 8], [0, 0, 1, 3])).tokens == [5, 7, 8]


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
