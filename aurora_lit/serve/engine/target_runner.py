"""Forward passes of the target over the engine's slots, and storing what they computed for drafter and observer.

A pass over a tree writes keys and values in the order of its columns; `store` moves those of the accepted path to the
positions of the committed tokens, and passes on only these. Left out: which tokens are computed
(serve/engine/engine.py), and the pass itself (models/target.py).

Shapes: B sequences, T columns of the widest sequence (its query length), N columns computed in all, A columns of the
longest accepted path with its root, H hidden, F = 3H auxiliary features, D either of these, M positions moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.verification import VerificationResult
from aurora_lit.serve.sequences.observer import RoundObserver, notify_forward
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.drafter import Drafter


class ForwardOutput(NamedTuple):
    """What a forward pass computed, as flat columns: column t of sequence b is at index_BT[b, t]."""

    slots_B: torch.Tensor
    starts_B: torch.Tensor
    """Position of each sequence's first column."""
    aux_NF: torch.Tensor
    """Auxiliary hidden states, the draft's features."""
    last_NH: torch.Tensor
    """Last hidden states, the input of the target's head."""
    index_BT: torch.Tensor
    """int64; beyond a sequence's query length it repeats the last column."""

    def by_column(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Flat states by sequence and column [B, T, D]."""
        if len(states_ND) == self.index_BT.numel():
            return states_ND.view(*self.index_BT.shape, -1)
        return states_ND[self.index_BT]


def query_lengths_of(proposals: Proposals) -> list[int] | None:
    """Columns of each sequence, its root included; None: all have equally many."""
    lengths = [count + 1 for count in proposals.num_proposed_B.tolist()]
    return None if min(lengths) == proposals.token_BK.shape[1] + 1 else lengths


class TargetRunner:
    """Runs the target for sequences. Each `forward` is followed by one `store`."""

    def __init__(
        self, target: Target, *, kv_cache: KVCache, drafter: Drafter | None, observer: RoundObserver | None
    ) -> None:
        self._target, self._kv_cache, self._drafter, self._observer = target, kv_cache, drafter, observer
        self._device = target.device

    def forward(
        self,
        sequences: Sequence[RunningSequence],
        ids_BT: torch.Tensor,
        *,
        start: int | None = None,
        parents_BT: torch.Tensor | None = None,
        query_lengths: Sequence[int] | None = None,
        num_prompts: int = 0,
    ) -> ForwardOutput:
        """Compute tokens from position `start` on; None: from each sequence's last committed token on.

        `parents_BT`: the tokens form trees. `query_lengths`: each sequence computes only its own query length; None:
        all compute T. Both need a target that supports trees. `num_prompts`: the last so many sequences read their
        prompts, the others decode.
        """
        slots_B = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        starts_B = torch.tensor(
            [sequence.length - 1 if start is None else start for sequence in sequences], device=self._device
        )
        where: dict[str, Any] = {"kv_cache": self._kv_cache, "slots_B": slots_B, "starts_B": starts_B}
        where["num_prompts"] = num_prompts
        if parents_BT is not None:
            where["parents_BT"] = parents_BT
        index_BT = torch.arange(ids_BT.numel(), device=self._device).view(ids_BT.shape)
        if query_lengths is None:
            aux_BT3H, last_BTH = self._target.forward(ids_BT, **where)
            return ForwardOutput(slots_B, starts_B, aux_BT3H.flatten(0, 1), last_BTH.flatten(0, 1), index_BT)
        length_B = torch.tensor(query_lengths)
        column_T = torch.arange(ids_BT.shape[1])
        ids_N = ids_BT[column_T < length_B[:, None]]
        aux_NF, last_NH = self._target.forward_ragged(ids_N, widths=query_lengths, **where)
        index_BT = (length_B.cumsum(0) - length_B)[:, None] + column_T.minimum(length_B[:, None] - 1)
        return ForwardOutput(slots_B, starts_B, aux_NF, last_NH, index_BT)

    def store(
        self,
        sequences: Sequence[RunningSequence],
        forward_output: ForwardOutput,
        result: VerificationResult | None = None,
    ) -> None:
        """Store what a pass computed; of trees, or of different query lengths, only the accepted columns (`result`)."""
        slots_B, starts_B = forward_output.slots_B, forward_output.starts_B
        column_BA = None if result is None else result.accepted_column_BA
        if result is not None and column_BA is None and len(forward_output.last_NH) < forward_output.index_BT.numel():
            longest = int(result.num_accepted_B.max()) + 1
            column_BA = torch.arange(longest, device=self._device).expand(len(sequences), -1)
        if column_BA is not None:
            self._move(slots_B, starts_B, column_BA)
            index_BA = forward_output.index_BT.gather(1, column_BA)
            aux_BT3H, last_BTH = forward_output.aux_NF[index_BA], forward_output.last_NH[index_BA]
        else:
            aux_BT3H, last_BTH = (
                forward_output.by_column(forward_output.aux_NF),
                forward_output.by_column(forward_output.last_NH),
            )
        if self._drafter:
            self._drafter.store_features(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H)
        if self._observer:
            notify_forward(
                self._observer, sequences, slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH
            )

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy the first positions of another slot; they have the bits that computing them would give."""
        self._target.copy_prefix(kv_cache=self._kv_cache, source=source, slot=slot, length=length)
        if self._drafter:
            self._drafter.copy_prefix(source, slot, length)
        if self._observer:
            self._observer.on_prefix_copy(source=source, slot=slot, length=length)

    def _move(self, slots_B: torch.Tensor, starts_B: torch.Tensor, column_BA: torch.Tensor) -> None:
        """Move keys and values of accepted columns to the positions of their tokens."""
        moves = [
            (slot, start + column, start + place)
            for slot, start, columns in zip(slots_B.tolist(), starts_B.tolist(), column_BA.tolist(), strict=True)
            for place, column in enumerate(columns)
            if column > place
        ]
        if moves:
            slots_M, from_M, to_M = torch.tensor(moves).t().contiguous()
            self._target.commit_tree_path(kv_cache=self._kv_cache, slots_M=slots_M, from_M=from_M, to_M=to_M)
