"""Forward passes of the target over the rows of a round, and storing what they computed for drafter and observer.

A target with fused layers computes all rows in one pass, each with its own number of columns, chains, trees and prompts
side by side. Other targets take one pass for the decoding rows, padded to the longest, and one for each prompt row.

A pass over a tree writes keys and values in the order of its columns; `store` moves those of the accepted path to the
positions of the committed tokens. Left out: which rows there are (serve/engine/engine.py), and the pass itself
(models/target.py).

Shapes: B rows, T columns of the longest decoding row, N columns computed in all, H hidden, F = 3H auxiliary features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.target import Target
from aurora_lit.serve.sequences.observer import RoundObserver
from aurora_lit.serve.sequences.round_plan import DecodingRow, PromptRow, RoundPlan
from aurora_lit.serve.speculation.drafter import Drafter


class Columns(NamedTuple):
    """What a pass computed, by column."""

    aux_NF: torch.Tensor
    """Auxiliary hidden states, the draft's features."""
    last_NH: torch.Tensor
    """Last hidden states, the input of the target's head."""
    begins: list[int]
    """First column of each row, and the end of the last one."""

    def aux(self, row: int) -> torch.Tensor:
        """Auxiliary states of a row [T, F]."""
        return self.aux_NF[self.begins[row] : self.begins[row + 1]]

    def last(self, row: int) -> torch.Tensor:
        """Last hidden states of a row [T, H]."""
        return self.last_NH[self.begins[row] : self.begins[row + 1]]


class TargetRunner:
    """Runs the target for the rows of a round. Each row's columns are to be stored after `run`."""

    def __init__(
        self, target: Target, *, kv_cache: KVCache, drafter: Drafter | None, observer: RoundObserver | None
    ) -> None:
        self._target, self._kv_cache, self._drafter, self._observer = target, kv_cache, drafter, observer
        self._device = target.device

    def run(self, plan: RoundPlan) -> Columns:
        """Compute all rows; those of `plan.decoding` come first."""
        if self._target.supports_trees:
            return self._run_ragged(plan)
        parts = [self._run_padded(plan.decoding)] if plan.decoding else []
        parts += [self._run_padded([row]) for row in plan.prompts]
        begins = [0]
        for part in parts:
            first = begins[-1]
            begins += [first + end for end in part.begins[1:]]
        return Columns(
            torch.cat([part.aux_NF for part in parts]), torch.cat([part.last_NH for part in parts]), begins=begins
        )

    def store_decoding(self, row: DecodingRow, columns: Columns, index: int, accepted: Sequence[int]) -> None:
        """Store the `accepted` columns of row `index`, from the root's column 0 on."""
        in_order = accepted[-1] == len(accepted) - 1
        if not in_order:
            moves = [(column, place) for place, column in enumerate(accepted) if column > place]
            from_M, to_M = (torch.tensor(each) + row.start for each in zip(*moves, strict=True))
            slots_M = torch.full((len(moves),), row.sequence.slot, dtype=torch.int64)
            self._target.commit_tree_path(kv_cache=self._kv_cache, slots_M=slots_M, from_M=from_M, to_M=to_M)
        first = columns.begins[index]
        which = slice(first, first + len(accepted)) if in_order else [first + column for column in accepted]
        self._store(row, columns.aux_NF[which], columns.last_NH[which])

    def store_prompt(self, row: PromptRow, columns: Columns, index: int) -> None:
        """Store all columns of row `index`."""
        self._store(row, columns.aux(index), columns.last(index))

    def _store(self, row: DecodingRow | PromptRow, aux_TF: torch.Tensor, last_TH: torch.Tensor) -> None:
        slot, start = row.sequence.slot, row.start
        if self._drafter:
            self._drafter.store_features(slot=slot, start=start, aux_TF=aux_TF)
        if self._observer and row.sequence.request.store:
            self._observer.on_forward(slot=slot, start=start, aux_TF=aux_TF, last_TH=last_TH)

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy the first positions of another slot; they have the bits that computing them would give."""
        self._target.copy_prefix(kv_cache=self._kv_cache, source=source, slot=slot, length=length)
        if self._drafter:
            self._drafter.copy_prefix(source, slot, length)
        if self._observer:
            self._observer.on_prefix_copy(source=source, slot=slot, length=length)

    def _run_ragged(self, plan: RoundPlan) -> Columns:
        rows: list[DecodingRow | PromptRow] = [*plan.decoding, *plan.prompts]
        tokens = [row.tokens for row in rows]
        widths = [len(each) for each in tokens]
        aux_NF, last_NH = self._target.forward_ragged(
            torch.tensor(list(itertools.chain.from_iterable(tokens))),
            widths=widths,
            kv_cache=self._kv_cache,
            slots_B=torch.tensor([row.sequence.slot for row in rows]),
            starts_B=torch.tensor([row.start for row in rows]),
            parents_BT=_parents(plan.decoding),
            num_prompts=len(plan.prompts),
        )
        return Columns(aux_NF, last_NH, [0, *itertools.accumulate(widths)])

    def _run_padded(self, rows: Sequence[DecodingRow] | Sequence[PromptRow]) -> Columns:
        """One pass with equally many columns a row; only each row's own are returned."""
        tokens = [row.tokens for row in rows]
        longest = max(map(len, tokens))
        aux_BTF, last_BTH = self._target.forward(
            torch.tensor([each + [0] * (longest - len(each)) for each in tokens], device=self._device),
            kv_cache=self._kv_cache,
            slots_B=torch.tensor([row.sequence.slot for row in rows], device=self._device),
            starts_B=torch.tensor([row.start for row in rows], device=self._device),
            num_prompts=sum(isinstance(row, PromptRow) for row in rows),
        )
        own = torch.tensor([t < len(each) for each in tokens for t in range(longest)], device=self._device)
        return Columns(
            aux_BTF.flatten(0, 1)[own], last_BTH.flatten(0, 1)[own], [0, *itertools.accumulate(map(len, tokens))]
        )


def _parents(rows: Sequence[DecodingRow]) -> torch.Tensor | None:
    """The parents of every column [B, T], the root's −1 included; None if no row is a tree."""
    if all(row.proposal.parents is None for row in rows):
        return None
    width = 1 + max(len(row.proposal.tokens) for row in rows)
    chain = list(range(-1, width - 1))
    of_rows = []
    for row in rows:
        parents = row.proposal.parents
        own = chain if parents is None else [-1, *parents]
        of_rows.append(own + [0] * (width - len(own)))
    return torch.tensor(of_rows)
