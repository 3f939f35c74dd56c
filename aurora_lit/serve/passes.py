"""Target passes over the engine's slots, and keeping what they computed: for the drafter, for whoever observes.

A pass over proposals that branch leaves its columns in the slots in their order; `keep` moves those of the accepted
path to where their tokens were committed, and tells of these alone. What is left out: which tokens (serve/engine.py)
and the pass itself (models/target.py).

Shapes: B rows, T positions or columns, A columns of the longest accepted path with its root, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aurora_lit.models.slots import KVSlots
from aurora_lit.models.target import Target
from aurora_lit.serve.drafting import Drafter
from aurora_lit.serve.observing import RoundObserver, tell_pass
from aurora_lit.serve.rows import Row


class Computed(NamedTuple):
    """What a pass computed, and where."""

    slots_B: torch.Tensor
    starts_B: torch.Tensor
    aux_BT3H: torch.Tensor
    last_BTH: torch.Tensor


class TargetPasses:
    """Runs the target for rows; one `run` is followed by one `keep`."""

    def __init__(
        self, target: Target, *, slots: KVSlots, drafter: Drafter | None, observer: RoundObserver | None
    ) -> None:
        self._target, self._slots, self._drafter, self._observer = target, slots, drafter, observer
        self._device = target.model.device

    def run(
        self,
        rows: Sequence[Row],
        ids_BT: torch.Tensor,
        *,
        start: int | None = None,
        parents_BT: torch.Tensor | None = None,
    ) -> Computed:
        """Run tokens behind `start` positions, or behind all but a row's last token; `parents_BT`: they branch."""
        slots_B = torch.tensor([row.slot for row in rows], device=self._device)
        starts_B = torch.tensor([row.length - 1 if start is None else start for row in rows], device=self._device)
        branches = {} if parents_BT is None else {"parents_BT": parents_BT}
        aux_BT3H, last_BTH = self._target.forward(
            ids_BT, slots=self._slots, slots_B=slots_B, starts_B=starts_B, **branches
        )
        return Computed(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH)

    def keep(self, rows: Sequence[Row], computed: Computed, *, column_BA: torch.Tensor | None = None) -> None:
        """Keep what was computed; of proposals that branched the accepted columns (modules/sampling.py: Verdict)."""
        slots_B, starts_B, aux_BT3H, last_BTH = computed
        if column_BA is not None:
            self._move(slots_B, starts_B, column_BA)
            index = (torch.arange(len(column_BA))[:, None], column_BA)
            aux_BT3H, last_BTH = aux_BT3H[index], last_BTH[index]
        if self._drafter:
            self._drafter.remember(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H)
        if self._observer:
            tell_pass(self._observer, rows, slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH)

    def copy_beginning(self, source: int, slot: int, length: int) -> None:
        """Let a slot begin with the first positions of another: the bits that computing them would give."""
        self._target.copy_beginning(slots=self._slots, source=source, slot=slot, length=length)
        if self._drafter:
            self._drafter.copy_beginning(source, slot, length)
        if self._observer:
            self._observer.on_copy(source=source, slot=slot, length=length)

    def _move(self, slots_B: torch.Tensor, starts_B: torch.Tensor, column_BA: torch.Tensor) -> None:
        moves = [
            (slot, start + column, start + place)
            for slot, start, columns in zip(slots_B.tolist(), starts_B.tolist(), column_BA.tolist(), strict=True)
            for place, column in enumerate(columns)
            if column > place
        ]
        if moves:
            slots_M, from_M, to_M = torch.tensor(moves).t().contiguous()
            self._target.keep_path(slots=self._slots, slots_M=slots_M, from_M=from_M, to_M=to_M)
