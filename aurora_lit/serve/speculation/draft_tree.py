"""Drafting a tree: level by level, the likeliest nodes of each expanded in one batched pass of the draft.

The nodes that were expanded lie behind the committed positions in the draft's cache, each seeing its ancestors alone;
the next catching up overwrites them. What is left out: when a tree pays (serve/speculation/planner.py), how it grows
(kernels/csrc/drafting.hpp) and its verification (modules/sampling/verification.py).

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aurora_lit.modules.sampling.verification import Proposals
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

LEVEL_WIDTH = 4
"""Most nodes of a row that a level expands, and the children that are thought of for each."""


def slot_capacity(*, max_seq_len: int, max_draft_tokens: int, tree_tokens: int, lookup_tokens: int = 0) -> int:
    """Positions of a slot: a request's own, and behind them what a round proposes and a draft expands."""
    columns = max(max_draft_tokens, tree_tokens, lookup_tokens, LEVEL_WIDTH * max_draft_tokens if tree_tokens else 0)
    return max_seq_len + columns + 1


def propose_tree(
    drafter: Drafter,
    rows: DraftInputs,
    *,
    num_steps: int,
    num_nodes: int,
    go_on: Callable[[int, list[float]], bool],
) -> tuple[Proposals, int]:
    """The likeliest `num_nodes` nodes of up to `num_steps` levels a row, chosen by the draft without drawing; levels.

    Before each further level `go_on(levels done, reach_B)` may stop; `reach_B` is the probability, by the draft, that a
    row's path leads through the nodes to be expanded. Needs a drafter that can branch.
    """
    width = max(2, min(LEVEL_WIDTH, num_nodes))
    steps, levels = drafter.grow(
        rows, num_steps=num_steps, width=width, go_on=lambda done, reach_B: go_on(done, reach_B.tolist())
    )
    token_BK, parent_BK = steps.proposals(num_nodes)
    num_B = torch.full_like(rows.slots_B, token_BK.shape[1])
    return Proposals(token_BK=token_BK, num_B=num_B, q_BKD=None, parent_BK=parent_BK), levels
