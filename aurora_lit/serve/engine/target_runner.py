"""Forward passes of the target over the rows of a round, and storing what they computed for drafter and observer.

A native target computes all rows in one pass, each with its own number of columns, chains, trees and prompts
side by side. Other targets take one pass for the decoding rows, padded to the longest, and one for each prompt row.

A pass over a tree writes keys and values in the order of its columns; `store` moves those of the accepted path to the
positions of the committed tokens. Left out: which rows there are (serve/engine/engine.py), and the pass itself
(models/native_target.py).

Shapes: B rows, T columns of the longest decoding row, N columns computed in all, H hidden, F = 3H auxiliary features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aurora_lit.kernels.target_pass import PassResult, TargetPass
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.native_target import NativeTarget
from aurora_lit.serve.engine.round_plan import DecodingRow, PromptRow, RoundPlan
from aurora_lit.serve.engine.token_choice import draws_of
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.sources.drafter import Drafter


class States(NamedTuple):
    """The hidden states of all columns of a pass."""

    aux_NF: torch.Tensor
    """Auxiliary ones, the draft's features."""
    last_NH: torch.Tensor
    """The last ones, the input of the target's head."""


class Columns(NamedTuple):
    """What a pass computed, by column."""

    states: States | PassResult
    begins: list[int]
    """First column of each row, and the end of the last one."""
    own_tokens: list[int] | None = None
    """The target's own token at every column of the decoding rows; None: it is still to be chosen."""
    are_stored: bool = False
    """True: drafter and observer have the states, as if all columns were accepted in their order."""

    def aux(self, row: int) -> torch.Tensor:
        """Auxiliary states of a row [T, F]."""
        return self.states.aux_NF[self.begins[row] : self.begins[row + 1]]

    def last(self, row: int) -> torch.Tensor:
        """Last hidden states of a row [T, H]; of prompts arbitrary if none of them asks for log-probabilities."""
        return self.states.last_NH[self.begins[row] : self.begins[row + 1]]


class TargetRunner:
    """Runs the target for the rows of a round. Each row's columns are to be stored after `run`."""

    def __init__(
        self, target: Target, *, kv_cache: KVCache, drafter: Drafter | None, observer: TraceRecorder | None
    ) -> None:
        self._target, self._kv_cache, self._drafter, self._observer = target, kv_cache, drafter, observer
        self._device = target.device
        self._keeps_prompts = observer is not None and observer.keeps_prompts
        aux_SLF = drafter.features_SLF if drafter else None
        last_SLH = observer.last_SLH if observer and drafter else None
        self._pass = target.make_pass(kv_cache, aux_SLF=aux_SLF, last_SLH=last_SLH)
        """All of a round in one native call; None where the target does not allow it."""

    def run(self, plan: RoundPlan) -> Columns:
        """Compute all rows; those of `plan.decoding` come first."""
        if self._pass is not None:
            return self._run_at_once(plan, self._pass)
        if isinstance(self._target, NativeTarget):
            return self._run_ragged(plan, self._target)
        parts = [self._run_padded(plan.decoding)] if plan.decoding else []
        parts += [self._run_padded([row]) for row in plan.prompts]
        begins = [0]
        for part in parts:
            first = begins[-1]
            begins += [first + end for end in part.begins[1:]]
        aux_NF, last_NH = (torch.cat(each) for each in zip(*(part.states for part in parts), strict=True))
        return Columns(States(aux_NF, last_NH), begins)

    def store_decoding(self, row: DecodingRow, columns: Columns, index: int, accepted: Sequence[int]) -> None:
        """Store the `accepted` columns of row `index`, from the root's column 0 on."""
        in_order = accepted[-1] == len(accepted) - 1
        if columns.are_stored:
            if not in_order:
                assert self._pass is not None
                keeps_last = row.sequence.request.store
                self._pass.keep_path(accepted, slot=row.sequence.slot, start=row.start, keeps_last=keeps_last)
            return
        if not in_order:
            moves = [(row.start + column, row.start + place) for place, column in enumerate(accepted) if column > place]
            froms, tos = zip(*moves, strict=True)
            assert isinstance(self._target, NativeTarget)
            self._target.commit_tree_path(kv_cache=self._kv_cache, slot=row.sequence.slot, froms=froms, tos=tos)
        first = columns.begins[index]
        which = slice(first, first + len(accepted)) if in_order else [first + column for column in accepted]
        self._store(row, columns, which)

    def store_prompt(self, row: PromptRow, columns: Columns, index: int) -> None:
        """Store all columns of row `index`."""
        if not columns.are_stored:
            self._store(row, columns, slice(columns.begins[index], columns.begins[index + 1]))

    def _store(self, row: DecodingRow | PromptRow, columns: Columns, which: slice | list[int]) -> None:
        slot, start = row.sequence.slot, row.start
        if self._drafter:
            self._drafter.store_features(slot=slot, start=start, aux_TF=columns.states.aux_NF[which])
        if self._observer and row.sequence.request.store:
            states = {"aux_TF": columns.states.aux_NF[which], "last_TH": columns.states.last_NH[which]}
            self._observer.on_forward(slot=slot, start=start, **states)

    def _run_at_once(self, plan: RoundPlan, run: TargetPass) -> Columns:
        decoding = plan.decoding
        rows: list[DecodingRow | PromptRow] = [*decoding, *plan.prompts]
        tokens = [row.tokens for row in rows]
        needs_logits = any(row.sequence.needs_logits for row in decoding)
        result = run(
            tokens,
            slots=[row.sequence.slot for row in rows],
            starts=[row.start for row in rows],
            parents=_parents(decoding),
            num_prompts=len(plan.prompts),
            num_chosen=0 if needs_logits else plan.num_decoding_columns,
            keeps_last=[row.sequence.request.store for row in decoding]
            + [self._keeps_prompts and row.sequence.request.store for row in plan.prompts],
            skips_prompts_last=not self._keeps_prompts
            and all(row.sequence.params.prompt_logprobs is None for row in plan.prompts),
            draws=None if needs_logits else draws_of(decoding),
        )
        begins = [0, *itertools.accumulate(map(len, tokens))]
        own_tokens = None if needs_logits else result.own_tokens
        are_stored = self._drafter is not None or self._observer is None
        return Columns(result, begins, own_tokens, are_stored=are_stored)

    def _run_ragged(self, plan: RoundPlan, target: NativeTarget) -> Columns:
        rows: list[DecodingRow | PromptRow] = [*plan.decoding, *plan.prompts]
        tokens = [row.tokens for row in rows]
        widths = [len(each) for each in tokens]
        parents = _parents(plan.decoding)
        aux_NF, last_NH = target.forward_ragged(
            torch.tensor(list(itertools.chain.from_iterable(tokens))),
            widths=widths,
            kv_cache=self._kv_cache,
            slots_B=torch.tensor([row.sequence.slot for row in rows]),
            starts_B=torch.tensor([row.start for row in rows]),
            parents_BT=None if parents is None else torch.tensor(parents),
            num_prompts=len(plan.prompts),
        )
        return Columns(States(aux_NF, last_NH), [0, *itertools.accumulate(widths)])

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
        states = States(aux_BTF.flatten(0, 1)[own], last_BTH.flatten(0, 1)[own])
        return Columns(states, [0, *itertools.accumulate(map(len, tokens))])


def _parents(rows: Sequence[DecodingRow]) -> list[list[int]] | None:
    """The parents of every column, the root's −1 included, equally many of each row; None if no row is a tree."""
    if all(row.proposal.parents is None for row in rows):
        return None
    width = 1 + max(len(row.proposal.tokens) for row in rows)
    chain = list(range(-1, width - 1))
    of_rows = []
    for row in rows:
        parents = row.proposal.parents
        own = chain if parents is None else [-1, *parents]
        of_rows.append(own + [0] * (width - len(own)))
    return of_rows
