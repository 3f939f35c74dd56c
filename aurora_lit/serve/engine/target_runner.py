"""Target passes over the engine's slots, and keeping what they computed: for the drafter, for whoever observes.

A pass over proposals that branch leaves its columns in the slots in their order; `keep` moves those of the accepted
path to where their tokens were committed, and tells of these alone. What is left out: which tokens (serve/engine/engine.py)
and the pass itself (models/target.py).

Shapes: B rows, T positions or columns, N those that are run, A columns of the longest accepted path with its root, H
hidden, F auxiliary features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from aurora_lit.models.slots import KVSlots
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.verification import Proposals, Verdict
from aurora_lit.serve.sequences.observer import RoundObserver, notify_forward
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.drafter import Drafter


class ForwardOutput(NamedTuple):
    """What a pass computed, and where: of column t of row b at place_BT[b, t] of the N."""

    slots_B: torch.Tensor
    starts_B: torch.Tensor
    aux_NF: torch.Tensor
    last_NH: torch.Tensor
    place_BT: torch.Tensor
    """int64; columns beyond a row's width have its last one's place."""

    def of_columns(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Such states by row and column [B, T, D]."""
        if len(states_ND) == self.place_BT.numel():
            return states_ND.view(*self.place_BT.shape, -1)
        return states_ND[self.place_BT]


def widths_of(proposals: Proposals) -> list[int] | None:
    """Columns of each row, root included; None: all have as many."""
    widths = [count + 1 for count in proposals.num_B.tolist()]
    return None if min(widths) == proposals.token_BK.shape[1] + 1 else widths


class TargetRunner:
    """Runs the target for rows; one `run` is followed by one `keep`."""

    def __init__(
        self, target: Target, *, slots: KVSlots, drafter: Drafter | None, observer: RoundObserver | None
    ) -> None:
        self._target, self._slots, self._drafter, self._observer = target, slots, drafter, observer
        self._device = target.model.device

    def run(
        self,
        rows: Sequence[RunningSequence],
        ids_BT: torch.Tensor,
        *,
        start: int | None = None,
        parents_BT: torch.Tensor | None = None,
        widths: Sequence[int] | None = None,
    ) -> ForwardOutput:
        """Run tokens behind `start` positions, or behind all but a row's last token; `parents_BT`: they branch.

        `widths`, for a target that can branch: of each row only so many columns are run.
        """
        slots_B = torch.tensor([row.slot for row in rows], device=self._device)
        starts_B = torch.tensor([row.length - 1 if start is None else start for row in rows], device=self._device)
        where: dict[str, Any] = {"slots": self._slots, "slots_B": slots_B, "starts_B": starts_B}
        if parents_BT is not None:
            where["parents_BT"] = parents_BT
        place_BT = torch.arange(ids_BT.numel(), device=self._device).view(ids_BT.shape)
        if widths is None:
            aux_BT3H, last_BTH = self._target.forward(ids_BT, **where)
            return ForwardOutput(slots_B, starts_B, aux_BT3H.flatten(0, 1), last_BTH.flatten(0, 1), place_BT)
        width_B = torch.tensor(widths)
        column_T = torch.arange(ids_BT.shape[1])
        ids_N = ids_BT[column_T < width_B[:, None]]
        aux_NF, last_NH = self._target.forward_ragged(ids_N, widths=widths, **where)
        place_BT = (width_B.cumsum(0) - width_B)[:, None] + column_T.minimum(width_B[:, None] - 1)
        return ForwardOutput(slots_B, starts_B, aux_NF, last_NH, place_BT)

    def keep(self, rows: Sequence[RunningSequence], computed: ForwardOutput, verdict: Verdict | None = None) -> None:
        """Keep what was computed; of proposals that branched, or of rows of different widths, what was accepted."""
        slots_B, starts_B = computed.slots_B, computed.starts_B
        column_BA = None if verdict is None else verdict.column_BA
        if verdict is not None and column_BA is None and len(computed.last_NH) < computed.place_BT.numel():
            longest = int(verdict.accepted_B.max()) + 1
            column_BA = torch.arange(longest, device=self._device).expand(len(rows), -1)
        if column_BA is not None:
            self._move(slots_B, starts_B, column_BA)
            place_BA = computed.place_BT.gather(1, column_BA)
            aux_BT3H, last_BTH = computed.aux_NF[place_BA], computed.last_NH[place_BA]
        else:
            aux_BT3H, last_BTH = computed.of_columns(computed.aux_NF), computed.of_columns(computed.last_NH)
        if self._drafter:
            self._drafter.remember(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H)
        if self._observer:
            notify_forward(
                self._observer, rows, slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH
            )

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
