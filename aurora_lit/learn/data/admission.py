"""Which traces may teach: answers that loop are left out, of training and of the gate alike.

A looping answer is easy to draft: it would teach the draft to repeat itself, and make every draft look good at the
gate. What is left out: how much of a batch one client may fill (learn/data/feed.py), labels (modules/domains/controller.py).
"""

from __future__ import annotations

import torch

from aurora_lit.traces.record import Trace

GRAM_TOKENS = 4
_FEWEST_GRAMS = 16
"""An answer with fewer n-grams is too short to tell."""


class Admission:
    """Decides trace by trace, and counts.

    >>> admission = Admission(max_repeated_share=0.7)
    >>> if admission.admits(trace): feed.add(trace)
    """

    def __init__(self, *, max_repeated_share: float) -> None:
        """1 admits all."""
        self._max_repeated_share = max_repeated_share
        self.num_looping = 0
        """Traces left out."""

    def admits(self, trace: Trace) -> bool:
        """Whether the trace may teach."""
        looping = repeated_share(trace.token_ids_T[trace.answer_start :]) > self._max_repeated_share
        self.num_looping += looping
        return not looping


def repeated_share(token_ids_T: torch.Tensor) -> float:
    """Share of n-grams that the sequence already contained; 0 of one that is too short to tell."""
    num_grams = len(token_ids_T) - GRAM_TOKENS + 1
    if num_grams < _FEWEST_GRAMS:
        return 0.0
    grams_NG = token_ids_T.unfold(0, GRAM_TOKENS, 1)
    return 1 - len(torch.unique(grams_NG, dim=0)) / num_grams
