"""The report of an ablation as tables. Leaves out the report itself (bench/ablation/report.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_SHOWN_POSITIONS = 4
"""Accepted tokens whose shares are shown."""


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Tables of all arms: traffic, comparisons in pairs, measured prompts, forgetting."""
    arms = report["arms"]
    return [_traffic(arms), _comparisons(arms), _measured(arms), _forgetting(arms)]


def _traffic(arms: Mapping[str, Any]) -> Table:
    table = _table(
        "traffic, with exploration: accepted length (95 %), acceptance, modelled speed",
        "arm",
        "seeds",
        "length",
        "rate",
        f"accepted 1 … {_SHOWN_POSITIONS}",
        "copies proposed",
        "speed-up",
        "steps",
        "positions",
        "learner s",
    )
    for arm, results in arms.items():
        traffic, cost = results["traffic"], results["cost"]
        table.add_row(
            arm,
            str(results["seeds"]),
            _with_interval(traffic["accepted_length"], traffic["interval"]),
            f"{traffic['acceptance_rate']:.3f}",
            " ".join(f"{share:.2f}" for share in traffic["by_position"][:_SHOWN_POSITIONS]),
            f"{traffic['proposed_copies']:.1f}",
            f"{traffic['modelled_speed_up']:.2f}",
            *(f"{cost[name]:.0f}" for name in ("steps", "positions", "learner_s")),
        )
    return table


def _comparisons(arms: Mapping[str, Any]) -> Table:
    table = _table(
        "in pairs, on the same requests: ratio and difference of accepted lengths (95 %)",
        "arm",
        "over",
        "traffic",
        "tokens a round",
        "measured after",
        "tokens a round",
    )
    for arm, results in arms.items():
        traffic, measured = results["traffic"], results["measured"]["all_after"]
        for other in arms:
            parts = [part.get(f"over_{other}") for part in (traffic, measured)]
            if other == arm or None in parts:
                continue
            cells = [
                _with_interval(part[value], part[bounds])
                for part in parts
                for value, bounds in (("ratio", "interval"), ("difference", "difference_interval"))
            ]
            table.add_row(arm, other, *cells)
    return table


def _measured(arms: Mapping[str, Any]) -> Table:
    domains = sorted({domain for results in arms.values() for domain in results["measured"]["after"]})
    table = _table("measured prompts after the stream: accepted length (× that before)", "arm", "all", *domains)
    for arm, results in arms.items():
        measured = results["measured"]
        parts = (measured["all_after"], *(measured["after"][domain] for domain in domains))
        table.add_row(arm, *(f"{each['accepted_length']:.3f} ({each['over_start']['ratio']:.3f}×)" for each in parts))
    return table


def _forgetting(arms: Mapping[str, Any]) -> Table:
    phases = list(dict.fromkeys(phase for results in arms.values() for phase in results["forgetting"]))
    table = _table(
        "forgetting: loss of a domain's accepted length from this phase until it came back, or the end", "arm", *phases
    )
    for arm, results in arms.items():
        lost = [results["forgetting"].get(phase) for phase in phases]
        table.add_row(
            arm,
            *(
                "" if x is None else f"{x['share']:+.1%} ({x['interval'][0]:+.1%} … {x['interval'][1]:+.1%})"
                for x in lost
            ),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in ("arm", "over") else "right")
    return table


def _with_interval(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:.3f} ({bounds[0]:.3f} to {bounds[1]:.3f})"
