"""One candidate tree a sequence, from what is copied and what the draft proposes. Pure functions.

Left out: which copies there are (kernels/suffix_index.py), how many are worth their columns
(serve/speculation/copy_planner.py), and the draft's part (serve/speculation/drafter.py).
"""

from __future__ import annotations

from dataclasses import replace

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, CopiedNode, Proposal, source_of_copies


def copied(copies: Copies, count: int, *, table: int) -> Proposal:
    """The `count` most probable copies as a proposal: a chain if they are one."""
    if not count:
        return NO_PROPOSAL
    parents, cells = copies.parents[:count], copies.cells[:count]
    return Proposal(
        tokens=copies.tokens[:count],
        parents=None if parents == list(range(count)) else parents,
        source=source_of_copies(cells),
        copies=tuple(
            CopiedNode(column, parent, table, cell)
            for column, (parent, cell) in enumerate(zip(parents, cells, strict=True), start=1)
        ),
    )


def chain_of(copies: Copies) -> Copies:
    """Only the most probable path, for targets that compute no trees."""
    kept, at = [], 0
    for column, parent in enumerate(copies.parents, start=1):
        if parent == at:
            kept.append(column - 1)
            at = column
    tokens, survivals, cells = ([values[i] for i in kept] for values in (copies.tokens, copies.survivals, copies.cells))
    return Copies(tokens, list(range(len(kept))), survivals, cells)  # type: ignore[arg-type]


def with_copies(
    drafted: Proposal, copies: Copies, *, reliability: CopyReliability, sampled: bool, least: float, most: int
) -> Proposal:
    """What the draft proposes, and beside it or after it the copies that are at least `least` probable.

    Where the draft proposes the same token, its branch goes on with the copies; where it proposes another one, a copy
    is less probable than alone. Both are known from what was verified. `most`: no copy is added beyond so many tokens.
    """
    tokens = list(drafted.tokens)
    parents = list(range(len(tokens))) if drafted.parents is None else list(drafted.parents)
    num_drafted = len(tokens)
    columns = {(parent, token): column for column, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1)}
    has_drafted_children = set(parents)
    column_of, survival_of = {0: 0}, {0: 1.0}
    nodes = []
    alone, agrees, against = (
        reliability.table(sampled=sampled, relation=relation) for relation in ("alone", "agrees", "against")
    )
    for copy, (token, copied_parent, cell) in enumerate(
        zip(copies.tokens, copies.parents, copies.cells, strict=True), start=1
    ):
        parent = column_of.get(copied_parent)
        if parent is None:  # left out itself
            continue
        column = columns.get((parent, token))
        if column is None:
            table = against if parent in has_drafted_children else alone
            survival = survival_of[parent] * reliability.rate(table, cell)
            if survival < least or len(tokens) >= most:
                continue
            tokens.append(token)
            parents.append(parent)
            column = columns[parent, token] = len(tokens)
        else:
            table = agrees
            survival = survival_of[parent] * reliability.rate(table, cell)
        column_of[copy], survival_of[column] = column, survival
        nodes.append(CopiedNode(column, parent, table, cell))
    if not nodes:
        return drafted
    is_chain = parents == list(range(len(tokens)))
    # Without drafted tokens, nothing that was drafted is worth its column.
    source = Source.DRAFT if num_drafted else source_of_copies(node.cell for node in nodes)
    return replace(
        drafted,
        tokens=tokens,
        parents=None if is_chain else parents,
        source=source,
        num_drafted=num_drafted,
        copies=tuple(nodes),
    )
