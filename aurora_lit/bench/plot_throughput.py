"""The picture of a throughput benchmark. Leaves out the measuring; does nothing without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aurora_lit.bench.prompts import Spread


def save_plot(
    speeds: Mapping[int, Mapping[str, Spread]], ratios: Mapping[int, Mapping[str, Spread]], path: Path
) -> bool:
    """Bars of tokens a second by batch size and arm, with quartiles and the arm's ratio if it has one.

    False when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    arms = list(next(iter(speeds.values())))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        spreads = [by_arm[arm] for by_arm in speeds.values()]
        places = [place + (i - (len(arms) - 1) / 2) * width for place in range(len(speeds))]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.bar(places, medians, width * 0.92, yerr=errors, capsize=3, label=arm)
        labels = [f"×{by_arm[arm].median:.2f}" if arm in by_arm else "" for by_arm in ratios.values()]
        axes.bar_label(bars, labels, padding=3)
    axes.set_xticks(range(len(speeds)), [str(batch_size) for batch_size in speeds])
    axes.set_xlabel("batch size")
    axes.set_ylabel("tokens a second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True
