"""A round's row for a sequence whose output has a grammar: what it allows at every column, and no proposal beyond that.

Left out: what a grammar allows (grammars/matcher.py), and what is done with the masks (serve/engine/token_choice.py).
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from aurora_lit.grammars.matcher import Grammar, Mask
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, DecodingRow, Proposal, Uncut
from aurora_lit.serve.engine.sequence import RunningSequence

MASKS_S = 0.02
"""Processor time for the masks of one sequence's proposals: other sequences' rounds wait for it."""


def forced_proposal(sequence: RunningSequence, *, most: int) -> Proposal:
    """The next tokens as a chain, where the grammar leaves no choice."""
    if sequence.grammar is None or not sequence.speculates:
        return NO_PROPOSAL
    tokens = sequence.grammar.forced[: max(0, min(most, sequence.num_remaining - 1))]
    return Proposal(tokens=tokens, source=Source.GRAMMAR) if tokens else NO_PROPOSAL


def decoding_row(sequence: RunningSequence, root: int, proposal: Proposal) -> DecodingRow:
    """The row; of a proposal only what the grammar allows, since the target would choose nothing else."""
    if sequence.grammar is None:
        return DecodingRow(sequence, root, proposal)
    allowed = _allowed(proposal, sequence.grammar, sequence.end_tokens)
    columns = sorted(allowed)
    return DecodingRow(
        sequence,
        root,
        proposal if len(columns) == 1 + len(proposal.tokens) else proposal.keeping(columns),
        allowed=np.stack([allowed[column] for column in columns]),
        uncut=Uncut(proposal, columns),
    )


def _allowed(proposal: Proposal, grammar: Grammar, end_tokens: frozenset[int]) -> dict[int, Mask]:
    """The tokens that may follow each column, for those columns that the grammar allows."""
    children = defaultdict(list)
    for column in range(1, 1 + len(proposal.tokens)):
        children[column - 1 if proposal.parents is None else proposal.parents[column - 1]].append(column)
    allowed = {0: grammar.allowed}
    if not proposal.tokens:
        return allowed
    branch = grammar.branch()
    ends_s = time.thread_time() + MASKS_S

    def walk(parent: int) -> None:
        for column in children[parent]:
            token = proposal.tokens[column - 1]
            if not allowed[parent][token >> 3] >> (token & 7) & 1:
                continue
            if token in end_tokens:  # nothing follows it
                allowed[column] = np.full_like(grammar.allowed, 0xFF)
                continue
            if time.thread_time() > ends_s:  # left to later rounds
                return
            branch.enter(token)
            mask_W = branch.allowed()
            if mask_W is not None:  # else a limit of llguidance: left to a later round, which fails if it must
                allowed[column] = mask_W
                walk(column)
            branch.leave()

    walk(0)
    return allowed
