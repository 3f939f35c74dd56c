"""Rows of outputs with a grammar: proposals that it forbids are cut, and what it forces is proposed."""

from __future__ import annotations

import numpy as np
import pytest
from support.grammars import END, TOKENS, compiler
from support.tiny_models import request

from aurora_lit.kernels.suffix_index import is_remembered
from aurora_lit.request import Source, StructuredOutputsParams
from aurora_lit.serve.engine.round_plan import CopiedNode, Proposal
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.grammar import decoding_row, forced_proposal

A, B, C, ZERO, ONE, QUOTE, COMMA, AB = range(len(TOKENS))
COPIED_CELL = next(cell for cell in range(4096) if not is_remembered(cell))
REMEMBERED_CELL = next(cell for cell in range(4096) if is_remembered(cell))


def a_sequence(regex: str, *, output: tuple[int, ...] = (), **params: object) -> RunningSequence:
    asked = StructuredOutputsParams(regex=regex)
    grammar = compiler().compile(asked, end_tokens=frozenset([END])).result()
    grammar.advance(output)
    return RunningSequence(
        request=request("a", [C], structured_outputs=asked, **params),
        slot=0,
        prompt_length=1,
        length=1 + len(output),
        end_tokens=frozenset([END]),
        grammar=grammar,
    )


def allowed(row_allowed: np.ndarray | None) -> list[set[int]]:
    assert row_allowed is not None
    bits = np.unpackbits(row_allowed, axis=1, bitorder="little")
    return [set(np.nonzero(line)[0].tolist()) for line in bits]


def test_a_chain_is_cut_at_the_first_token_that_is_forbidden() -> None:
    sequence = a_sequence("[ab]{2}[01]")
    row = decoding_row(sequence, C, Proposal(tokens=[A, B, C, ZERO], source=Source.DRAFT, num_drafted=4))
    assert (row.proposal.tokens, row.proposal.num_drafted, row.proposal.parents) == ([A, B], 2, None)
    assert allowed(row.allowed) == [{A, B, AB}, {A, B}, {ZERO, ONE}]
    assert row.uncut is not None
    assert (row.uncut.proposal.tokens, list(row.uncut.columns)) == ([A, B, C, ZERO], [0, 1, 2])


def test_proposals_whose_masks_take_too_long_are_left_to_later_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, proposal = a_sequence("[ab]{2}[01]"), Proposal(tokens=[A, B, ZERO], source=Source.DRAFT, num_drafted=3)
    assert decoding_row(sequence, C, proposal).proposal.tokens == [A, B, ZERO]
    monkeypatch.setattr("aurora_lit.serve.speculation.sources.grammar.MASKS_S", -1.0)
    row = decoding_row(sequence, C, proposal)
    assert (row.proposal.tokens, allowed(row.allowed)) == ([], [{A, B, AB}])


def test_of_a_tree_each_branch_is_cut_and_columns_keep_their_order() -> None:
    sequence = a_sequence("a(b0|c1)|b[01]")
    copies = (
        CopiedNode(2, 0, 1, COPIED_CELL),
        CopiedNode(6, 2, 1, COPIED_CELL),
        CopiedNode(7, 3, 1, REMEMBERED_CELL),
    )
    tree = Proposal(
        tokens=[C, A, B, A, C, C, ONE],
        parents=[0, 0, 0, 1, 2, 2, 3],
        source=Source.DRAFT,
        num_drafted=4,
        copies=copies,
    )
    row = decoding_row(sequence, C, tree)
    assert row.proposal.tokens == [A, B, C, C, ONE]
    assert row.proposal.parents == [0, 0, 1, 1, 2]
    assert (row.proposal.num_drafted, row.proposal.source) == (2, Source.DRAFT)
    assert [(node.column, node.parent) for node in row.proposal.copies] == [(1, 0), (4, 1), (5, 2)]
    assert row.proposal.remembered == [5]
    assert row.uncut is not None
    assert list(row.uncut.columns) == [0, 2, 3, 5, 6, 7]
    assert allowed(row.allowed)[0] == {A, B, AB}
    assert allowed(row.allowed)[1:] == [{B, C}, {ZERO, ONE}, {ONE}, {ONE}, {END}]


@pytest.mark.parametrize(("cell", "source"), [(COPIED_CELL, Source.NGRAM), (REMEMBERED_CELL, Source.MEMORY)])
def test_a_proposal_of_which_only_copies_are_left_is_none_of_the_drafts(cell: int, source: int) -> None:
    tree = Proposal(
        tokens=[C, A],
        parents=[0, 0],
        source=Source.DRAFT,
        num_drafted=1,
        copies=(CopiedNode(2, 0, 0, cell),),
    )
    row = decoding_row(a_sequence("[ab]0"), C, tree)
    assert (row.proposal.tokens, row.proposal.source, row.proposal.num_drafted) == ([A], source, 0)
    nothing = decoding_row(a_sequence("[ab]0"), C, Proposal(tokens=[C], source=Source.DRAFT, num_drafted=1))
    assert (nothing.proposal.tokens, nothing.proposal.num_drafted) == ([], 0)
    assert allowed(nothing.allowed) == [{A, B}]


def test_nothing_is_kept_after_the_end() -> None:
    row = decoding_row(a_sequence("[ab]", output=(A,)), A, Proposal(tokens=[END, A], source=Source.DRAFT))
    assert row.proposal.tokens == [END]


def test_what_is_forced_is_proposed_up_to_the_limits_of_the_round_and_of_the_request() -> None:
    def tokens(most: int, **params: object) -> list[int]:
        return forced_proposal(a_sequence("[ab]c0,", output=(A,), **params), most=most).tokens

    assert tokens(15) == [C, ZERO, COMMA, END]
    assert tokens(2) == [C, ZERO]
    assert tokens(15, max_tokens=4) == [C, ZERO], "one token of the target's own follows"
    assert tokens(15, speculate=False) == tokens(0) == []
    assert forced_proposal(a_sequence("[ab]c0,", output=(A,)), most=15).source is Source.GRAMMAR
    assert not forced_proposal(a_sequence("[ab]c0,"), most=15).tokens


def test_a_row_without_a_grammar_is_as_it_was() -> None:
    sequence = RunningSequence(request=request("a", [1]), slot=0, prompt_length=1, length=1)
    proposal = Proposal(tokens=[C], source=Source.DRAFT, num_drafted=1)
    row = decoding_row(sequence, 1, proposal)
    assert row.proposal is proposal
    assert (row.allowed, row.uncut) == (None, None)
    assert not forced_proposal(sequence, most=15).tokens
