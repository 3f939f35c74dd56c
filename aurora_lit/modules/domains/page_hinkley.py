"""The Page–Hinkley test for a change of the mean of a series (E. S. Page, Biometrika 41, 1954), in plain Python.

Every value's distance to the mean so far is added up. The sum stays near its lowest (highest) point while the mean is
steady, and leaves it when the mean rises (falls). Gives the decisions of `river.drift.PageHinkley`, whose import takes
a second (tests/modules/domains/test_page_hinkley.py compares the two). Leaves out what is done about a change.

    test = PageHinkley(mode="up", delta=0.1, threshold=2.0, min_instances=16)
    test.update(0.0)                            # True at the value with which a rise is detected; then it starts anew
"""

from __future__ import annotations

from typing import Literal


class PageHinkley:
    """A one-sided test; see the file's example."""

    def __init__(
        self, *, mode: Literal["up", "down"], delta: float, threshold: float, min_instances: int, alpha: float = 0.9999
    ) -> None:
        """mode: the direction of changes to detect. delta: change of the mean that is ignored. threshold: sum of the
        deviations beyond it at which a change is detected. min_instances: values before that can happen. alpha: factor
        by which the sum is forgotten with each value; 1: never."""
        self._sign = 1.0 if mode == "up" else -1.0
        self._delta, self._threshold, self._min_instances, self._alpha = delta, threshold, min_instances, alpha
        self._start()

    def _start(self) -> None:
        self._number, self._mean, self._sum, self._lowest = 0, 0.0, 0.0, float("inf")
        self.drift_detected = False
        """True if the last value completed a change."""

    def update(self, value: float) -> bool:
        """Add a value; True if a change is detected with it."""
        if self.drift_detected:
            self._start()
        self._number += 1
        self._mean += (1.0 / self._number) * (value - self._mean)  # rounds as river does
        self._sum = self._alpha * self._sum + self._sign * (value - self._mean) - self._delta
        self._lowest = min(self._lowest, self._sum)
        self.drift_detected = self._number >= self._min_instances and self._sum - self._lowest > self._threshold
        return self.drift_detected
