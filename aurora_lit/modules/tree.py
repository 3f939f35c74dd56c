"""Draft trees: proposals that branch, so that the target's second choice may be among them too.

Source: Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv 2406.16858: grow level
by level from the likeliest nodes, then verify the likeliest of all. A node's log-probability is its path's, by the
draft. What is left out: the draft's passes (serve/branching.py) and what a round emits (modules/sampling.py).

A tree is verified in columns: column 0 is the root, the last committed token, and column i + 1 is node i. A node comes
behind its parent, so that one sweep over the columns follows a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Tree:
    """One row's tree while it grows; node i has an entry i in each list.

    >>> tree = Tree()
    >>> tree.add([-1], tokens=[[5, 7]], logprobs=[[-0.5, -1.2]])
    >>> tree.add([0], tokens=[[8]], logprobs=[[-0.1]])
    >>> tree.likeliest(2).tokens
    [5, 8]
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """Node in front; −1 is the root."""
    logprobs: list[float] = field(default_factory=list)
    """Of the path from the root; never above the parent's."""

    def add(
        self, parents: Sequence[int], *, tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
    ) -> None:
        """Append children of some nodes, the likeliest of each first; their log-probabilities given the parent."""
        for parent, children, given_parent in zip(parents, tokens, logprobs, strict=True):
            before = self.logprobs[parent] if parent >= 0 else 0.0
            self.tokens += children
            self.parents += [parent] * len(children)
            self.logprobs += [before + min(0.0, logprob) for logprob in given_parent]

    def best(self, count: int, *, start: int = 0) -> list[int]:
        """The likeliest nodes from node `start` on, likeliest first; of equal ones the earlier."""
        return sorted(range(start, len(self.tokens)), key=lambda i: -self.logprobs[i])[:count]

    def likeliest(self, count: int) -> Tree:
        """The likeliest nodes as a tree of their own: parents are at least as likely, so none is missing."""
        kept = sorted(self.best(count))
        place = {-1: -1, **{node: i for i, node in enumerate(kept)}}
        return Tree(
            tokens=[self.tokens[i] for i in kept],
            parents=[place[self.parents[i]] for i in kept],
            logprobs=[self.logprobs[i] for i in kept],
        )


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
