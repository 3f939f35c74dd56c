"""`aurora-lit bench shifts`: how soon the detector notices a recorded stream's phases, and how often it is wrong.

Delay: requests of a new phase until a shift is called. False alarms: shifts called in random orders of the same
requests, where there is nothing to notice, and those called in the stream itself after a phase's own was. The detector
sees prompts alone here, no labels and no acceptance. What is left out: the detector (modules/domains/detector.py).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.prompts import progress_bar, report_console
from aurora_lit.bench.stream import TRAFFIC, about
from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.modules.domains.detector import DomainDetector, embed
from aurora_lit.traces.record import Trace

REPORT_NAME = "shifts.json"


def run(config: AuroraConfig, *, traces: Path, shuffles: int, out: Path) -> dict[str, Any]:
    """Run the detector over the stream in `traces` and over `shuffles` random orders of it; returns what it writes."""
    names = [phase["name"] for phase in about(traces)["stream"]["phases"]]
    console = Console(stderr=True)
    with progress_bar(console) as bar:
        reading = bar.add_task("reading", total=None)
        requests = []
        for trace in read_traces(traces / TRAFFIC):
            if not trace.first_position:
                requests.append(prompt_alone(trace))
                bar.advance(reading)
        bar.update(reading, total=len(requests))
        started = time.process_time()
        found = called(config, requests)
        seconds = time.process_time() - started
        task = bar.add_task("random orders", total=shuffles)
        alarms = []
        for seed in range(shuffles):
            order = list(requests)
            random.Random(seed).shuffle(order)
            alarms.append(len(called(config, order)))
            bar.advance(task)
    report = {
        "requests": len(requests),
        "phases": delays(found, [phase_of(trace.request_id) for trace in requests], names),
        "false_alarms_by_order": alarms,
        "false_alarms_per_1000_requests": round(1000 * sum(alarms) / max(1, shuffles * len(requests)), 3),
        "detector_ms_per_request": round(1000 * seconds / max(1, len(requests)), 3),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report_console().print(table(report))
    return report


def prompt_alone(trace: Trace) -> Trace:
    """All that the detector looks at of a prompt, in the place of the trace: small, so that many can be kept."""
    mean_E = embed(trace)
    if mean_E is None:
        return replace(trace, domain="")
    return replace(
        trace,
        domain="",
        answer_start=2,
        token_ids_T=trace.token_ids_T[:2],
        aux_T3H=torch.stack([mean_E, mean_E]),
        last_TH=trace.last_TH[:0],
        lse_T=None,
        round_root_R=trace.round_root_R[:0],
        num_proposed_R=trace.num_proposed_R[:0],
        num_accepted_R=trace.num_accepted_R[:0],
        source_R=trace.source_R[:0],
        explored_R=trace.explored_R[:0],
    )


def called(config: AuroraConfig, requests: Sequence[Trace]) -> list[int]:
    """After which requests a new detector calls a shift."""
    detector = DomainDetector(max_domains=config.domain.max_domains, novelty=config.domain.novelty_threshold)
    return [at for at, trace in enumerate(requests) if detector.place(trace).shift is not None]


def delays(found: Sequence[int], phases: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """By phase: requests until the first shift in it is called (None: never), and how many more are called after it.

    Of the first phase, which there was nothing before, all are too many.
    """
    rows = []
    for number, name in enumerate(names):
        places = [at for at, phase in enumerate(phases) if phase == number]
        inside = [at for at in found if places and places[0] <= at <= places[-1]]
        first = number == 0
        rows.append(
            {
                "phase": name,
                "delay_requests": None if first or not inside else inside[0] - places[0],
                "more_shifts": len(inside) if first else max(0, len(inside) - 1),
            }
        )
    return rows


def table(report: dict[str, Any]) -> Table:
    """A row a phase."""
    shown = Table(
        title=f"shifts: {report['false_alarms_per_1000_requests']} false alarms a thousand requests in random orders"
    )
    for name in ("phase", "delay (requests)", "more shifts"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for number, row in enumerate(report["phases"]):
        delay = "" if number == 0 else "missed" if row["delay_requests"] is None else str(row["delay_requests"])
        shown.add_row(row["phase"], delay, str(row["more_shifts"]))
    return shown
