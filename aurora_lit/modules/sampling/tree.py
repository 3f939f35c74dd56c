"""Draft trees: proposals that branch, so that the target's second choice may be among them too.

Source: Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv 2406.16858.
What is left out: how they grow (kernels/csrc/drafting.hpp) and what a round emits (modules/sampling/verification.py).

A tree is verified in columns: column 0 is the root, the last committed token, and column i + 1 is node i. A node comes
behind its parent, so that one sweep over the columns follows a path.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_choices(parents: Sequence[int]) -> list[int]:
    """The columns, behind the root, of the chain that the draft would have proposed alone, or its beginning.

    `parents`: the parent's column of column 1, 2, …; of the children of a node the first is the likeliest.
    """
    path, at = [], 0
    for column, parent in enumerate(parents, start=1):
        if parent == at:
            path.append(column)
            at = column
    return path


def accepted_path(tokens: Sequence[int], parents: Sequence[int], target_tokens: Sequence[int]) -> list[int]:
    """The columns, behind the root, that a row accepts: each holds the target's own token at the column before.

    `tokens` and `parents` are those of columns 1, 2, …; `target_tokens` starts with the root's column.
    """
    path, at = [], 0
    for column, (token, parent) in enumerate(zip(tokens, parents, strict=True), start=1):
        if parent == at and token == target_tokens[at]:
            path.append(column)
            at = column
    return path


def depths(parents: Sequence[int]) -> list[int]:
    """How far behind the root each column stands, column 0 (the root) included."""
    found = [0]
    for parent in parents:
        found.append(found[parent] + 1)
    return found


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
