"""Finds the copies that a round may propose: which sequences are looked up, and how probable a copy must be.

A sequence of which many look-ups found nothing is looked up in few rounds, and a copy that would not repay its columns
is left out.

Left out: what is looked through (serve/speculation/traffic_memory.py), how many of the tokens found are proposed
(serve/speculation/copy_planner.py), and how reliable copies are (kernels/copy_rates.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import Copies, LookUp
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.candidate_tree import chain_of
from aurora_lit.serve.speculation.copy_planner import LEAST_SURVIVAL
from aurora_lit.serve.speculation.planner import SpeculationPlanner
from aurora_lit.serve.speculation.traffic_memory import TrafficMemory, look_up_copies

MAX_PADDED_COPIES = 4
"""Most copied tokens where all sequences of a round compute the longest query length."""
_WORTH_LOOKING_UP = 0.5
"""Share of a column's price in tokens that a copy must promise to be looked up."""
_FRUITLESS = ((16, 16), (8, 8), (4, 4), (2, 2))
"""After so many look-ups of a sequence that found nothing, it is looked up only every so many rounds: a look-up takes
3 % of a small round, and copies go on for several tokens, so that little is lost by finding them later. Sequences are
looked up in the same rounds, since a look-up for several costs little more than for one."""
_PRICED_EVERY = 16
"""Rounds for which a column's price holds."""


class CopyFinder:
    """Looks copies up for the sequences of a round.

    >>> found = finder.find(sequences, [0, 2])    # of these two; 0 is not in it if it has none
    """

    def __init__(
        self,
        planner: SpeculationPlanner,
        reliability: CopyReliability,
        *,
        tokens_SL: torch.Tensor,
        memory: TrafficMemory | None,
        looks_up: bool,
    ) -> None:
        """`tokens_SL`: the engine's table of committed tokens. `memory` None: copies come from within requests alone.

        `looks_up` False: none come from there. `planner`: its costs and limits are read.
        """
        self._planner = planner
        self._reliability = reliability
        self._tokens_SL, self._memory, self._looks_up = tokens_SL, memory, looks_up
        self._num_rounds = 0
        """That looked for copies, or might have."""
        self._least: dict[int, float] = {}
        """Survival below which copies are not looked up, by batch size."""

    def find(
        self, sequences: Sequence[RunningSequence], candidates: Sequence[int], *, is_trial: bool = False
    ) -> dict[int, Copies]:
        """The likeliest copies, by index of the sequence, where there are any. `is_trial`: even if they do not pay."""
        longest = self._planner.limits.copied_tokens
        if not longest:
            return {}
        self._num_rounds += 1
        is_ragged = self._planner.costs.ragged
        if not is_ragged:
            longest = min(longest, MAX_PADDED_COPIES)
        candidates = [i for i in candidates if sequences[i].num_remaining > 1 and self._is_due(sequences[i])]
        if not candidates:
            return {}
        asking = [sequences[i] for i in candidates]
        rows = LookUp(
            slots=[sequence.slot for sequence in asking],
            lengths=[sequence.length for sequence in asking],
            most=[min(longest, sequence.num_remaining - 1) for sequence in asking],
            parts=[sequence.memory_part for sequence in asking],
            tables=[self._reliability.table(sampled=sequence.temperature > 0) for sequence in asking],
            rate_RC=self._reliability.rate_RC,
            least=LEAST_SURVIVAL if is_trial else self._least_survival(len(sequences)),
            own=self._looks_up,
        )
        found = look_up_copies(self._tokens_SL, rows, memory=self._memory)
        for sequence, copies in zip(asking, found, strict=True):
            sequence.fruitless_look_ups = 0 if copies.tokens else sequence.fruitless_look_ups + 1
        if not is_ragged:
            found = [chain_of(copies) for copies in found]
        return {i: copies for i, copies in zip(candidates, found, strict=True) if copies.tokens}

    def _is_due(self, sequence: RunningSequence) -> bool:
        """False: so many look-ups found nothing that this one is left out."""
        if not self._planner.limits.adaptive:
            return True
        every = next((every for least, every in _FRUITLESS if sequence.fruitless_look_ups >= least), 1)
        return self._num_rounds % every == 0

    def _least_survival(self, batch_size: int) -> float:
        """Copies that are less probable than this are not looked up: they would not repay much of their columns."""
        if not self._planner.limits.adaptive:
            return LEAST_SURVIVAL
        if batch_size not in self._least or self._num_rounds % _PRICED_EVERY == 0:
            costs = self._planner.costs
            plain_s = costs.round_s(batch_size, [])
            column_tokens = batch_size * costs.column_s(batch_size, 0) / plain_s if plain_s else 0.0
            self._least[batch_size] = max(LEAST_SURVIVAL, _WORTH_LOOKING_UP * column_tokens)
        return self._least[batch_size]
