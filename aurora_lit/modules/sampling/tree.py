"""Trees of proposals: those that branch, so that the target's second choice may be among them too.

A tree is verified as columns of one forward pass: column 0 is the root, the last committed token, and column i + 1 is
node i. Every node comes after its parent, so that one sweep over the columns follows a path. `parents` lists the
parent's column of columns 1, 2, …

Leaves out where they come from (kernels/csrc/drafting.hpp, serve/speculation/weigh.py) and what a round emits
(serve/engine/round_plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence


def first_choices(parents: Sequence[int]) -> list[int]:
    """The columns of the chain of first choices, without the root: what the draft would have proposed as a chain.

    Of a node's children the first is the likeliest. The tree may hold only the beginning of that chain.
    """
    path, at = [], 0
    for column, parent in enumerate(parents, start=1):
        if parent == at:
            path.append(column)
            at = column
    return path


def accepted_path(tokens: Sequence[int], parents: Sequence[int] | None, target_tokens: Sequence[int]) -> list[int]:
    """The accepted columns, without the root: each holds the target's own token at its parent's column.

    Args:
        tokens: of columns 1, 2, …
        parents: of columns 1, 2, …; None: a chain, where each column follows the one before.
        target_tokens: the target's own token at columns 0, 1, …
    """
    path, at = [], 0
    for column, token in enumerate(tokens, start=1):
        if (column - 1 if parents is None else parents[column - 1]) == at and token == target_tokens[at]:
            path.append(column)
            at = column
        elif parents is None:
            break
    return path


def depths(parents: Sequence[int]) -> list[int]:
    """The depth of every column, the root's 0 included."""
    depth = [0]
    for parent in parents:
        depth.append(depth[parent] + 1)
    return depth


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
