"""The picture of an online benchmark. Leaves out the measuring; does nothing without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save_plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Accepted length and tokens a second over the traffic, a line an arm; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 5), layout="constrained")
    lengths, speeds = figure.subplots(2, sharex=True)
    for arm, result in results.items():
        requests = 0
        places = []
        for window in result["windows"]:
            requests += window["requests"]
            places.append(requests)
        lengths.plot(places, [window["accepted_length"] for window in result["windows"]], marker=".", label=arm)
        speeds.plot(places, [window["tokens_per_s"] for window in result["windows"]], marker=".", label=arm)
    lengths.set_ylabel("accepted length")
    speeds.set_ylabel("tokens a second")
    speeds.set_xlabel("requests")
    for axes in (lengths, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    lengths.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
