"""What this project proposes without a draft, as proposers of a replay.

The engine decides by measured costs up to which probability of being accepted (survival) a proposal pays. Here costs
are left out: all arms stop at the same survival and the same number of proposals.
"""

from __future__ import annotations

from collections.abc import Callable

from aurora_lit.serve.sequences.ngram_index import NgramIndex
from aurora_lit.serve.speculation.ngram_planner import NgramAcceptance

from .replay import ROOT, Proposer

MAX_NODES = 15
"""Most proposals of a round."""
LEAST_SURVIVAL = 0.25
"""Proposals that are less likely to be accepted are not made."""


class Lookup:
    """n-gram lookup inside the request: the chain that followed the longest earlier match."""

    def __init__(self) -> None:
        self._acceptance = NgramAcceptance()
        self._index = NgramIndex()
        self._match, self._proposed = 0, 0

    def begin(self, prompt: list[int], domain: str) -> None:
        """Index the prompt."""
        del domain
        self._index = NgramIndex(prompt)
        self._proposed = 0

    def propose(self) -> tuple[list[int], list[int]]:
        """A chain, as long as its survival suffices."""
        self._match, at = self._index.find_longest_match()
        survival = self._acceptance.survival(self._match, MAX_NODES) if self._match else []
        self._proposed = sum(reached >= LEAST_SURVIVAL for reached in survival)
        return self._index.continuation(at, self._proposed), list(range(ROOT, self._proposed - 1))

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        """Index committed tokens, and learn how many were accepted."""
        if self._proposed and not ended:
            self._acceptance.observe(self._match, proposed=self._proposed, accepted=accepted)
        self._index.extend(tokens)

    def finish(self) -> None:
        """Nothing is kept."""


ARMS: dict[str, Callable[[], Proposer]] = {"lookup": Lookup}
"""What is compared, by name."""
