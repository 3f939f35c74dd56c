"""Which prompt tokens a round computes beside the sequences that decode, within a set time.

The prompt with the fewest unread tokens comes first, so that an editor's completion does not wait for an agent's long
prompts. After three rounds that began with others the oldest prompt comes first. So of any four rounds with prompt
tokens one begins with the oldest, whatever else arrives: it is read to its end, and then the next one is the oldest.

While nobody decodes, a round computes as many prompt tokens as take MAX_ALONE_S, `PREFILL_CHUNK_TOKENS` at most: a new
prompt waits no longer than that for its turn. Beside sequences that decode, prompt tokens share their pass, as many as
keep the round below MAX_ROUND_S, or below 2.25 times what it takes without them if that is longer: these sequences wait
no longer than that for their next token.

A prefix that another slot or the store has is copied instead. It is searched for when a prompt arrives, when another
has been read, and when a prompt comes first after another: that one may have the same beginning.

The last token of a prompt is left to the first decoding pass, so that no second code path chooses a token. Left out:
where a prefix is (serve/engine/slot_allocator.py), copying it (serve/engine/prefix_cache.py), and forward passes
(serve/engine/target_runner.py).

Shapes: T positions of a chunk, H hidden, S slots, L capacity of a slot, V vocabulary.
"""

from __future__ import annotations

from collections import deque

import torch

from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.models.interface import Target
from aurora_lit.modules.sampling.distribution import token_logprobs
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.serve.engine.prefix_cache import PrefixCache
from aurora_lit.serve.engine.round_plan import PromptRow
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.engine.slot_allocator import SlotAllocator
from aurora_lit.serve.engine.target_runner import Columns, TargetRunner

PREFILL_CHUNK_TOKENS = 256
"""Most prompt tokens that are computed in one round."""
MAX_ALONE_S = 0.1
"""Longest round while no sequence decodes, in seconds, if it has more than _LEAST_ALONE tokens; or `max_round_s`, if
that is longer."""
_LEAST_ALONE = 64
"""Prompt tokens of such a round at least; with fewer, reading the weights is what takes the time."""
MAX_ROUND_S = 0.020
"""Longest round beside sequences that decode, in seconds. With a shorter one running answers pause for less, and new
requests wait longer for their first token. The draft catches up with a prompt by as much as fits into it."""
_DECAY = 0.8
"""Weight of the old time per token when a chunk measures a new one."""
_LEAST_TOKENS = 16
"""Prompt tokens of a round at least, however long it takes without them; they fill a matrix tile."""
_LEAST_SHARE = 1.25
"""Time for prompt tokens, at least, as a share of what the round takes without them: where that alone is near
MAX_ROUND_S, prompts would be read so slowly that slots wait instead of decoding."""
_LEFT_OUT_EVERY = 64
"""Rounds that carry prompts beside sequences that decode, after which one leaves them out: only such a round tells what
these sequences take, which decides how many prompt tokens are computed beside them."""
_MOST_ROUNDS_WITHOUT_OLDEST = 3
"""Rounds in a row with prompt tokens that may begin with other prompts than the oldest."""
_WORTH_WAITING = 32
"""Prompt tokens that can be copied a round later, for which a sequence lets others go first."""
_LOGPROB_CHUNK = 32
"""Positions whose logits are held at the same time."""


class Prefill:
    """The sequences whose prompts are being computed.

    >>> rows = prefill.plan(num_decoding=3, round_s=0.012)      # before a round
    >>> prefill.observe(rows, seconds=0.004)                    # what they added to it
    >>> decoding += prefill.complete(rows, columns, first=3)    # those whose prompts are computed
    """

    def __init__(
        self,
        target: Target,
        runner: TargetRunner,
        allocator: SlotAllocator,
        *,
        prefix_cache: PrefixCache | None,
        chunk_tokens: int,
        max_round_s: float,
        counters: EngineCounters,
    ) -> None:
        """`chunk_tokens`: most tokens of a round; `max_round_s`: longest round while other sequences decode."""
        self.sequences: deque[RunningSequence] = deque()
        self._target, self._runner, self._allocator, self._counters = target, runner, allocator, counters
        self._prefix_cache = prefix_cache
        self._chunk_tokens, self._max_round_s = chunk_tokens, max_round_s
        self.has_copied = False
        """True if the last plan copied a prefix."""
        self._token_s: float | None = None
        """Running mean of the time per prompt token; None before the first chunk."""
        self._rounds_beside = 0
        """That carried prompts beside sequences that decode, since one did not."""
        self._rounds_without_oldest = 0
        """With prompt tokens, in a row, that began with another prompt."""
        self._first: RunningSequence | None = None
        """Whose prompt came first in the last round with prompt tokens."""

    def plan(self, *, num_decoding: int, round_s: float, updates_costs: bool = True) -> list[PromptRow]:
        """The prompt chunks of the next round. `round_s`: what it takes for the `num_decoding` other sequences.

        updates_costs: what it takes is learned, if it carries no prompt.
        """
        self.has_copied = False
        leaves_out = updates_costs and num_decoding > 0 and self._rounds_beside >= _LEFT_OUT_EVERY
        budget = 0 if leaves_out else self._budget(num_decoding, round_s)
        rows: list[PromptRow] = []
        for sequence in self._order() if budget and self.sequences else []:
            if budget <= 0:
                break
            if self._shares_with(sequence, rows):
                continue
            start, end = sequence.prefilled, min(sequence.prefilled + budget, sequence.prompt_length - 1)
            if end > start:
                tokens = list(sequence.request.prompt_ids[start:end])
                rows.append(PromptRow(sequence, start, tokens))
                budget -= len(tokens)
        if num_decoding:
            self._rounds_beside = self._rounds_beside + 1 if rows else 0
        return rows

    def take_ready(self) -> list[RunningSequence]:
        """The sequences whose prompts are computed but for the last token; they decode from now on."""
        ready = [sequence for sequence in self.sequences if sequence.prefilled == sequence.prompt_length - 1]
        for sequence in ready:
            self.sequences.remove(sequence)
        if ready:
            for sequence in self.sequences:
                sequence.searched_for_prefix = False
        return ready

    def complete(self, rows: list[PromptRow], columns: Columns, *, first: int) -> None:
        """Store what the rows computed; `first`: index of the first of them in the pass."""
        for index, row in enumerate(rows, start=first):
            self._runner.store_prompt(row, columns, index)
            if row.sequence.params.prompt_logprobs is not None:
                self._add_prompt_logprobs(row.sequence, columns.last(index), row.start)
            row.sequence.prefilled = row.start + len(row.tokens)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Update by the time that some prompt tokens added to a round."""
        if num_tokens < _LEAST_TOKENS:  # such a chunk's time is not per token
            return
        token_s = max(0.0, seconds) / num_tokens
        old = self._token_s or token_s
        self._token_s = old + (1 - _DECAY) * (min(token_s, 2 * old) - old)

    def _budget(self, num_decoding: int, round_s: float) -> int:
        """Prompt tokens of this round."""
        if not num_decoding:
            alone_s = max(MAX_ALONE_S, self._max_round_s)
            fitting = int(alone_s / self._token_s) if self._token_s else self._chunk_tokens
            return min(max(fitting, _LEAST_ALONE), self._chunk_tokens)
        if self._token_s is None:
            return min(_LEAST_TOKENS, self._chunk_tokens)
        room_s = max(self._max_round_s - round_s, _LEAST_SHARE * round_s)
        fitting = int(room_s / self._token_s) if self._token_s else self._chunk_tokens
        return min(max(fitting, _LEAST_TOKENS), self._chunk_tokens)

    def _order(self) -> list[RunningSequence]:
        """Whose prompts are read next, at least one's; what can be copied of them has been copied."""
        for sequence in self.sequences:
            self._copy_prefix(sequence)
        order = sorted(self.sequences, key=lambda sequence: sequence.prompt_length - sequence.prefilled)
        oldest = self.sequences[0]
        if self._rounds_without_oldest >= _MOST_ROUNDS_WITHOUT_OLDEST:
            order.sort(key=lambda sequence: sequence is not oldest)
        self._rounds_without_oldest = 0 if order[0] is oldest else self._rounds_without_oldest + 1
        if order[0] is not self._first:
            self._first = order[0]
            self._first.searched_for_prefix = False
            self._copy_prefix(self._first)
        return order

    def _shares_with(self, sequence: RunningSequence, rows: list[PromptRow]) -> bool:
        """True if this round computes much of the sequence's prompt for others: the next round can copy it."""
        request = sequence.request
        if not rows or not self._allocator.looks_up(request):
            return False
        others = [row.sequence.request for row in rows if self._allocator.may_copy(request, row.sequence.request)]
        shared = max((common_prefix_length(request.prompt_ids, other.prompt_ids) for other in others), default=0)
        return shared >= sequence.prefilled + _WORTH_WAITING

    def _copy_prefix(self, sequence: RunningSequence) -> None:
        """Copy the longest prefix of the prompt that is elsewhere, unless it was searched for already."""
        if sequence.searched_for_prefix or self._prefix_cache is None:
            return
        sequence.searched_for_prefix = True
        prefix = self._allocator.find_longest_prefix(sequence)
        if prefix.length > sequence.prefilled:
            self._prefix_cache.copy(prefix, slot=sequence.slot, start=sequence.prefilled)
            self.has_copied = True
            num_copied = prefix.length - sequence.prefilled
            self._counters.cached_tokens += num_copied
            sequence.num_reused += num_copied
            sequence.prefilled = prefix.length

    def _add_prompt_logprobs(self, sequence: RunningSequence, last_TH: torch.Tensor, start: int) -> None:
        """Append the log-probabilities of the tokens that follow positions start, start + 1, …"""
        ids = sequence.request.prompt_ids[start + 1 : start + 1 + len(last_TH)]
        for at in range(0, len(ids), _LOGPROB_CHUNK):
            logits_TV = self._target.logits(last_TH[at : at + _LOGPROB_CHUNK])
            sequence.prompt_logprobs += token_logprobs(
                logits_TV,
                token_ids=list(ids[at : at + _LOGPROB_CHUNK]),
                num_top=sequence.params.prompt_logprobs or 0,
            )
