"""Copies: what followed a sequence's last tokens before, in itself, in its prediction and in the traffic memory.

An answer that repeats a text with small differences is found again after each of them: likeliest is what follows its
place in that text, its prediction or else its prompt (csrc/suffix_index.hpp).

A sequence of which many look-ups found nothing is looked up in few rounds. Needs kernels: searching in Python would
take longer than it saves.

Left out: what the memory holds (memory.py), how many of the tokens found are proposed (serve/speculation/weigh.py), and
how probable copies are at first (kernels/copy_rates.py).

Shapes: S slots, L capacity of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aurora_lit.kernels import native, suffix_index
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import Copies, LookUp, is_remembered
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.memory import TrafficMemory

_FRUITLESS = ((16, 16), (8, 8), (4, 4), (2, 2))
"""After so many look-ups of a sequence that found nothing, it is looked up only every so many rounds: a look-up takes
3 % of a small round, and copies go on for several tokens, so that little is lost by finding them later. Sequences are
looked up in the same rounds, since a look-up for several costs little more than for one."""


MAX_PADDED_COPIES = 4
"""Most copied tokens where all sequences of a round compute the longest query length."""


class NgramSource:
    """Looks copies up for the sequences of a round.

    >>> found = source.candidates(sequences, [0, 2], most=15, least=0.1)    # of these two; without those that have none
    >>> source.observe(proposal, path=[0, 1])                               # after the round
    """

    def __init__(self, *, tokens_SL: torch.Tensor, memory: TrafficMemory | None, looks_up: bool) -> None:
        """`tokens_SL`: the engine's table of committed tokens. `memory` None: copies come from within requests alone.

        `looks_up` False: none come from there.
        """
        self.reliability = CopyReliability()
        self._tokens_SL, self._memory, self._looks_up = tokens_SL, memory, looks_up
        self._num_rounds = 0
        """That looked for copies, or might have."""

    def candidates(
        self,
        sequences: Sequence[RunningSequence],
        asked: Sequence[int],
        *,
        most: int,
        least: float,
        branches: bool = True,
        in_every_round: bool = False,
    ) -> dict[int, Copies]:
        """The likeliest copies, by index of the sequence, where there are any.

        `most` of a sequence, of which each is at least `least` probable. `branches` False: only the most probable path,
        for targets that compute no trees. `in_every_round`: for sequences too that often have none.
        """
        self._num_rounds += 1
        asked = [i for i in asked if in_every_round or self._is_due(sequences[i])]
        if not (asked and most):
            return {}
        asking = [sequences[i] for i in asked]
        rows = LookUp(
            slots=[sequence.slot for sequence in asking],
            lengths=[sequence.length for sequence in asking],
            most=[min(most, sequence.num_remaining - 1) for sequence in asking],
            parts=[sequence.memory_part for sequence in asking],
            tables=[self.reliability.table(sampled=sequence.temperature > 0) for sequence in asking],
            rate_RC=self.reliability.rate_RC,
            least=least,
            own=self._looks_up,
            texts=[sequence.prediction for sequence in asking],
            prompts=[sequence.prompt_length for sequence in asking],
            places=[sequence.place for sequence in asking],
        )
        found = self._look_up(rows)
        for sequence, copies in zip(asking, found, strict=True):
            sequence.fruitless_look_ups = 0 if copies.tokens else sequence.fruitless_look_ups + 1
        if not branches:
            found = [most_probable_path(copies) for copies in found]
        return {i: copies for i, copies in zip(asked, found, strict=True) if copies.tokens}

    def observe(self, proposal: Proposal, *, path: Sequence[int]) -> None:
        """Learn from a round's outcome; `path`: the accepted columns, column 0 first."""
        accepted = set(path)
        for node in proposal.copies:
            if node.parent in accepted:
                self.reliability.observe(node.table, node.cell, accepted=node.column in accepted)

    def _is_due(self, sequence: RunningSequence) -> bool:
        """False: so many look-ups found nothing that this one is left out."""
        every = next((every for least, every in _FRUITLESS if sequence.fruitless_look_ups >= least), 1)
        return self._num_rounds % every == 0

    def _look_up(self, rows: LookUp) -> list[Copies]:
        """For each sequence the likeliest copies from itself and, if it may read it, from the memory."""
        tokens_SL, memory = self._tokens_SL, self._memory
        if tokens_SL.device.type != "cpu":
            tokens_SL = tokens_SL[list(rows.slots), : max(rows.lengths)].cpu()
            rows = rows._replace(slots=range(len(rows.slots)))
        copies = suffix_index.look_up(tokens_SL, rows, memory=None if memory is None else memory.index)
        if memory is not None:
            for part, found in zip(rows.parts, copies, strict=True):
                if part:
                    memory.counters.memory_look_ups += 1
                    memory.counters.memory_hits += any(map(is_remembered, found.cells))
        return copies


def can_look_up() -> bool:
    """True if copies can be searched for: that needs kernels."""
    return native.library() is not None


def most_probable_path(copies: Copies) -> Copies:
    """A tree's, which is a chain."""
    kept, at = [], 0
    for column, parent in enumerate(copies.parents, start=1):
        if parent == at:
            kept.append(column - 1)
            at = column
    tokens, survivals, cells = ([values[i] for i in kept] for values in (copies.tokens, copies.survivals, copies.cells))
    return Copies(tokens, list(range(len(kept))), survivals, cells)  # type: ignore[arg-type]
