"""What this project proposes without a draft, as proposers of a replay: copies, as the engine looks them up.

The engine decides by measured costs up to which probability of being accepted (survival) a copy is worth its column.
Here costs are left out: an arm proposes all copies above a fixed survival, at most `MAX_NODES`.

Shapes: S slots (one), L its capacity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import CONTEXT_TOKENS, DOMAIN_BITS, NO_COPIES, LookUp, SuffixMemory, look_up
from aurora_lit.serve.speculation.copy_planner import LEAST_SURVIVAL

from .replay import Proposer

MAX_NODES = 15
"""Most proposals of a round."""
CAPACITY_BYTES = 64 << 20
"""Of the memory: the default of memory.capacity_mb."""


class Copying:
    """Copies from within the request, from earlier answers, or from both."""

    def __init__(self, *, own: bool, remembers: bool, least: float = 0.25, knows_domains: bool = False) -> None:
        """`own`: copy from within the request. `least`: smallest survival. `knows_domains`: the memory prefers a
        domain's own answers."""
        self._own, self._least, self._knows_domains = own, least, knows_domains
        self._memory = SuffixMemory(CAPACITY_BYTES) if remembers else None
        self._domains: dict[str, int] = {}
        self._reliability = CopyReliability()
        self._tokens_SL = torch.zeros(1, 1, dtype=torch.int64)
        self._tokens_L = self._tokens_SL[0].numpy()  # the same memory; single tokens are written faster
        self._prompt_length = self._length = 0
        self._part = self._table = 0
        self.found = NO_COPIES
        """The last proposal."""

    def begin(self, prompt: list[int], *, domain: str, sampled: bool) -> None:
        """Store the prompt as the engine does."""
        self._tokens_SL = torch.zeros(1, len(prompt) + 4096, dtype=torch.int64)
        self._tokens_L = self._tokens_SL[0].numpy()
        self._tokens_L[: len(prompt)] = prompt
        self._prompt_length = self._length = len(prompt)
        number = self._domains.setdefault(domain, len(self._domains) + 1)
        self._part = (1 << DOMAIN_BITS) + (number if self._knows_domains else 0)
        self._table = self._reliability.table(sampled=sampled)
        self.found = NO_COPIES

    def propose(self) -> tuple[list[int], list[int]]:
        """The likeliest copies."""
        rows = LookUp(
            slots=[0],
            lengths=[self._length],
            most=[MAX_NODES],
            parts=[self._part if self._memory is not None else 0],
            tables=[self._table],
            rate_RC=self._reliability.rate_RC,
            least=self._least,
            own=self._own,
        )
        (self.found,) = look_up(self._tokens_SL, rows, memory=self._memory)
        return self.found.tokens, [column - 1 for column in self.found.parents]

    def accept(self, tokens: list[int], accepted: int, *, ended: bool) -> None:
        """Store committed tokens, and count which copies were accepted."""
        found = self.found
        if found.tokens and not ended:
            self._reliability.observe_tree(self._table, found, self.path_of(tokens[:accepted]))
        end = self._length + len(tokens)
        self._tokens_L[self._length : end] = tokens
        self._length = end

    def path_of(self, tokens: list[int]) -> list[int]:
        """The columns of a path of the last proposal that these tokens are on, column 0 first."""
        path = [0]
        for token in tokens:
            nodes = enumerate(zip(self.found.parents, self.found.tokens, strict=True), start=1)
            path.append(next(column for column, node in nodes if node == (path[-1], token)))
        return path

    def finish(self) -> None:
        """Remember the answer."""
        if self._memory is not None:
            answer = self._length - self._prompt_length
            tokens = self._tokens_L[max(0, self._prompt_length - CONTEXT_TOKENS) : self._length].tolist()
            self._memory.insert_answer(tokens, answer=answer, part=self._part)


ARMS: dict[str, Callable[[], Proposer]] = {
    "lookup": lambda: Copying(own=True, remembers=False),
    "memory": lambda: Copying(own=False, remembers=True),
    "both": lambda: Copying(own=True, remembers=True),
    "both, from 0.1": lambda: Copying(own=True, remembers=True, least=0.1),
    "both, from 0.05": lambda: Copying(own=True, remembers=True, least=LEAST_SURVIVAL),
}
"""What is compared, by name."""
SHARED_ARMS: dict[str, Callable[[], Proposer]] = {
    **ARMS,
    "both, domains known": lambda: Copying(own=True, remembers=True, knows_domains=True),
}
"""The same where all domains take turns."""
