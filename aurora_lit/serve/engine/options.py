"""Every option of an engine, and the capacity of a slot that follows from them.

Left out: where they come from (settings.py, serve/worker/build.py), and what is no option: the models, the observer and
the name of the draft's version (serve/engine/engine.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from aurora_lit.serve.engine.memory_scope import MemoryScope
from aurora_lit.serve.speculation.planner import weighed_tokens


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine serves.

    Only `eos_token_ids` and `max_seq_len` affect the output of a request; the others affect speed and traces. There are
    no defaults here: those of a deployment are in settings.py.
    """

    eos_token_ids: frozenset[int]
    """Tokens that end the output of every request, except with `ignore_eos`."""
    max_batch_size: int
    """Number of slots: requests that run at the same time."""
    max_seq_len: int
    """Most tokens of a request, prompt and output together."""
    max_draft_tokens: int
    """Longest chain that the draft proposes in a round; 0: the draft is not used."""
    sibling_tokens: int
    """Most tokens that are considered beside each of a chain; 0: none, and all of a chain is proposed. Needs a draft
    with native steps and a target that supports trees."""
    copied_tokens: int
    """Most tokens that a round copies for a sequence, from within the request or from the traffic memory; 0: none."""
    adaptive: bool
    """True: the number of proposals per round follows measured costs, which are calibrated when the engine is created.
    False: always the most that is allowed."""
    prefill_chunk_tokens: int
    """Most prompt tokens computed in a round."""
    max_round_s: float
    """Seconds that a round takes at most beside sequences that decode: so many prompt tokens are computed in it."""
    prefix_cache: bool
    """True: a prefix of a prompt that a slot still holds is copied instead of computed."""
    explore_share: float
    """Share of drafted rounds whose proposals are drawn at `explore_temperature` to explore, from 0 to 1."""
    explore_temperature: float
    lookup: bool = True
    """False: nothing is copied from within requests."""
    memory_bytes: int = 0
    """Of the traffic memory, from which requests copy too; 0: there is none."""
    memory_scope: MemoryScope = "off"
    """Who shares it."""
    explore_seed: int = 0
    """Decides which rounds explore."""

    @property
    def slot_capacity(self) -> int:
        """Positions of a slot."""
        return slot_capacity(
            max_seq_len=self.max_seq_len,
            max_draft_tokens=self.max_draft_tokens,
            sibling_tokens=self.sibling_tokens,
            copied_tokens=self.copied_tokens,
        )


def slot_capacity(*, max_seq_len: int, max_draft_tokens: int, sibling_tokens: int, copied_tokens: int) -> int:
    """Positions that each slot of the KV caches has room for (arguments: as in `EngineOptions`).

    A request of `max_seq_len` tokens is followed by the columns that one round adds to it: the last committed token,
    and the proposals. The engine's table of tokens has one position more.
    """
    return max_seq_len + max(max_draft_tokens, weighed_tokens(max_draft_tokens, sibling_tokens), copied_tokens) + 1
