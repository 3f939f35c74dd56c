"""Drafting a tree: level by level, the likeliest nodes of each expanded in one batched pass of the draft.

The nodes that were expanded lie behind the committed positions in the draft's cache, each seeing its ancestors alone;
the next catching up overwrites them. What is left out: when a tree pays (serve/speculation.py), the tree's own
arithmetic (modules/tree.py) and its verification (modules/sampling.py).

Shapes: B rows, W nodes of a level that are expanded, K proposals, C columns of the draft's cache, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from aurora_lit.modules.sampling import Proposals
from aurora_lit.modules.tree import Tree
from aurora_lit.serve.drafting import Drafter, DraftRows

LEVEL_WIDTH = 4
"""Most nodes of a row that a level expands, and the children that are thought of for each."""


def slot_capacity(*, max_seq_len: int, max_draft_tokens: int, tree_tokens: int) -> int:
    """Positions of a slot: a request's own, and behind them what a round proposes and a draft expands."""
    columns = max(max_draft_tokens, tree_tokens, LEVEL_WIDTH * max_draft_tokens if tree_tokens else 0)
    return max_seq_len + columns + 1


def propose_tree(
    drafter: Drafter,
    rows: DraftRows,
    *,
    num_steps: int,
    num_nodes: int,
    go_on: Callable[[int, list[float]], bool],
) -> Proposals:
    """The likeliest `num_nodes` nodes of up to `num_steps` levels a row, chosen by the draft without drawing.

    Before each further level `go_on(levels done, reach_B)` may stop; `reach_B` is the probability, by the draft, that a
    row's path leads through the nodes to be expanded. Needs a drafter that can branch.
    """
    draft = drafter.draft
    hidden_BWH = drafter.catch_up(rows)[:, None]
    starts_B = torch.tensor(rows.lengths) - 1
    trees = [Tree() for _ in rows.lengths]
    level = [[-1] for _ in trees]  # the nodes whose children come next
    columns: list[dict[int, int]] = [{-1: -1} for _ in trees]  # where expanded nodes lie in the cache
    parents: list[list[int]] = [[] for _ in trees]
    steps = 0
    while True:
        logits_BWD = draft.lm_head(draft.norm(hidden_BWH))
        top = logits_BWD.topk(min(LEVEL_WIDTH, logits_BWD.shape[-1]), -1)
        logprobs = (top.values - logits_BWD.logsumexp(-1, keepdim=True)).tolist()
        tokens = drafter.vocabulary.target_id_D[top.indices].tolist()
        grown = [len(tree.tokens) for tree in trees]
        for b, tree in enumerate(trees):
            tree.add(level[b], tokens=tokens[b], logprobs=logprobs[b])
        steps += 1
        before, level = level, [
            tree.best(min(LEVEL_WIDTH, num_nodes), start=start) for tree, start in zip(trees, grown, strict=True)
        ]
        if steps == num_steps or not go_on(steps, [_reach(t, nodes) for t, nodes in zip(trees, level, strict=True)]):
            break
        for b, tree in enumerate(trees):
            for node in level[b]:
                columns[b][node] = len(parents[b])
                parents[b].append(columns[b][tree.parents[node]])
        behind_BW = torch.tensor(
            [[before[b].index(tree.parents[node]) for node in level[b]] for b, tree in enumerate(trees)]
        )
        hidden_BWH = drafter.run(
            torch.tensor([[tree.tokens[node] for node in nodes] for tree, nodes in zip(trees, level, strict=True)]),
            hidden_BWH[torch.arange(len(trees))[:, None], behind_BW],
            rows.slots_B,
            starts_B,
            parents_BC=torch.tensor(parents),
        )
    chosen = [tree.likeliest(num_nodes) for tree in trees]
    return Proposals(
        token_BK=torch.tensor([tree.tokens for tree in chosen]),
        num_B=torch.tensor([len(tree.tokens) for tree in chosen]),
        q_BKD=None,
        parent_BK=torch.tensor([tree.parents for tree in chosen]) + 1,
    )


def _reach(tree: Tree, nodes: list[int]) -> float:
    return sum(math.exp(tree.logprobs[node]) for node in nodes)
