"""`judge`: whatever is proposed, a sequence goes on with the target's own tokens, as in plain decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from aurora_lit.kernels.suffix_index import KINDS, NUM_CELLS
from aurora_lit.modules.sampling.tree import depths
from aurora_lit.request import PLANS, Source
from aurora_lit.serve.engine.round_plan import CopiedNode, Proposal, judge


def trees(nodes: int) -> Iterator[list[int]]:
    """Every list of parents of a tree: column 1 follows the root, and each later one any column before it."""
    yield from (list(parents) for parents in itertools.product(*(range(column) for column in range(1, nodes + 1))))


def path_tokens(tokens: tuple[int, ...], parents: list[int], column: int) -> tuple[int, ...]:
    """The tokens from the root, excluded, to a column."""
    return (*path_tokens(tokens, parents, parents[column - 1]), tokens[column - 1]) if column else ()


@pytest.mark.parametrize(("vocab", "nodes"), [(2, 0), (4, 1), (4, 2), (3, 3), (4, 3), (2, 4)])
def test_every_tree_with_any_own_tokens_emits_what_plain_decoding_emits(vocab: int, nodes: int) -> None:
    """Exhaustively. The target's own token is a function of the tokens before it, as equal columns have equal ones."""
    for parents in trees(nodes):
        for tokens in itertools.product(range(vocab), repeat=nodes):
            paths = [path_tokens(tokens, parents, column) for column in range(nodes + 1)]
            contexts = sorted(set(paths))
            for choices in itertools.product(range(vocab), repeat=len(contexts)):
                own = dict(zip(contexts, choices, strict=True))
                verdict = judge(Proposal(tokens=list(tokens), parents=parents), [own[path] for path in paths])
                plain: tuple[int, ...] = ()
                while plain in own and len(plain) < len(verdict.tokens):
                    plain += (own[plain],)
                assert verdict.tokens == list(plain)
                assert verdict.columns[0] == 0
                assert all(paths[column] == plain[:i] for i, column in enumerate(verdict.columns))


def test_of_equal_siblings_the_first_is_accepted() -> None:
    """A draft proposes no token twice after one column; if it did, the output would still be the target's own."""
    verdict = judge(Proposal(tokens=[1, 1, 2], parents=[0, 0, 2]), [1, 2, 2, 3])
    assert verdict.tokens == [1, 2]


@pytest.mark.parametrize("nodes", range(5))
def test_every_tree_of_four_tokens_with_arbitrary_own_tokens(nodes: int) -> None:
    """Own tokens of rejected columns never matter, and the longest chain of right tokens is accepted."""
    for parents in trees(nodes):
        for tokens in itertools.product(range(4 if nodes < 4 else 2), repeat=nodes):
            for own in itertools.product(range(2), repeat=nodes + 1):
                tokens_out, columns = judge(Proposal(tokens=list(tokens), parents=parents), list(own))
                assert tokens_out == [own[column] for column in columns]
                depth = depths(parents)
                assert [depth[column] for column in columns] == list(range(len(columns)))
                assert [0, *(parents[column - 1] for column in columns[1:])] == [0, *columns[:-1]]
                follows = {
                    (parent, token) for parent, token in zip(parents, tokens, strict=True)
                }  # a node that is accepted after the last column would lengthen the path
                assert (columns[-1], own[columns[-1]]) not in follows


@pytest.mark.parametrize("length", range(5))
def test_a_chain_is_the_tree_of_one_path(length: int) -> None:
    for tokens in itertools.product(range(2), repeat=length):
        for own in itertools.product(range(2), repeat=length + 1):
            chain = judge(Proposal(tokens=list(tokens)), list(own))
            assert chain == judge(Proposal(tokens=list(tokens), parents=list(range(length))), list(own))
            accepted = next((i for i in range(length) if tokens[i] != own[i]), length)
            assert chain.tokens == list(own[: accepted + 1])
            assert chain.columns == list(range(accepted + 1))


def test_first_choices() -> None:
    chain = Proposal(tokens=[5, 6, 7], num_drafted=3)
    tree = Proposal(tokens=[5, 7, 8, 8, 9], parents=[0, 0, 2, 1, 1], num_drafted=5)
    assert (chain.first_choices, tree.first_choices) == ([1, 2, 3], [1, 4])
    beside = Proposal(tokens=[5, 7, 8, 8, 9], parents=[0, 0, 2, 1, 1], num_drafted=2)
    assert beside.first_choices == [1], "copies are no choices of the draft"
    assert Proposal(tokens=[5, 6, 7]).first_choices == [1, 2, 3]


def test_each_proposed_token_has_one_source() -> None:
    """A token that the draft proposes is its own, whatever could have been copied; one that is in both is a look-up."""
    cell = {kind: NUM_CELLS // len(KINDS) * index for index, kind in enumerate(KINDS)}
    copies = (
        CopiedNode(column=2, parent=1, table=0, cell=cell["memory"]),
        CopiedNode(column=3, parent=2, table=0, cell=cell["lookup"]),
        CopiedNode(column=4, parent=3, table=0, cell=cell["memory"]),
        CopiedNode(column=5, parent=4, table=0, cell=cell["both"]),
    )
    proposal = Proposal(tokens=[1, 2, 3, 4, 5], source=Source.DRAFT, num_drafted=2, copies=copies)
    sources = (Source.DRAFT, Source.DRAFT, Source.NGRAM, Source.MEMORY, Source.NGRAM)
    assert proposal.sources_of([1, 2, 3, 4, 5]) == sources
    assert proposal.sources_of([4, 1]) == (Source.MEMORY, Source.DRAFT)


def test_sources_have_their_names() -> None:
    """Traces, metrics and answers keep them; what grammars force counts as looked up."""
    assert [(int(source), source.label) for source in Source] == [
        (0, "target"),
        (1, "draft"),
        (2, "lookup"),
        (3, "memory"),
        (4, "lookup"),
    ]
    assert PLANS == ("plain", "lookup", "memory", "chain", "tree")
