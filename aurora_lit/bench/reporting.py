"""What the benchmarks' reports have in common: medians with quartiles, a console, a JSON file."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aurora_lit.config import AuroraConfig
from aurora_lit.machine import available_cores


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of some measurements."""

    median: float
    low: float
    """Lower quartile; the minimum of fewer than four values."""
    high: float
    """Upper quartile; the maximum of fewer than four values."""

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        quartiles = (min(values), statistics.median(values), max(values))
        if len(values) >= 4:
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
            quartiles = (low, middle, high)
        return Spread(median=quartiles[1], low=quartiles[0], high=quartiles[2])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def report_console() -> Console:
    """A console wide enough for the tables, also without a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def write_report(path: Path, *, config: AuroraConfig, draft_version: str, results: dict[str, Any]) -> None:
    """Write results as JSON, together with machine, draft version and settings."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report = {"machine": machine, "draft_version": draft_version, "config": _public(config), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _public(config: AuroraConfig) -> dict[str, Any]:
    """All settings but the server's, which contain the API key."""
    return {name: section for name, section in asdict(config).items() if name != "server"}
