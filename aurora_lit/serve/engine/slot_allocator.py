"""How large slots are, which are free, and which prefix of a new prompt one holds, which need not be computed again.

A freed slot keeps its keys, values and hidden states until another request gets it. Left out: copying from slot to slot
(serve/engine/target_runner.py), and when a prompt searches for its prefix (serve/engine/prefill.py).

Shapes: S slots, L capacity of a slot, N tokens of a prompt.
"""

from __future__ import annotations

import torch

from aurora_lit.config import copied_tokens
from aurora_lit.request import Request
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.planner import SIBLING_TOKENS, weighed_tokens
from aurora_lit.settings import EngineSettings, MemorySettings

_MIN_PREFIX = 16
"""Shorter shared prefixes are computed again: copying them saves too little."""


def slot_capacity(settings: EngineSettings, memory: MemorySettings) -> int:
    """Positions that each slot of the KV caches has room for.

    A request of `max_seq_len` tokens is followed by the columns that one round adds to it: the last committed token,
    and the proposals. The engine's table of tokens has one position more.
    """
    longest = max(weighed_tokens(settings.max_draft_tokens, SIBLING_TOKENS), copied_tokens(settings, memory))
    return settings.max_seq_len + longest + 1


class SlotAllocator:
    """The free slots, and the last sequence of each slot.

    >>> slot, num_cached = allocator.allocate(request)              # the first tokens need not be computed
    >>> allocator.assign(sequence)                                  # the slot is not free any more
    >>> source, num_cached = allocator.find_longest_prefix(sequence)    # again before its prefill starts
    >>> allocator.free(sequence.slot)
    """

    def __init__(
        self, tokens_SL: torch.Tensor, *, prefix_cache: bool, has_observer: bool, has_prompt_arithmetic: bool
    ) -> None:
        """`prefix_cache` False: every prompt is computed in full.

        `has_prompt_arithmetic`: only positions that were computed as a prompt's are used for other prompts, since those
        of generated tokens are rounded differently (`Target.has_prompt_arithmetic`). A conversation's answers are
        therefore computed again when they come back in the next prompt.

        `has_observer`: hidden states are recorded, but only of requests that may be stored (`Request.store`).

        Prefixes are copied only between requests with the same `Request.cache_salt`.
        """
        self._tokens_SL = tokens_SL
        self._prefix_cache, self._has_observer = prefix_cache, has_observer
        self._has_prompt_arithmetic = has_prompt_arithmetic
        self._free = list(range(len(tokens_SL)))
        """Least recently used first."""
        self._sequences: list[RunningSequence | None] = [None] * len(tokens_SL)

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return len(self._free)

    def allocate(self, request: Request) -> tuple[int, int]:
        """A free slot, and how many of the prompt's tokens it holds. It stays free until a sequence is assigned to it.

        The slot with the longest prefix of the prompt is taken if that is at least half of what it holds, as where a
        conversation goes on. Otherwise the least recently used one is, and the prefix is copied to it before the prompt
        is read: conversations that share only a system prompt would evict each other while other slots are empty.
        """
        lengths = self._prefix_lengths(request)
        slot = max(self._free, key=lengths.__getitem__)  # max takes the first of equal ones
        holder = self._sequences[slot]
        if holder is not None and 2 * lengths[slot] < self._num_usable(holder):
            slot = self._free[0]
        # An interrupt may come before `assign`, when the table of tokens has the new prompt already.
        self._sequences[slot] = None
        return slot, lengths[slot]

    def assign(self, sequence: RunningSequence) -> None:
        """Give a sequence the slot that was allocated for it. Its prompt must be in `tokens_SL` already."""
        self._free.remove(sequence.slot)
        self._sequences[sequence.slot] = sequence

    def find_longest_prefix(self, sequence: RunningSequence) -> tuple[int, int]:
        """Another slot with the longest prefix of the sequence's prompt, and its length in tokens; 0: there is none."""
        lengths = self._prefix_lengths(sequence.request)
        lengths[sequence.slot] = 0
        source = max(range(len(lengths)), key=lengths.__getitem__)
        return source, lengths[source]

    def can_share(self, sequence: RunningSequence) -> bool:
        """True if a prefix of the sequence's prompt may be copied from another slot."""
        return self._prefix_cache and sequence.params.prompt_logprobs is None

    def looks_up(self, request: Request) -> bool:
        """True if a prefix of the request's prompt is looked for in all slots."""
        # The log-probabilities of a prompt need the last hidden state of every position, which slots do not keep.
        is_long = len(request.prompt_ids) - 1 >= _MIN_PREFIX
        return self._prefix_cache and is_long and request.params.prompt_logprobs is None

    def may_copy(self, request: Request, holder: Request) -> bool:
        """True if `request` may use what was computed for the prompt of `holder`.

        Their salts must be equal: otherwise the time to the first token would tell a client what others sent. And if
        hidden states are recorded of `request`, those of `holder` must have been.
        """
        needs_states = self._has_observer and request.store
        return holder.cache_salt == request.cache_salt and (holder.store or not needs_states)

    def free(self, slot: int) -> None:
        """Return a slot whose request has ended."""
        self._free.append(slot)

    def _prefix_lengths(self, request: Request) -> list[int]:
        """Tokens of the prompt that each slot holds and that can be used; the last token is always left to decoding."""
        if not self.looks_up(request):
            return [0] * len(self._sequences)
        wanted = len(request.prompt_ids) - 1
        prompt_N = torch.tensor(request.prompt_ids[:wanted], device=self._tokens_SL.device)
        equal_SN = self._tokens_SL[:, :wanted] == prompt_N
        matches = equal_SN.long().cumprod(1).sum(1).tolist()
        lengths = []
        for sequence, match in zip(self._sequences, matches, strict=True):
            length = 0
            if sequence is not None and self.may_copy(request, sequence.request):
                length = min(match, self._num_usable(sequence))
            lengths.append(length if length >= _MIN_PREFIX else 0)
        return lengths

    def _num_usable(self, sequence: RunningSequence) -> int:
        """Tokens of a slot that a prompt with the same tokens can use."""
        return sequence.prefilled if self._has_prompt_arithmetic else sequence.num_cached_tokens
