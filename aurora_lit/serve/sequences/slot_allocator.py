"""Which slots are free, and what each slot still holds: so that a prompt's beginning need not be computed twice.

A slot that was given back keeps its keys, values and states until another request takes it. What is left out: copying
from slot to slot (serve/engine/target_runner.py), and when a prompt looks for its beginning (serve/engine/prefill.py).

Shapes: S slots, L capacity, N tokens of a prompt.
"""

from __future__ import annotations

import torch

from aurora_lit.request import Request
from aurora_lit.serve.sequences.sequence import RunningSequence

_SHORTEST = 16
"""Tokens below which a shared beginning is not worth a look."""


class SlotAllocator:
    """Free slots, and the last request of each.

    >>> slot, shared = table.take(request)          # the first `shared` tokens need not be computed
    >>> table.seat(row)
    >>> source, shared = table.longest(row)    # again when its turn comes: others have been read by then
    >>> table.give_back(row.slot)
    """

    def __init__(self, tokens_SL: torch.Tensor, *, share: bool, tracing: bool) -> None:
        """`share` false: every prompt is computed. `tracing`: states are kept of the requests that may be stored."""
        self._tokens_SL = tokens_SL
        self._share, self._tracing = share, tracing
        self._free = list(range(len(tokens_SL)))  # the one unused for longest comes first
        self._rows: list[RunningSequence | None] = [None] * len(tokens_SL)

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self, request: Request) -> tuple[int, int]:
        """A free slot and how much of the prompt it holds: the one that holds most, else that unused for longest."""
        lengths = self._shared(request)
        slot = max(self._free, key=lengths.__getitem__)  # the first of equal ones
        self._free.remove(slot)
        return slot, lengths[slot]

    def seat(self, row: RunningSequence) -> None:
        """The row has its slot, and its prompt is in the table of tokens."""
        self._rows[row.slot] = row

    def longest(self, row: RunningSequence) -> tuple[int, int]:
        """Another slot that holds the longest beginning of a row's prompt, and its length; 0: none does."""
        lengths = self._shared(row.request)
        lengths[row.slot] = 0
        source = max(range(len(lengths)), key=lengths.__getitem__)
        return source, lengths[source]

    def give_back(self, slot: int) -> None:
        """The slot's request has ended."""
        self._free.append(slot)

    def _shared(self, request: Request) -> list[int]:
        """Tokens of each slot that the target need not run again for this request; the last is left to decoding."""
        wanted = len(request.prompt_ids) - 1
        # Whoever wants the prompt's log-probabilities needs every position's last state.
        if not self._share or wanted < _SHORTEST or request.params.prompt_logprobs is not None:
            return [0] * len(self._rows)
        prompt_N = torch.tensor(request.prompt_ids[:wanted], device=self._tokens_SL.device)
        equal_SN = self._tokens_SL[:, :wanted] == prompt_N
        alike = equal_SN.long().cumprod(1).sum(1).tolist()
        with_states = self._tracing and request.store
        lengths = []
        for row, length in zip(self._rows, alike, strict=True):
            usable = row is not None and (row.request.store or not with_states)
            length = min(length, row.num_held) if row is not None and usable else 0
            lengths.append(length if length >= _SHORTEST else 0)
        return lengths
