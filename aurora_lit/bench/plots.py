"""The plots of the benchmarks, as PNG files. Without matplotlib, nothing is drawn and the functions return False."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_lit.bench.reporting import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_throughput_plot(
    speeds: Mapping[int, Mapping[str, Spread]], ratios: Mapping[int, Mapping[str, Spread]], path: Path
) -> bool:
    """Bars of tokens per second by batch size and arm, with quartiles, and the arm's ratio if it has one."""
    figure = _figure(7, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    arms = list(next(iter(speeds.values())))
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        spreads = [by_arm[arm] for by_arm in speeds.values()]
        positions = [position + (i - (len(arms) - 1) / 2) * width for position in range(len(speeds))]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.bar(positions, medians, width * 0.92, yerr=errors, capsize=3, label=arm)
        labels = [f"×{by_arm[arm].median:.2f}" if arm in by_arm else "" for by_arm in ratios.values()]
        axes.bar_label(bars, labels, padding=3)
    axes.set_xticks(range(len(speeds)), [str(batch_size) for batch_size in speeds])
    axes.set_xlabel("batch size")
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False)
    _save(figure, path)
    return True


def save_online_plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Accepted length and tokens per second along the traffic, one line for each arm."""
    figure = _figure(7, 5)
    if figure is None:
        return False
    lengths, speeds = figure.subplots(2, sharex=True)
    for arm, result in results.items():
        num_requests = 0
        positions = []
        for window in result["windows"]:
            num_requests += window["requests"]
            positions.append(num_requests)
        lengths.plot(positions, [window["accepted_length"] for window in result["windows"]], marker=".", label=arm)
        speeds.plot(positions, [window["tokens_per_s"] for window in result["windows"]], marker=".", label=arm)
    lengths.set_ylabel("accepted length")
    speeds.set_ylabel("tokens per second")
    speeds.set_xlabel("requests")
    lengths.legend(frameon=False)
    _save(figure, path)
    return True


def save_ablation_plot(report: Mapping[str, Any], path: Path) -> bool:
    """Accepted length over static by phase, and on measured prompts by domain; one line for each arm."""
    arms, phases = report["arms"], report["phases"]
    domains = sorted({domain for result in arms.values() for domain in result["measured"]["after"]})
    figure = _figure(3 * (1 + len(domains)), 3.2)
    if figure is None:
        return False
    traffic, *panels = figure.subplots(1, 1 + len(domains))
    for arm, result in arms.items():
        ratios = [phase["over_static"] for phase in result["traffic"]["by_phase"].values()]
        if None in ratios:  # no static arm to compare with
            continue
        values = [ratio["ratio"] for ratio in ratios]
        low, high = ([ratio["interval"][side] for ratio in ratios] for side in (0, 1))
        (line,) = traffic.plot(range(len(values)), values, marker=".", label=arm)
        traffic.fill_between(range(len(values)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for domain, axes in zip(domains, panels, strict=True):
            lengths = [by_domain[domain] for by_domain in result["measured"]["length_after_phase"]]
            axes.plot(range(len(lengths)), lengths, marker=".", label=arm)
    traffic.set_title("traffic, relative to static", fontsize=9)
    traffic.set_xticks(range(len(phases)), phases, rotation=60, fontsize=7)
    for domain, axes in zip(domains, panels, strict=True):
        axes.set_title(f"measured: {domain}", fontsize=9)
        axes.set_xticks(range(1 + len(phases)), ["start", *phases], rotation=60, fontsize=7)
    traffic.legend(frameon=False, fontsize=7)
    _save(figure, path)
    return True


def _figure(width: float, height: float) -> Figure | None:
    """An empty figure, sizes in inches; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
