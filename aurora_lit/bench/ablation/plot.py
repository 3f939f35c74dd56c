"""The picture of an ablation. Leaves out the measuring; does nothing without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save_plot(report: Mapping[str, Any], path: Path) -> bool:
    """Accepted length by phase over the static draft's, and on measured prompts of each domain after every phase.

    A line an arm. False when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    arms, phases = report["arms"], report["phases"]
    domains = sorted({domain for found in arms.values() for domain in found["measured"]["after"]})
    figure = Figure(figsize=(3 * (1 + len(domains)), 3.2), layout="constrained")
    along, *panels = figure.subplots(1, 1 + len(domains))
    for arm, found in arms.items():
        by_phase = found["traffic"]["by_phase"]
        ratios = [each["over_static"] for each in by_phase.values()]
        if None in ratios:  # no static arm to compare with
            continue
        middle = [ratio["ratio"] for ratio in ratios]
        low, high = ([ratio["interval"][side] for ratio in ratios] for side in (0, 1))
        (line,) = along.plot(range(len(middle)), middle, marker=".", label=arm)
        along.fill_between(range(len(middle)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for domain, axes in zip(domains, panels, strict=True):
            lengths = [each[domain] for each in found["measured"]["length_after_phase"]]
            axes.plot(range(len(lengths)), lengths, marker=".", label=arm)
    along.set_title("traffic, over static", fontsize=9)
    along.set_xticks(range(len(phases)), phases, rotation=60, fontsize=7)
    for domain, axes in zip(domains, panels, strict=True):
        axes.set_title(f"measured: {domain}", fontsize=9)
        axes.set_xticks(range(1 + len(phases)), ["start", *phases], rotation=60, fontsize=7)
    for axes in (along, *panels):
        axes.spines[["top", "right"]].set_visible(False)
    along.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    return True
