"""How long rounds took lately, those that swapped a draft apart from the others. Seconds in, microseconds out."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

_REMEMBERED = 2048
_RENEWED_EVERY_S = 1.0


class RoundTimes:
    """Percentiles over the last rounds, worked out at most once a second."""

    def __init__(self) -> None:
        self._others: deque[float] = deque(maxlen=_REMEMBERED)
        self._swapping: deque[float] = deque(maxlen=_REMEMBERED)
        self._renew_at = 0.0

    def note(self, seconds: float, *, swapped: bool) -> None:
        """Book a round; swapping is part of its time."""
        (self._swapping if swapped else self._others).append(seconds)

    def fields(self) -> dict[str, int]:
        """What has changed of the status page's fields: round_p50_us, round_p99_us, swap_round_p99_us."""
        now = time.monotonic()
        if now < self._renew_at:
            return {}
        self._renew_at = now + _RENEWED_EVERY_S
        fields = {}
        if self._others:
            p50, p99 = np.percentile(np.array(self._others), (50, 99))
            fields = {"round_p50_us": int(p50 * 1e6), "round_p99_us": int(p99 * 1e6)}
        if self._swapping:
            fields["swap_round_p99_us"] = int(np.percentile(np.array(self._swapping), 99) * 1e6)
        return fields
