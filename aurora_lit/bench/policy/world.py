"""What a round takes in the simulation, fitted to timed rounds; and how well that predicts other ones.

    seconds = pass(columns) + proposing + draft(shape, sequences) + prefill of the draft's cache, times noise

`pass` is the mean by number of columns, interpolated; `draft` is linear in the sequences for each shape; noise is drawn
from what was measured over what was expected. Left out: rounds that read prompts, since nothing is proposed in them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from aurora_lit.bench.policy.recording import TimedRound, TimedRounds
from aurora_lit.serve.speculation.costs import Costs, DraftShape
from aurora_lit.serve.speculation.planner import SpeculationLimits

_LEAST_ROUNDS = 8
"""Rounds of a number of columns, or of neighbouring ones together, whose mean is a point of the curve."""
_LONGEST = 3.0
"""A round that took longer than so many medians was preempted; it says nothing about a shape."""


class World:
    """The costs of one machine, target and batch size."""

    def __init__(self, timed: TimedRounds, *, seed: int = 0) -> None:
        """Fit them."""
        self.timed, self.batch_size = timed, timed.batch_size
        fitted = [each for each in timed.rounds if not each.checks]
        self.curve = _curve([(r.columns, r.seconds - r.proposing_s) for r in fitted])
        """Columns, ascending, and what passes of so many take."""
        self._draft_costs, self.position_s = _draft_costs([r for r in fitted if r.drafting])
        """By levels and nodes, seconds and seconds for each sequence; of a position of the prefill of its cache."""
        proposing = [r.proposing_s - r.draft_s for r in fitted if r.proposing_s]
        self.proposing_s = float(np.median(proposing)) if proposing else 0.0
        """Looking up, and Python around it, in a round that may propose anything."""
        ratios = np.array([self.measured_s(r) / self.round_s(r) for r in timed.rounds] or [1.0])
        self._noise: list[float] = (ratios / ratios.mean()).tolist()
        self._rng = random.Random(seed)

    def pass_s(self, columns: float) -> float:
        """Of a round but for proposing."""
        return float(np.interp(columns, *self.curve))

    def draft_s(self, drafting: int, shape: DraftShape, uncached: int) -> float:
        """Of drafting for so many sequences."""
        if not drafting or not shape.levels or not self._draft_costs:
            return 0.0
        at = _timed_as(*shape)
        if at not in self._draft_costs:
            at = min(self._draft_costs, key=lambda each: (abs(each[1] - at[1]), abs(each[0] - at[0])))
        constant_s, sequence_s = self._draft_costs[at]
        return constant_s + drafting * sequence_s + uncached * self.position_s

    def round_s(self, r: TimedRound) -> float:
        """What a recorded round is expected to take."""
        proposing = self.proposing_s if r.proposing_s else 0.0
        return self.pass_s(r.columns) + proposing + self.draft_s(r.drafting, DraftShape(*r.shape), r.uncached)

    def measured_s(self, r: TimedRound) -> float:
        """What a recorded round took; if it was preempted, no more than a multiple of what was expected."""
        return min(r.seconds, _LONGEST * self.round_s(r))

    def noise(self) -> float:
        """A factor for one round's time, 1 on average."""
        return self._rng.choice(self._noise)

    def costs(self) -> Costs:
        """What an engine knows when it starts: what its calibration had measured."""
        costs = Costs(ragged=True)
        for name, rows in self.timed.initial.items():
            for batch_size, length, seconds in rows:
                getattr(costs, name).set_initial(batch_size, length, seconds)
        costs.prefill_position_s = self.timed.position_s
        return costs

    def known_costs(self, limits: SpeculationLimits) -> Costs:
        """What an engine would know that has measured everything in real rounds, for ever."""
        costs, B = Costs(ragged=True), self.batch_size
        for columns in range(B, B * (1 + max(limits.copied_tokens, *limits.tree_sizes, 1)) + 1, B):
            costs.target.set_initial(B, columns // B, self.pass_s(columns))
        for drafting in range(1, B + 1):
            for levels in range(1, limits.draft_tokens + 1):
                costs.chain.set_initial(drafting, levels, self.draft_s(drafting, DraftShape(levels), 0))
                for nodes in limits.tree_sizes[-1:]:
                    costs.tree.set_initial(drafting, levels, self.draft_s(drafting, DraftShape(levels, nodes), 0))
        costs.prefill_position_s = self.position_s
        return costs

    def error(self) -> float:
        """Expected over measured time of rounds of the planner that took no part in the fit, less one."""
        checks = [r for r in self.timed.rounds if r.checks]
        return sum(map(self.round_s, checks)) / sum(map(self.measured_s, checks)) - 1 if checks else 0.0


def _timed_as(levels: int, nodes: int) -> tuple[int, int]:
    """A tree of one level is a chain of one, as far as its time goes."""
    return levels, nodes if levels > 1 else 0


def _draft_costs(rounds: list[TimedRound]) -> tuple[dict[tuple[int, int], tuple[float, float]], float]:
    """By shape, what drafting takes and takes for each sequence; and what a position of the prefill takes.

    Least squares, and again without preempted rounds. Shapes that were hardly ever drafted are left out.
    """
    counts = Counter(_timed_as(*r.shape) for r in rounds)
    shapes = sorted(shape for shape, count in counts.items() if count >= _LEAST_ROUNDS)
    rounds = [r for r in rounds if _timed_as(*r.shape) in shapes]
    if not rounds:
        return {}, 0.0
    inputs = np.zeros((len(rounds), 2 * len(shapes) + 1))
    for row, r in zip(inputs, rounds, strict=True):
        at = 2 * shapes.index(_timed_as(*r.shape))
        row[at : at + 2], row[-1] = (1.0, r.drafting), r.uncached
    seconds, kept = np.array([r.draft_s for r in rounds]), np.full(len(rounds), True)
    for _ in range(2):
        costs = np.maximum(0.0, np.linalg.lstsq(inputs[kept], seconds[kept], rcond=None)[0])
        kept = seconds <= _LONGEST * np.maximum(inputs @ costs, np.median(seconds))
    return {s: (float(costs[2 * i]), float(costs[2 * i + 1])) for i, s in enumerate(shapes)}, float(costs[-1])


def _curve(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean seconds by columns, without outliers; neighbouring numbers of columns share a point if they are rare."""
    by_columns = sorted(points)
    columns, means, begin = [], [], 0
    while begin < len(by_columns):
        end = begin + 1
        while end < len(by_columns) and (end - begin < _LEAST_ROUNDS or by_columns[end][0] == by_columns[end - 1][0]):
            end += 1
        seconds = np.array([each[1] for each in by_columns[begin:end]])
        kept = seconds[seconds <= _LONGEST * np.median(seconds)]
        columns.append(np.mean([each[0] for each in by_columns[begin:end]]))
        means.append(kept.mean())
        begin = end
    return np.array(columns), np.maximum.accumulate(np.array(means))
