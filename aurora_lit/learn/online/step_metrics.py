"""Metrics of optimiser steps, averaged until they are logged. Leaves out the loggers (learn/online/learner.py).

>>> metrics = StepMetrics()
>>> metrics.update(report, norm)
>>> metrics.mean("loss")
>>> metrics.compute_and_reset()
"""

from __future__ import annotations

import torch
from torchmetrics import MeanMetric

from aurora_lit.modules.losses.objective import OnlineReport


class StepMetrics:
    """See the file's docstring."""

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric] = {}
        self._last: dict[str, float] = {}

    def update(self, report: OnlineReport, norm: torch.Tensor) -> None:
        """Add a step; `norm`: of its gradient, before clipping."""
        for name, value, weight in _numbers(report, norm):
            if name not in self._metrics:
                # Not synchronised: the processes have different terms, and the first one's are logged.
                self._metrics[name] = MeanMetric(nan_strategy="ignore", sync_on_compute=False)
            self._metrics[name].update(value, weight)

    def mean(self, name: str) -> float:
        """Mean since the last `compute_and_reset`, or what that returned; 0 before the first step."""
        metric = self._metrics.get(name)
        updated = metric is not None and metric.update_called
        return float(metric.compute()) if metric is not None and updated else self._last.get(name, 0.0)

    def compute_and_reset(self) -> dict[str, float]:
        """The means of all metrics that were updated; averaging starts again."""
        means = {name: float(metric.compute()) for name, metric in self._metrics.items() if metric.update_called}
        for metric in self._metrics.values():
            metric.reset()
        self._last = means
        return means


def _numbers(report: OnlineReport, norm: torch.Tensor) -> list[tuple[str, float, float]]:
    """Name, value and weight of each metric that a step has."""
    numbers = [
        ("loss", float(report.loss.detach()), 1.0),
        ("lk_live", float(report.lk_live), 1.0),
        ("lk_replay", float(report.lk_replay), 1.0),
        ("value_loss", float(report.value_loss), 1.0),
        ("gradient_norm", float(norm), 1.0),
    ]
    for place, (stopped, counted) in enumerate(report.stats.stopped_R2.tolist()):
        numbers.append((f"stopped_{place}", stopped / max(counted, 1e-9), counted))
    for place, (tested, accepted) in enumerate(zip(report.tested_K, report.accepted_K, strict=True)):
        rate = float(accepted) / max(1.0, float(tested))
        numbers.append((f"served_acceptance_{place}", rate, float(tested)))
    alpha_KN, weight_KN = report.stats.alpha_N, report.mask_KBT.flatten(1)
    for step, (alpha_N, weight_N) in enumerate(zip(alpha_KN, weight_KN, strict=True)):
        total = float(weight_N.sum())
        numbers.append((f"alpha_{step}", float((alpha_N * weight_N).sum()) / max(1.0, total), total))
    return [number for number in numbers if number[2] > 0]
