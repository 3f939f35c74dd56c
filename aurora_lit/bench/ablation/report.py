"""What an ablation's arms come to: accepted length and acceptance along the stream and on measured prompts,
adaptation, forgetting, cost, modelled speed-up; as JSON, tables and a picture.

Intervals are over requests: those of the traffic that the seeds scored, and the measured ones with seeds added up.
Arms are compared on the seeds that both have. What is left out: running (bench/ablation/run.py), statistics
(bench/ablation/tallies.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from aurora_lit.bench.ablation.arms import ARMS, STATIC
from aurora_lit.bench.ablation.plot import save_plot
from aurora_lit.bench.ablation.result import Result, stored
from aurora_lit.bench.ablation.tallies import (
    Tallies,
    acceptance_rate,
    accepted_length,
    interval,
    length_ratio,
    rate_when_tested,
    reached,
    speed_up,
    tokens_to_adapt,
)
from aurora_lit.bench.prompts import report_console

REPORT_NAME, PICTURE_NAME = "report.json", "ablation.png"
_ADAPT_WINDOW = 20
"""Scored requests of a reading of the gain."""
_COMPARED = ("kl", "lk")
"""Arms that others are compared with besides the static one."""


def save_report(out: Path, *, stream: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    """Read what is done of the arms; write `out`/report.json and a picture, and print tables."""
    names = [phase["name"] for phase in stream["stream"]["phases"]]
    done = {arm: found for arm in ARMS if (found := list(stored(out, arm)))}
    base = list(stored(out, STATIC))
    others = {name: done[name] for name in _COMPARED if name in done}
    report = {
        "phases": names,
        "costs": dict(costs),
        "arms": {
            arm: summary(found, base=base, others=others, costs=costs, names=names) for arm, found in done.items()
        },
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    save_plot(report, out / PICTURE_NAME)
    console = report_console()
    for shown in tables(report):
        console.print(shown)
    console.print(f"written to {out / REPORT_NAME}")
    return report


def summary(
    found: Sequence[Result],
    *,
    base: Sequence[Result],
    others: Mapping[str, Sequence[Result]],
    costs: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """One arm, all its seeds."""
    phase_N = np.concatenate([each.phases for each in found])
    domain_N = np.concatenate([each.domains for each in found])
    own = _traffic(found)
    per_seed = [accepted_length(np.array(each.tallies, dtype=float)) for each in found]
    before, after = _measured(found, 0), _measured(found, -1)
    all_before, all_after = (np.concatenate(list(each.values())) for each in (before, after))
    return {
        "seeds": len(found),
        "traffic": {
            **_numbers(own, costs),
            "by_seed": [round(each, 4) for each in per_seed],
            "over_static": _over(found, base),
            **{f"over_{name}": _over(found, other) for name, other in others.items() if other is not found},
            "by_phase": {
                f"{number}-{name}": _numbers(own[phase_N == number], costs)
                | {"over_static": _over(found, base, phase=number)}
                for number, name in enumerate(names)
                if (phase_N == number).any()
            },
            "by_domain": {
                str(domain): _numbers(own[domain_N == domain], costs) for domain in sorted(set(domain_N.tolist()))
            },
        },
        "measured": {
            "before": {domain: _numbers(each, costs) for domain, each in before.items()},
            "after": {
                domain: _numbers(each, costs) | {"over_start": _ratio(each, before[domain])}
                for domain, each in after.items()
            },
            "all_before": _numbers(all_before, costs),
            "all_after": _numbers(all_after, costs)
            | {"over_start": _ratio(all_after, all_before)}
            | {
                f"over_{name}": _ratio(all_after, np.concatenate(list(_measured(other, -1).values())))
                for name, other in others.items()
                if other is not found
            },
            "length_after_phase": [
                {domain: round(accepted_length(each), 4) for domain, each in _measured(found, at).items()}
                for at in range(len(found[0].measured))
            ],
        },
        "forgetting": _forgetting(found, names),
        "tokens_to_adapt": {
            f"{number}-{name}": [_adapted(each, other, number) for each, other in _pairs(found, base)]
            for number, name in enumerate(names)
        },
        "shifts": [each.shifts for each in found],
        "cost": {
            name: round(sum(getattr(each, name) for each in found) / len(found), 1)
            for name in ("steps", "positions", "learner_s", "propose_s", "published", "trials", "explored_rounds")
        },
    }


def _traffic(found: Sequence[Result], phase: int | None = None) -> Tallies:
    """The scored requests of all seeds, or those of a phase."""
    kept = [
        one
        for each in found
        for one, number in zip(each.tallies, each.phases, strict=True)
        if phase is None or number == phase
    ]
    return np.array(kept, dtype=float)


def _pairs(found: Sequence[Result], other: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Those of the same seed."""
    by_seed = {each.seed: each for each in other}
    return [(each, by_seed[each.seed]) for each in found if each.seed in by_seed]


def _over(found: Sequence[Result], other: Sequence[Result], phase: int | None = None) -> dict[str, Any] | None:
    """How many times as long, request by request; None without a common seed."""
    pairs = _pairs(found, other)
    if not pairs:
        return None
    own, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    return _ratio(_traffic(own, phase), _traffic(theirs, phase))


def _adapted(own: Result, base: Result, phase: int) -> int | None:
    tokens = [n for n, number in zip(own.answer_tokens, own.phases, strict=True) if number == phase]
    return tokens_to_adapt(_traffic([own], phase), _traffic([base], phase), tokens, window=_ADAPT_WINDOW)


def _measured(found: Sequence[Result], at: int) -> dict[str, Tallies]:
    """By domain and request, all seeds together, after `at` phases."""
    return {
        domain: np.sum([np.array(each.measured[at][domain], dtype=float) for each in found], axis=0)
        for domain in found[0].measured[at]
    }


def _numbers(tallies_NA: Tallies, costs: Mapping[str, Any]) -> dict[str, Any]:
    low, high = interval(accepted_length, tallies_NA)
    return {
        "requests": len(tallies_NA),
        "rounds": float(tallies_NA.sum()),
        "accepted_length": round(accepted_length(tallies_NA), 4),
        "interval": [round(low, 4), round(high, 4)],
        "acceptance_rate": round(acceptance_rate(tallies_NA), 4),
        "rate_when_tested": round(rate_when_tested(tallies_NA), 4),
        "by_position": [round(share, 4) for share in reached(tallies_NA)],
        "modelled_speed_up": round(speed_up(tallies_NA, costs), 4),
    }


def _ratio(own: Tallies, other: Tallies) -> dict[str, Any]:
    low, high = interval(length_ratio, own, other)
    return {"ratio": round(length_ratio(own, other), 4), "interval": [round(low, 4), round(high, 4)]}


def _forgetting(found: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """For each domain with a phase of its own: what its measured prompts lost from that phase's end until the domain
    came back or the stream ended; a share of the accepted length, negative where it gained."""
    lost: dict[str, Any] = {}
    own_phases: dict[str, list[int]] = {}
    for number in range(len(names)):
        domains = {d for d, p in zip(found[0].domains, found[0].phases, strict=True) if p == number}
        if len(domains) == 1:
            own_phases.setdefault(domains.pop(), []).append(number)
    for domain, numbers in own_phases.items():
        for number, until in zip(numbers, [*numbers[1:], len(names)], strict=True):
            if until == number + 1 or domain not in found[0].measured[number + 1]:
                continue
            then, later = _measured(found, number + 1)[domain], _measured(found, until)[domain]
            low, high = interval(partial(_loss), then, later)
            lost[f"{number}-{names[number]} … {names[until - 1]}"] = {
                "domain": domain,
                "share": round(_loss(then, later), 4),
                "interval": [round(low, 4), round(high, 4)],
            }
    return lost


def _loss(then: Tallies, later: Tallies) -> float:
    return 1 - accepted_length(later) / accepted_length(then)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Arms against each other."""
    arms = report["arms"]
    along = Table(title="along the stream, exploring included: accepted length, over static (95 %), acceptance")
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
        along.add_column(name, justify="left" if name == "arm" else "right")
    for arm, found in arms.items():
        traffic = found["traffic"]
        along.add_row(
            arm,
            str(found["seeds"]),
            f"{traffic['accepted_length']:.3f}",
            _shown(traffic["over_static"]),
            _shown(traffic.get("over_kl")),
            f"{traffic['acceptance_rate']:.3f}",
            " ".join(f"{share:.2f}" for share in traffic["by_position"]),
            f"{traffic['modelled_speed_up']:.2f}",
            f"{found['cost']['steps']:.0f}",
            f"{found['cost']['positions']:.0f}",
            f"{found['cost']['learner_s']:.0f}",
        )
    domains = sorted({domain for found in arms.values() for domain in found["measured"]["after"]})
    after = Table(title="measured prompts, before and after the stream: accepted length (× of before)")
    for name in ("arm", "all", "all, over kl", *domains):
        after.add_column(name, justify="left" if name == "arm" else "right")
    for arm, found in arms.items():
        measured = found["measured"]
        cells = [
            f"{each['accepted_length']:.3f} ({each['over_start']['ratio']:.3f}×)"
            for each in (measured["all_after"], *(measured["after"][domain] for domain in domains))
        ]
        after.add_row(arm, cells[0], _shown(measured["all_after"].get("over_kl")), *cells[1:])
    kept = Table(title="forgetting: lost of a domain's accepted length until it came back, or the end")
    stretches = list(next(iter(arms.values()))["forgetting"]) if arms else []
    for name in ("arm", *stretches):
        kept.add_column(name, justify="left" if name == "arm" else "right")
    for arm, found in arms.items():
        lost = found["forgetting"]
        kept.add_row(
            arm,
            *(
                f"{lost[s]['share']:+.1%} ({lost[s]['interval'][0]:+.1%} … {lost[s]['interval'][1]:+.1%})"
                for s in stretches
            ),
        )
    return [along, after, kept]


def _shown(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ({low:.3f}–{high:.3f})"
