"""What becomes of a served request's trace: left out, or trained on once it has waited for a trial.

Answers that repeat themselves are left out of training and of the gate: they are easy to predict, so they would teach
the draft to loop, and would make every draft look good at the gate. Leaves out where traces come from
(learn/online/loop.py, learn/offline/loop.py), which of them a batch takes (learn/data/online_batcher.py), and what a
domain is (modules/domains/controller.py).
"""

from __future__ import annotations

import torch

from aurora_lit.learn.data.online_batcher import MAX_CONTEXT, OnlineBatcher
from aurora_lit.learn.data.trace_parts import crop, trained_positions
from aurora_lit.learn.online.scores import TRIAL_POSITIONS
from aurora_lit.learn.online.trial import Trial
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.traces.record import Trace

GRAM_TOKENS = 4
"""Length of the n-grams by which repetition is measured."""
MAX_REPEATED_SHARE = 0.7
"""An answer is not learned from if more than this share of its n-grams are repeats, since it is then in a loop."""
_MIN_GRAMS = 16
"""With fewer n-grams an answer is too short to count as looping."""


class TraceIntake:
    """Sends each trace to the requests that wait for a trial, and those that have waited to the training batches.

    >>> intake = TraceIntake(controller, batcher, trial)
    >>> intake.add(trace).domain                # None: its answer loops, it was left out
    """

    def __init__(
        self,
        controller: DomainController,
        batcher: OnlineBatcher,
        trial: Trial,
    ) -> None:
        """num_looping and the share of repetition begin at 0 and at MAX_REPEATED_SHARE."""
        self._controller, self._batcher, self._trial = controller, batcher, trial
        controller.on_merge = self._rename_domain
        # Or challengers would first have to make up for what steady traffic has cost those before them.
        controller.on_raised_heat = trial.evidence.forget_losses
        self.max_repeated_share = MAX_REPEATED_SHARE
        """Answers with a larger share of repeated n-grams are looping; 1 leaves nothing out."""
        self.num_looping = 0
        """Traces left out because their answer loops."""

    def _rename_domain(self, removed: str, kept: str) -> None:
        self._batcher.rename_domain(removed, kept)
        self._trial.rename_domain(removed, kept)

    def add(self, trace: Trace) -> Trace | None:
        """The trace with its domain, after it was added to what waits for a trial; None if left out."""
        if is_looping(trace, max_repeated_share=self.max_repeated_share):
            self.num_looping += 1
            return None
        trace = self._controller.assign_domain(trace)
        if not trained_positions(trace):
            return trace
        kept = crop(trace, max(TRIAL_POSITIONS, trained_positions(trace) + MAX_CONTEXT))
        # Copied, or the whole prompt would stay in memory.
        for waited in self._trial.take_in(kept if kept is trace else kept.copy()):
            self._batcher.add(waited)
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
