"""How large slots are, which are free, and where a prefix of a new prompt is, which need not be computed again.

A freed slot keeps its keys, values and hidden states until another request gets it; then the store keeps them. Left
out: the store, and copying (serve/engine/prefix_cache.py); when a prompt searches for its prefix
(serve/engine/prefill.py).

Shapes: S slots, L capacity of a slot, N tokens of a prompt.
"""

from __future__ import annotations

import torch

from aurora_lit.config import copied_tokens
from aurora_lit.kernels.native import KEY_BLOCK
from aurora_lit.request import Request, SharedBy
from aurora_lit.serve.engine.prefix_cache import Prefix, PrefixCache
from aurora_lit.serve.engine.round_plan import SIBLING_TOKENS, weighed_tokens
from aurora_lit.serve.engine.sequence import RunningSequence
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
    >>> prefix = allocator.find_longest_prefix(sequence)            # again before its prefill starts
    >>> allocator.free(sequence.slot)
    """

    def __init__(
        self,
        tokens_SL: torch.Tensor,
        *,
        prefix_cache: PrefixCache | None,
        shared_by: SharedBy,
        has_prompt_arithmetic: bool,
    ) -> None:
        """`prefix_cache` None: every prompt is computed in full. `shared_by`: whose requests may use a prefix.

        `has_prompt_arithmetic`: only positions that were computed as a prompt's are used for other prompts, since those
        of generated tokens are rounded differently (`Target.has_prompt_arithmetic`). A conversation's answers are
        therefore computed again when they come back in the next prompt.
        """
        self._tokens_SL = tokens_SL
        self._prefix_cache, self._shared_by = prefix_cache, shared_by
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
        is read: conversations that share only a system prompt would evict each other while other slots are empty. What
        the slot holds of another prompt goes into the store.
        """
        lengths = self._prefix_lengths(request)
        slot = max(self._free, key=lengths.__getitem__)  # max takes the first of equal ones
        holder = self._sequences[slot]
        if holder is not None and 2 * lengths[slot] < self._num_usable(holder):
            slot = self._free[0]
        self._keep(slot, but=lengths[slot])
        # An interrupt may come before `assign`, when the table of tokens has the new prompt already.
        self._sequences[slot] = None
        return slot, lengths[slot]

    def assign(self, sequence: RunningSequence) -> None:
        """Give a sequence the slot that was allocated for it. Its prompt must be in `tokens_SL` already."""
        self._free.remove(sequence.slot)
        self._sequences[sequence.slot] = sequence

    def find_longest_prefix(self, sequence: RunningSequence) -> Prefix:
        """The longest prefix of the sequence's prompt that another slot or the store has."""
        request = sequence.request
        lengths = self._prefix_lengths(request)
        lengths[sequence.slot] = 0
        slot = max(range(len(lengths)), key=lengths.__getitem__)
        scope = request.scope(self._shared_by)
        if self._prefix_cache is not None and scope is not None and self.looks_up(request):
            places = self._prefix_cache.find(scope, request.prompt_ids[:-1])
            if len(places) * KEY_BLOCK > lengths[slot]:
                return Prefix(len(places) * KEY_BLOCK, places=places)
        return Prefix(lengths[slot], slot)

    def looks_up(self, request: Request) -> bool:
        """True if a prefix of the request's prompt is looked for."""
        # The log-probabilities of a prompt need the last hidden state of every position, which are not kept.
        is_long = len(request.prompt_ids) - 1 >= _MIN_PREFIX
        return self._prefix_cache is not None and is_long and request.params.prompt_logprobs is None

    def may_copy(self, request: Request, holder: Request) -> bool:
        """True if `request` may use what was computed for the prompt of `holder`.

        Otherwise the time to the first token would tell a client what others sent.
        """
        if request.call and request.call == holder.call:
            return True
        scope = request.scope(self._shared_by)
        return holder.store and scope is not None and scope == holder.scope(self._shared_by)

    def free(self, slot: int) -> None:
        """Return a slot whose request has ended."""
        self._free.append(slot)

    def _keep(self, slot: int, *, but: int) -> None:
        """Keep what a slot has of a prompt, unless no block of it is lost; its first `but` tokens stay in the slot."""
        holder = self._sequences[slot]
        if holder is None or self._prefix_cache is None or not holder.request.store:
            return
        scope, usable = holder.request.scope(self._shared_by), self._num_usable(holder)
        if scope is not None and usable // KEY_BLOCK > but // KEY_BLOCK:
            self._prefix_cache.keep(scope, self._tokens_SL[slot, :usable].tolist(), slot=slot)

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
