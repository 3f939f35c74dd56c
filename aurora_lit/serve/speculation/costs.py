"""What operations cost here, by number of rows and width: measured at start, kept up by running rounds.

At start everything is measured, at its best: slots are empty, and nothing else is done around it. Rounds then measure
what is chosen. So what no round has measured yet counts as that much dearer as the rest has turned out since, or a
policy would leave what it knows for what it only hopes. What is left out: choosing (serve/speculation/planner.py).
"""

from __future__ import annotations

_MEMORY = 0.9
"""Share of an old cost that stays when a round measures another."""
_DRIFT_MEMORY = 0.95
_MOST_DRIFT = 4.0


class CostTable:
    """Seconds of an operation by rows and width; between and beyond what was measured by the nearest ones.

    >>> table.begin_with(8, 5, 0.020)
    >>> table.update(8, 1, 0.012)
    >>> table(8, 5)
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        """What rounds measured."""
        self._at_start: dict[tuple[int, int], float] = {}
        self._between: dict[tuple[int, float], tuple[tuple[int, int], tuple[int, int], float]] = {}
        """For what was not measured: the nearest that were, and how far it lies from the first to the second."""
        self._drift = 1.0
        """What rounds measured, by what the same took at start."""

    def begin_with(self, rows: int, width: int, seconds: float) -> None:
        """Take in what a calibration has measured."""
        self._at_start[rows, width] = seconds
        self._between.clear()

    def update(self, rows: int, width: float, seconds: float) -> None:
        """Take in what a round has measured; outliers (a preempted process) move it little.

        What was measured between two widths counts for the nearer one, as much as that is thought to differ.
        """
        key = rows, max(1, round(width))
        expected = self(rows, width)
        if key[1] != width and expected:
            seconds *= self(*key) / expected
        at_start = self._at_start.get(key)
        old = self._known(key) if key in self._seconds or at_start is not None else seconds
        seconds = min(seconds, 2 * old)
        if at_start:
            self._drift += (1 - _DRIFT_MEMORY) * (min(seconds / at_start, _MOST_DRIFT) - self._drift)
        if key not in self._seconds:
            self._between.clear()
        self._seconds[key] = old + (1 - _MEMORY) * (seconds - old)

    def __call__(self, rows: int, width: float) -> float:
        """Expected seconds; 0 before any measurement. `width` may lie between whole ones."""
        whole = rows, int(width)
        if whole[1] == width and (whole in self._seconds or whole in self._at_start):
            return self._known(whole)
        if (rows, width) not in self._between:
            if not self._at_start and not self._seconds:
                return 0.0
            self._between[rows, width] = self._neighbours(rows, width)
        below, above, share = self._between[rows, width]
        return self._known(below) + share * (self._known(above) - self._known(below))

    def _neighbours(self, rows: int, width: float) -> tuple[tuple[int, int], tuple[int, int], float]:
        keys = self._at_start.keys() | self._seconds.keys()
        low = [key for key in keys if key[0] <= rows and key[1] <= width]
        high = [key for key in keys if key[0] >= rows and key[1] >= width]
        if not low or not high:
            nearest = min(keys, key=lambda key: abs(key[0] * key[1] - rows * width))
            return nearest, nearest, 0.0
        below = max(low, key=lambda key: key[0] * key[1])
        above = min(high, key=lambda key: key[0] * key[1])
        span = above[0] * above[1] - below[0] * below[1]
        return below, above, (rows * width - below[0] * below[1]) / span if span else 0.0

    def _known(self, key: tuple[int, int]) -> float:
        measured = self._seconds.get(key)
        return self._at_start[key] * self._drift if measured is None else measured
