"""What becomes of a served request's trace: left out, or trained on once the gate has had it.

Answers that repeat themselves are left out of training and of the gate: they are easy to predict, so they would teach
the draft to loop, and would make every draft look good at the gate. Leaves out where traces come from
(learn/online/loop.py, learn/offline/loop.py), which of them a batch takes (learn/data/online_batcher.py), and what a
domain is (modules/domains/controller.py).
"""

from __future__ import annotations

import torch

from aurora_lit.learn.data.online_batcher import MAX_CONTEXT, OnlineBatcher
from aurora_lit.learn.data.trace_parts import crop, trained_positions
from aurora_lit.learn.online.gate import TRIAL_POSITIONS
from aurora_lit.learn.online.held_out import HeldOut
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.traces.record import Trace

_RELEASED_IDS = 1024
"""Latest requests that were given to the batches and are remembered, in case more of their segments come."""
GRAM_TOKENS = 4
"""Length of the n-grams by which repetition is measured."""
MAX_REPEATED_SHARE = 0.7
"""An answer is not learned from if more than this share of its n-grams are repeats, since it is then in a loop."""
_MIN_GRAMS = 16
"""With fewer n-grams an answer is too short to count as looping."""


class TraceIntake:
    """Sends each trace to the requests that wait for a trial, and those that have waited to the training batches.

    >>> intake = TraceIntake(controller, batcher, held_out, num_waiting=16)
    >>> intake.add(trace).domain                # None: its answer loops, it was left out
    """

    def __init__(
        self,
        controller: DomainController,
        batcher: OnlineBatcher,
        held_out: HeldOut,
        *,
        num_waiting: int,
    ) -> None:
        """num_waiting: so many requests wait for a trial; at the start half of those that came, so that learning begins
        with the first.
        """
        self._controller, self._batcher, self._held_out = controller, batcher, held_out
        controller.on_merge = self._rename_domain
        # Or challengers would first have to make up for what steady traffic has cost those before them.
        controller.on_raised_heat = held_out.evidence.forget_losses
        self._num_waiting = num_waiting
        self.max_repeated_share = MAX_REPEATED_SHARE
        """Answers with a larger share of repeated n-grams are looping; 1 leaves nothing out."""
        self._num_added = 0
        self._released: dict[str, None] = {}
        """In their order."""
        self.num_looping = 0
        """Traces left out because their answer loops."""

    def _rename_domain(self, removed: str, kept: str) -> None:
        self._batcher.rename_domain(removed, kept)
        self._held_out.rename_domain(removed, kept)

    def add(self, trace: Trace) -> Trace | None:
        """The trace with its domain, after it was added to what waits for a trial; None if left out."""
        if is_looping(trace, max_repeated_share=self.max_repeated_share):
            self.num_looping += 1
            return None
        trace = self._controller.assign_domain(trace)
        if not trained_positions(trace):
            return trace
        if trace.request_id in self._released:
            self._batcher.add(trace)
            return trace
        trained = trained_positions(trace)
        kept = crop(trace, max(TRIAL_POSITIONS, trained + MAX_CONTEXT))
        self._held_out.add(kept if kept is trace else kept.copy())  # or the whole prompt would stay in memory
        self._num_added += 1
        for waited in self._held_out.release(min(self._num_waiting, self._num_added // 2)):
            self._released[waited.request_id] = None
            self._batcher.add(waited)
        while len(self._released) > _RELEASED_IDS:
            del self._released[next(iter(self._released))]
        return trace


def is_looping(trace: Trace, *, max_repeated_share: float) -> bool:
    """True if a larger share than this of the answer's n-grams occurred in it before; the prompt does not count."""
    return repeated_share(trace.token_ids_T[trace.answer_start :]) > max_repeated_share


def repeated_share(token_ids_T: torch.Tensor) -> float:
    """Share of n-grams that occurred earlier in the sequence; 0 for one with fewer than `_MIN_GRAMS` n-grams."""
    ids = token_ids_T.tolist()
    num_grams = len(ids) - GRAM_TOKENS + 1
    if num_grams < _MIN_GRAMS:
        return 0.0
    return 1 - len(set(zip(*(ids[first:] for first in range(GRAM_TOKENS)), strict=False))) / num_grams
