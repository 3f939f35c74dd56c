"""The report of an ablation: acceptance along the stream and on measured prompts, adaptation, forgetting, cost.

It is written as JSON, tables and a plot. Confidence intervals are over seeds and requests. Arms are compared in pairs:
the same requests with the same seeds, of those seeds that both have.

Leaves out running the arms (bench/ablation/run.py), the statistics themselves (bench/ablation/statistics.py) and the
tables (bench/ablation/tables.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aurora_lit.bench.ablation.arms import ARMS, STATIC
from aurora_lit.bench.ablation.result import Result, stored
from aurora_lit.bench.ablation.statistics import (
    Histograms,
    Rows,
    acceptance_by_position,
    acceptance_rate,
    accepted_length,
    interval,
    length_difference,
    length_ratio,
    proposed_copies,
    speed_up,
    tokens_to_adapt,
)
from aurora_lit.bench.ablation.tables import tables
from aurora_lit.bench.plots import save_ablation_plot
from aurora_lit.bench.reporting import report_console

REPORT_NAME, PLOT_NAME = "report.json", "ablation.png"
_ADAPT_WINDOW = 20
"""Scored requests in the sliding window of `tokens_to_adapt`."""
_COMPARED = ("memory", "kl", "lk", "full")
"""Arms with which the others are compared, in addition to the static one."""


def save_report(
    out: Path, *, stream: Mapping[str, Any], costs: Mapping[str, Any], short_phases: Sequence[str]
) -> dict[str, Any]:
    """Read the results of all arms in `out`; write report.json and a plot there, and print tables."""
    names = [phase["name"] for phase in stream["stream"]["phases"]]
    done = {arm: results for arm in ARMS if (results := list(stored(out, arm)))}
    others = {name: done[name] for name in _COMPARED if name in done}
    report = {
        "phases": names,
        "short_phases": list(short_phases),
        "costs": dict(costs),
        "arms": {
            arm: summary(results, base=done.get(STATIC, []), others=others, costs=costs, names=names)
            for arm, results in done.items()
        },
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_ablation_plot(report, out / PLOT_NAME)
    console = report_console()
    for shown in (*tables(report), *short_phases):
        console.print(shown)
    console.print(f"written to {out / REPORT_NAME}", markup=False)
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
    rows = _traffic(results)
    start, end = _measured(results, 0), _measured(results, -1)
    in_order = [result for result in results if result.order == sorted(result.order)]
    compared = {name: other for name, other in others.items() if other is not results}
    return {
        "seeds": len(results),
        "orders": len({tuple(result.order) for result in results}),
        "traffic": {
            **_summary(rows, costs),
            "by_seed": [round(accepted_length(_traffic([result]).hist_NA), 4) for result in results],
            "over_static": _traffic_ratio(results, base),
            **{f"over_{name}": _traffic_ratio(results, other) for name, other in compared.items()},
            "by_phase": {
                f"{number}-{name}": _summary(rows.select(phase_N == number), costs)
                | {"over_static": _traffic_ratio(results, base, phase=number)}
                for number, name in enumerate(names)
                if (phase_N == number).any()
            },
            "by_domain": {
                str(domain): _summary(rows.select(domain_N == domain), costs) for domain in np.unique(domain_N)
            },
        },
        "measured": {
            "before": {domain: _summary(_measured(results, 0, domain), costs) for domain in results[0].measured[0]},
            "after": {
                domain: _summary(_measured(results, -1, domain), costs)
                | {"over_start": _ratio(_measured(results, -1, domain), _measured(results, 0, domain))}
                for domain in results[0].measured[-1]
            },
            "all_before": _summary(start, costs),
            "all_after": _summary(end, costs)
            | {"over_start": _ratio(end, start), "over_static": _measured_ratio(results, base)}
            | {f"over_{name}": _measured_ratio(results, other) for name, other in compared.items()},
            # Of the seeds that have the recorded order: after n phases another order has seen others.
            "length_after_phase": [
                {domain: round(accepted_length(_measured(in_order, n, domain).hist_NA), 4) for domain in measured}
                for n, measured in enumerate(in_order[0].measured if in_order else ())
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


def _traffic(results: Sequence[Result], phase: int | None = None) -> Rows:
    """The scored requests of all seeds; phase: only of this one."""
    kept = [(each, i) for each in results for i, number in enumerate(each.phases) if phase is None or number == phase]
    return _rows([(each.seed, each.requests[i], each.counts[i]) for each, i in kept])


def _measured(results: Sequence[Result], num_phases: int, domain: str | None = None) -> Rows:
    """The measured requests after `num_phases` phases (-1: at the end), with all seeds; domain: only of this one."""
    return _rows(
        [
            (each.seed, f"{name} {number}", counts)
            for each in results
            for name, of_domain in each.measured[num_phases].items()
            if domain is None or name == domain
            for number, counts in enumerate(of_domain)
        ]
    )


def _rows(found: Sequence[tuple[int, str, list[list[int]]]]) -> Rows:
    """Rows of (seed, request, its counts)."""
    return Rows(
        counts_N3A=np.array([counts for _, _, counts in found], dtype=float).reshape(len(found), 3, -1 if found else 1),
        seed_N=np.array([seed for seed, _, _ in found], dtype=np.int64),
        request_N=np.array([request for _, request, _ in found], dtype=np.str_),
    )


def _pairs(results: Sequence[Result], other: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of results with the same seed."""
    by_seed = {result.seed: result for result in other}
    return [(result, by_seed[result.seed]) for result in results if result.seed in by_seed]


def _traffic_ratio(
    results: Sequence[Result], other: Sequence[Result], phase: int | None = None
) -> dict[str, Any] | None:
    """Accepted lengths compared on the same requests with the same seeds; None without a common seed."""
    pairs = _pairs(results, other)
    return _ratio(*(_traffic([pair[side] for pair in pairs], phase) for side in (0, 1))) if pairs else None


def _measured_ratio(results: Sequence[Result], other: Sequence[Result]) -> dict[str, Any] | None:
    """The same on the measured prompts after the stream."""
    pairs = _pairs(results, other)
    return _ratio(*(_measured([pair[side] for pair in pairs], -1) for side in (0, 1))) if pairs else None


def _tokens_to_adapt(own: Result, base: Result, phase: int) -> int | None:
    tokens = [n for n, number in zip(own.answer_tokens, own.phases, strict=True) if number == phase]
    return tokens_to_adapt(
        _traffic([own], phase).hist_NA, _traffic([base], phase).hist_NA, tokens, window=_ADAPT_WINDOW
    )


def _summary(rows: Rows, costs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "requests": len(np.unique(rows.request_N)),
        "rounds": float(rows.hist_NA.sum()),
        "accepted_length": round(accepted_length(rows.hist_NA), 4),
        "interval": _rounded(interval(accepted_length, rows)),
        "acceptance_rate": round(acceptance_rate(rows.counts_N3A, draft_tokens=costs["draft_tokens"]), 4),
        "by_position": [round(share, 4) for share in acceptance_by_position(rows.hist_NA)],
        "proposed_copies": round(proposed_copies(rows.counts_N3A), 4),
        "modelled_speed_up": round(speed_up(rows.counts_N3A, costs), 4),
    }


def _ratio(own: Rows, other: Rows) -> dict[str, Any]:
    """Ratio and difference of accepted lengths, with intervals of pairs."""
    return {
        "ratio": round(length_ratio(own.hist_NA, other.hist_NA), 4),
        "interval": _rounded(interval(length_ratio, own, other)),
        "difference": round(length_difference(own.hist_NA, other.hist_NA), 4),
        "difference_interval": _rounded(interval(length_difference, own, other)),
    }


def _rounded(bounds: tuple[float, float]) -> list[float]:
    return [round(bound, 4) for bound in bounds]


def _forgetting(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """What each domain lost from the end of a phase of its own until it came back or the stream ended.

    By phase, over the seeds in whose order something else came in between. The loss is a share of the accepted length
    on the domain's measured prompts; it is negative for a gain.
    """
    lost: dict[str, Any] = {}
    for number, name in enumerate(names):
        domains = {d for each in results for d, p in zip(each.domains, each.phases, strict=True) if p == number}
        if len(domains) != 1 or (domain := domains.pop()) not in results[0].measured[0]:
            continue
        spans = [(each, *span) for each in results if (span := _span(each, number, domain)) is not None]
        if not spans:
            continue
        before, after = (
            _rows(
                [
                    (each.seed, str(i), counts)
                    for each, *ends in spans
                    for i, counts in enumerate(each.measured[ends[side]][domain])
                ]
            )
            for side in (0, 1)
        )
        lost[f"{number}-{name}"] = {
            "domain": domain,
            "seeds": len(spans),
            "share": round(_lost_share(before.hist_NA, after.hist_NA), 4),
            "interval": _rounded(interval(_lost_share, before, after)),
        }
    return lost


def _span(result: Result, phase: int, domain: str) -> tuple[int, int] | None:
    """Numbers of phases that had passed after this one, and when the domain came back; None if nothing was between."""
    back = {p for d, p in zip(result.domains, result.phases, strict=True) if d == domain}
    first = result.order.index(phase) + 1
    until = next((n for n in range(first, len(result.order)) if result.order[n] in back), len(result.order))
    return None if until == first else (first, until)


def _lost_share(before_NA: Histograms, after_NA: Histograms) -> float:
    return 1 - accepted_length(after_NA) / accepted_length(before_NA)
