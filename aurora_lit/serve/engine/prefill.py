"""Prefill of the target: a chunk of prompt tokens per round, oldest request first; held prefixes are copied instead.

The last token of a prompt is left to the first decoding pass, so that no second code path samples a token. Left out:
which slot holds what (serve/sequences/slot_allocator.py), and forward passes (serve/engine/target_runner.py).

Shapes: T positions of a chunk, H hidden, S slots, L capacity of a slot, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.distribution import token_logprobs
from aurora_lit.serve.engine.target_runner import TargetRunner
from aurora_lit.serve.sequences.sequence import EngineStats, RunningSequence
from aurora_lit.serve.sequences.slot_allocator import SlotAllocator

_DECAY = 0.9
"""Weight of the old time per token when a chunk measures a new one."""
_MIN_CHUNK_DIVISOR = 4
"""Beside decoding sequences, a chunk is at least this fraction of a whole one."""
_LOGPROB_CHUNK = 32
"""Positions whose logits are held at the same time."""


class Prefill:
    """The sequences whose prompts are being computed."""

    def __init__(
        self,
        target: Target,
        runner: TargetRunner,
        allocator: SlotAllocator,
        *,
        tokens_SL: torch.Tensor,
        chunk_tokens: int,
        adaptive: bool,
        stats: EngineStats,
    ) -> None:
        """`chunk_tokens`: most tokens per round. `adaptive` False: a quarter of it while other sequences decode."""
        self.sequences: deque[RunningSequence] = deque()
        self._target, self._runner, self._allocator, self._stats = target, runner, allocator, stats
        self._tokens_SL = tokens_SL
        self._chunk_tokens, self._adaptive = chunk_tokens, adaptive
        self._token_s = 0.0
        """Running mean of the time per prompt token; 0 before the first chunk."""

    def run(self, *, num_decoding: int, round_s: float) -> list[RunningSequence]:
        """Compute the next chunk. Returns the sequences that decode from now on.

        `round_s`: seconds that a round of the `num_decoding` decoding sequences takes.
        """
        budget, done = self._chunk_budget(num_decoding, round_s), []
        while self.sequences and budget > 0:
            sequence = self.sequences[0]
            self._copy_prefix(sequence)
            start, end = sequence.prefilled, min(sequence.prefilled + budget, sequence.prompt_length - 1)
            if end > start:
                self._compute(sequence, start, end)
                budget -= end - start
            if sequence.prefilled == sequence.prompt_length - 1:
                done.append(self.sequences.popleft())
        return done

    def _chunk_budget(self, num_decoding: int, round_s: float) -> int:
        """Tokens of this round's chunk.

        A whole chunk if no sequence decodes. Else as many as take the prefilling sequences' share of time, where a
        prefilling and a decoding sequence count the same. A fixed short chunk would leave slots empty where outputs are
        short and prompts are long.
        """
        if not num_decoding:
            return self._chunk_tokens
        least = max(1, self._chunk_tokens // _MIN_CHUNK_DIVISOR)
        if not self._adaptive or not self._token_s:
            return least
        share_s = round_s * len(self.sequences) / num_decoding
        return int(min(max(share_s / self._token_s, least), self._chunk_tokens))

    def _copy_prefix(self, sequence: RunningSequence) -> None:
        """Copy the longest prefix of the prompt that another slot holds; only once, when the sequence is first in line.

        By then, the requests just before it have computed the prefix that they share with it.
        """
        if sequence.searched_for_prefix:
            return
        sequence.searched_for_prefix = True
        source, length = self._allocator.find_longest_prefix(sequence)
        if length > sequence.prefilled:
            self._runner.copy_prefix(source, sequence.slot, length)
            self._stats.cached_tokens += length - sequence.prefilled
            sequence.prefilled = length

    def _compute(self, sequence: RunningSequence, start: int, end: int) -> None:
        """Run the target over prompt positions `start` to `end`, and note the time per token."""
        started = time.perf_counter()
        ids_1T = self._tokens_SL[sequence.slot, start:end][None]
        forward_output = self._runner.forward([sequence], ids_1T, start=start, num_prompts=1)
        self._runner.store([sequence], forward_output)
        token_s = (time.perf_counter() - started) / (end - start)
        if end - start >= self._chunk_tokens // _MIN_CHUNK_DIVISOR:  # the time of a small chunk is not per token
            old = self._token_s or token_s
            self._token_s = old + (1 - _DECAY) * (min(token_s, 2 * old) - old)
        if sequence.params.prompt_logprobs is not None:
            self._add_prompt_logprobs(sequence, forward_output.last_NH, start)
        sequence.prefilled = end

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
