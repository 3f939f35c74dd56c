"""The report of an ablation: acceptance along the stream and on measured prompts, adaptation, forgetting, cost.

It is written as JSON, tables and a plot. Confidence intervals are over requests: the scored requests of all seeds, and
the measured prompts with the rounds of all seeds added up. Arms are compared on the seeds that both have.

Leaves out running the arms (bench/ablation/run.py) and the statistics themselves (bench/ablation/statistics.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from aurora_lit.bench.ablation.arms import ARMS, STATIC
from aurora_lit.bench.ablation.result import Result, stored
from aurora_lit.bench.ablation.statistics import (
    Histograms,
    acceptance_by_position,
    acceptance_rate,
    accepted_length,
    interval,
    length_ratio,
    rate_when_tested,
    speed_up,
    tokens_to_adapt,
)
from aurora_lit.bench.plots import save_ablation_plot
from aurora_lit.bench.reporting import report_console

REPORT_NAME, PLOT_NAME = "report.json", "ablation.png"
_ADAPT_WINDOW = 20
"""Scored requests in the sliding window of `tokens_to_adapt`."""
_COMPARED = ("kl", "lk")
"""Arms with which the others are compared, in addition to the static one."""


def save_report(out: Path, *, stream: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Read the results of all arms in `out`; write report.json and a plot there, and print tables."""
    names = [phase["name"] for phase in stream["stream"]["phases"]]
    done = {arm: results for arm in ARMS if (results := list(stored(out, arm)))}
    base = list(stored(out, STATIC))
    others = {name: done[name] for name in _COMPARED if name in done}
    report = {
        "phases": names,
        "costs": dict(costs),
        "arms": {
            arm: summary(results, base=base, others=others, costs=costs, names=names) for arm, results in done.items()
        },
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_ablation_plot(report, out / PLOT_NAME)
    console = report_console()
    for shown in tables(report):
        console.print(shown)
    console.print(f"written to {out / REPORT_NAME}")
    return report


def summary(
    results: Sequence[Result],
    *,
    base: Sequence[Result],
    others: Mapping[str, Sequence[Result]],
    costs: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """The report of one arm, with all its seeds. names: the phases'."""
    phase_N = np.concatenate([result.phases for result in results])
    domain_N = np.concatenate([result.domains for result in results])
    hist_NA = _traffic_histograms(results)
    by_seed = [accepted_length(np.array(result.histograms, dtype=float)) for result in results]
    before, after = _measured_histograms(results, 0), _measured_histograms(results, -1)
    all_before, all_after = (np.concatenate(list(each.values())) for each in (before, after))
    return {
        "seeds": len(results),
        "traffic": {
            **_summary(hist_NA, costs),
            "by_seed": [round(length, 4) for length in by_seed],
            "over_static": _ratio_to(results, base),
            **{f"over_{name}": _ratio_to(results, other) for name, other in others.items() if other is not results},
            "by_phase": {
                f"{number}-{name}": _summary(hist_NA[phase_N == number], costs)
                | {"over_static": _ratio_to(results, base, phase=number)}
                for number, name in enumerate(names)
                if (phase_N == number).any()
            },
            "by_domain": {
                str(domain): _summary(hist_NA[domain_N == domain], costs) for domain in sorted(set(domain_N.tolist()))
            },
        },
        "measured": {
            "before": {domain: _summary(each, costs) for domain, each in before.items()},
            "after": {
                domain: _summary(each, costs) | {"over_start": _ratio(each, before[domain])}
                for domain, each in after.items()
            },
            "all_before": _summary(all_before, costs),
            "all_after": _summary(all_after, costs)
            | {"over_start": _ratio(all_after, all_before)}
            | {
                f"over_{name}": _ratio(all_after, np.concatenate(list(_measured_histograms(other, -1).values())))
                for name, other in others.items()
                if other is not results
            },
            "length_after_phase": [
                {domain: round(accepted_length(each), 4) for domain, each in _measured_histograms(results, n).items()}
                for n in range(len(results[0].measured))
            ],
        },
        "forgetting": _forgetting(results, names),
        "tokens_to_adapt": {
            f"{number}-{name}": [_tokens_to_adapt(each, other, number) for each, other in _pairs(results, base)]
            for number, name in enumerate(names)
        },
        "shifts": [each.shifts for each in results],
        "cost": {
            name: round(sum(getattr(each, name) for each in results) / len(results), 1)
            for name in ("steps", "positions", "learner_s", "simulation_s", "published", "trials", "explored_rounds")
        },
    }


def _traffic_histograms(results: Sequence[Result], phase: int | None = None) -> Histograms:
    """Histograms of the scored requests of all seeds; phase: only of this one."""
    histograms = [
        histogram
        for result in results
        for histogram, number in zip(result.histograms, result.phases, strict=True)
        if phase is None or number == phase
    ]
    return np.array(histograms, dtype=float)


def _pairs(results: Sequence[Result], other: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of results with the same seed."""
    by_seed = {result.seed: result for result in other}
    return [(result, by_seed[result.seed]) for result in results if result.seed in by_seed]


def _ratio_to(results: Sequence[Result], other: Sequence[Result], phase: int | None = None) -> dict[str, Any] | None:
    """Ratio of accepted lengths on the same requests; None without a common seed."""
    pairs = _pairs(results, other)
    if not pairs:
        return None
    own, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    return _ratio(_traffic_histograms(own, phase), _traffic_histograms(theirs, phase))


def _tokens_to_adapt(own: Result, base: Result, phase: int) -> int | None:
    tokens = [n for n, number in zip(own.answer_tokens, own.phases, strict=True) if number == phase]
    return tokens_to_adapt(
        _traffic_histograms([own], phase), _traffic_histograms([base], phase), tokens, window=_ADAPT_WINDOW
    )


def _measured_histograms(results: Sequence[Result], num_phases: int) -> dict[str, Histograms]:
    """Histograms of the measured requests after `num_phases` phases (-1: at the end) by domain, seeds added up."""
    return {
        domain: np.sum([np.array(result.measured[num_phases][domain], dtype=float) for result in results], axis=0)
        for domain in results[0].measured[num_phases]
    }


def _summary(hist_NA: Histograms, costs: Mapping[str, Any]) -> dict[str, Any]:
    low, high = interval(accepted_length, hist_NA)
    return {
        "requests": len(hist_NA),
        "rounds": float(hist_NA.sum()),
        "accepted_length": round(accepted_length(hist_NA), 4),
        "interval": [round(low, 4), round(high, 4)],
        "acceptance_rate": round(acceptance_rate(hist_NA), 4),
        "rate_when_tested": round(rate_when_tested(hist_NA), 4),
        "by_position": [round(share, 4) for share in acceptance_by_position(hist_NA)],
        "modelled_speed_up": round(speed_up(hist_NA, costs), 4),
    }


def _ratio(own: Histograms, other: Histograms) -> dict[str, Any]:
    low, high = interval(length_ratio, own, other)
    return {"ratio": round(length_ratio(own, other), 4), "interval": [round(low, 4), round(high, 4)]}


def _forgetting(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """What each domain with a phase of its own lost from that phase's end until it came back or the stream ended.

    The loss is a share of the accepted length on the domain's measured prompts; it is negative for a gain.
    """
    lost: dict[str, Any] = {}
    own_phases: dict[str, list[int]] = {}
    for number in range(len(names)):
        domains = {d for d, p in zip(results[0].domains, results[0].phases, strict=True) if p == number}
        if len(domains) == 1:
            own_phases.setdefault(domains.pop(), []).append(number)
    for domain, numbers in own_phases.items():
        for number, until in zip(numbers, [*numbers[1:], len(names)], strict=True):
            if until == number + 1 or domain not in results[0].measured[number + 1]:
                continue
            before = _measured_histograms(results, number + 1)[domain]
            after = _measured_histograms(results, until)[domain]
            low, high = interval(_lost_share, before, after)
            lost[f"{number}-{names[number]} … {names[until - 1]}"] = {
                "domain": domain,
                "share": round(_lost_share(before, after), 4),
                "interval": [round(low, 4), round(high, 4)],
            }
    return lost


def _lost_share(before: Histograms, after: Histograms) -> float:
    return 1 - accepted_length(after) / accepted_length(before)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Tables of all arms: traffic, measured prompts, forgetting."""
    arms = report["arms"]
    traffic_table = Table(title="traffic, with exploration: accepted length, over static (95 %), acceptance")
    for name in (
        "arm",
        "seeds",
        "length",
        "over static",
        "over kl",
        "rate",
        "accepted 1, 2, …",
        "speed-up",
        "steps",
        "positions",
        "learner s",
    ):
        traffic_table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, results in arms.items():
        traffic = results["traffic"]
        traffic_table.add_row(
            arm,
            str(results["seeds"]),
            f"{traffic['accepted_length']:.3f}",
            _ratio_text(traffic["over_static"]),
            _ratio_text(traffic.get("over_kl")),
            f"{traffic['acceptance_rate']:.3f}",
            " ".join(f"{share:.2f}" for share in traffic["by_position"]),
            f"{traffic['modelled_speed_up']:.2f}",
            f"{results['cost']['steps']:.0f}",
            f"{results['cost']['positions']:.0f}",
            f"{results['cost']['learner_s']:.0f}",
        )
    domains = sorted({domain for results in arms.values() for domain in results["measured"]["after"]})
    measured_table = Table(title="measured prompts after the stream: accepted length (× that before)")
    for name in ("arm", "all", "all, over kl", *domains):
        measured_table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, results in arms.items():
        measured = results["measured"]
        cells = [
            f"{each['accepted_length']:.3f} ({each['over_start']['ratio']:.3f}×)"
            for each in (measured["all_after"], *(measured["after"][domain] for domain in domains))
        ]
        measured_table.add_row(arm, cells[0], _ratio_text(measured["all_after"].get("over_kl")), *cells[1:])
    forgetting = Table(title="forgetting: loss of a domain's accepted length until it came back, or the end")
    stretches = list(next(iter(arms.values()))["forgetting"]) if arms else []
    for name in ("arm", *stretches):
        forgetting.add_column(name, justify="left" if name == "arm" else "right")
    for arm, results in arms.items():
        lost = results["forgetting"]
        forgetting.add_row(
            arm,
            *(
                f"{lost[s]['share']:+.1%} ({lost[s]['interval'][0]:+.1%} … {lost[s]['interval'][1]:+.1%})"
                for s in stretches
            ),
        )
    return [traffic_table, measured_table, forgetting]


def _ratio_text(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ({low:.3f}–{high:.3f})"
