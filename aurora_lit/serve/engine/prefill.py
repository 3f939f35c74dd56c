"""Reading prompts: a chunk a round, the oldest prompt first, what another slot holds of it copied instead of computed.

A prompt's last token is left to the first decoding pass, which then is like any other. What is left out: who holds
what (serve/sequences/slot_allocator.py), passes (serve/engine/target_runner.py).

Shapes: T positions of a chunk, H hidden, S slots, L capacity.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.verification import token_logprobs
from aurora_lit.serve.engine.target_runner import TargetRunner
from aurora_lit.serve.sequences.sequence import EngineStats, RunningSequence
from aurora_lit.serve.sequences.slot_allocator import SlotAllocator

_COST_MEMORY = 0.9
_LEAST_SHARE = 4
"""A chunk beside rows that decode is at least this part of a whole one."""


class Prefill:
    """The rows whose prompts are being read."""

    def __init__(
        self,
        target: Target,
        passes: TargetRunner,
        slots: SlotAllocator,
        *,
        tokens_SL: torch.Tensor,
        chunk_tokens: int,
        adaptive: bool,
        stats: EngineStats,
    ) -> None:
        """`chunk_tokens`: most that one round reads. `adaptive` false: a quarter of it while others decode."""
        self.rows: deque[RunningSequence] = deque()
        self._target, self._passes, self._slots, self._stats = target, passes, slots, stats
        self._tokens_SL = tokens_SL
        self._chunk_tokens, self._adaptive = chunk_tokens, adaptive
        self._token_s = 0.0

    def run(self, *, num_decoding: int, round_s: float) -> list[RunningSequence]:
        """Read the next chunk; the rows whose prompts are read now. `round_s`: what a round of the others takes."""
        budget, done = self._budget(num_decoding, round_s), []
        while self.rows and budget > 0:
            row = self.rows[0]
            self._copy_beginning(row)
            start, end = row.prefilled, min(row.prefilled + budget, row.prompt_length - 1)
            if end > start:
                self._read(row, start, end)
                budget -= end - start
            if row.prefilled == row.prompt_length - 1:
                done.append(self.rows.popleft())
        return done

    def _budget(self, num_decoding: int, round_s: float) -> int:
        """Tokens to read: all that a chunk allows when nobody waits for it, else as much time as the readers' share.

        A request that reads and one that decodes count alike. A fixed short chunk would leave slots empty where answers
        are short and prompts are not.
        """
        if not num_decoding:
            return self._chunk_tokens
        least = max(1, self._chunk_tokens // _LEAST_SHARE)
        if not self._adaptive or not self._token_s:
            return least
        share_s = round_s * len(self.rows) / num_decoding
        return int(min(max(share_s / self._token_s, least), self._chunk_tokens))

    def _copy_beginning(self, row: RunningSequence) -> None:
        """Once a row, when its turn comes: by then those who came just before have read what it shares with them."""
        if row.looked_for_beginning:
            return
        row.looked_for_beginning = True
        source, length = self._slots.longest(row)
        if length > row.prefilled:
            self._passes.copy_beginning(source, row.slot, length)
            self._stats.cached_tokens += length - row.prefilled
            row.prefilled = length

    def _read(self, row: RunningSequence, start: int, end: int) -> None:
        started = time.perf_counter()
        computed = self._passes.run([row], self._tokens_SL[row.slot, start:end][None], start=start)
        self._passes.keep([row], computed)
        token_s = (time.perf_counter() - started) / (end - start)
        if end - start >= self._chunk_tokens // _LEAST_SHARE:  # a few tokens cost as much as many
            old = self._token_s or token_s
            self._token_s = old + (1 - _COST_MEMORY) * (min(token_s, 2 * old) - old)
        if row.params.prompt_logprobs is not None:
            self._note_prompt(row, computed.last_NH, start)
        row.prefilled = end

    def _note_prompt(self, row: RunningSequence, last_TH: torch.Tensor, start: int) -> None:
        ids = row.request.prompt_ids[start + 1 : start + 1 + len(last_TH)]
        for at in range(0, len(ids), 32):
            logits_TV = self._target.logits(last_TH[at : at + 32])
            row.prompt_logprobs += token_logprobs(
                logits_TV, token_ids=list(ids[at : at + 32]), num_top=row.params.prompt_logprobs or 0
            )
