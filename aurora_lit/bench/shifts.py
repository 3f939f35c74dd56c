"""`aurora-lit bench shifts`: how soon the domain detector notices a recorded stream's phases, and its false alarms.

The delay is the number of requests of a new phase until a shift is detected. False alarms are shifts detected in random
orders of the same requests, which have no phases, and further shifts in a phase of the stream after its first. The
detector gets only prompts here, no labels and no acceptance.

Leaves out the detector (modules/domains/detector.py).
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

from aurora_lit.bench.reporting import progress_bar, report_console
from aurora_lit.bench.stream import TRAFFIC, read_stream_info
from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.modules.domains.detector import DomainDetector, prompt_embedding
from aurora_lit.traces.record import Trace

REPORT_NAME = "shifts.json"


def run(config: AuroraConfig, *, traces: Path, shuffles: int, out: Path) -> dict[str, Any]:
    """Run the detector over the stream in `traces` and over `shuffles` random orders of it; return the report.

    The report is also written to `out`/shifts.json.
    """
    names = [phase["name"] for phase in read_stream_info(traces)["stream"]["phases"]]
    console = Console(stderr=True)
    with progress_bar(console) as bar:
        reading = bar.add_task("reading", total=None)
        requests = []
        for trace in read_traces(traces / TRAFFIC):
            if not trace.first_position:
                requests.append(prompt_only(trace))
                bar.advance(reading)
        bar.update(reading, total=len(requests))
        started = time.process_time()
        detected = detected_shifts(config, requests)
        seconds = time.process_time() - started
        task = bar.add_task("random orders", total=shuffles)
        alarms = []
        for seed in range(shuffles):
            order = list(requests)
            random.Random(seed).shuffle(order)
            alarms.append(len(detected_shifts(config, order)))
            bar.advance(task)
    report = {
        "requests": len(requests),
        "phases": delays(detected, [phase_of(trace.request_id) for trace in requests], names),
        "false_alarms_by_order": alarms,
        "false_alarms_per_1000_requests": round(1000 * sum(alarms) / max(1, shuffles * len(requests)), 3),
        "detector_ms_per_request": round(1000 * seconds / max(1, len(requests)), 3),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report_console().print(table(report))
    return report


def prompt_only(trace: Trace) -> Trace:
    """A small trace with the same prompt embedding, no label and no rounds, so that many fit into memory."""
    mean_E = prompt_embedding(trace)
    if mean_E is None:
        return replace(trace, domain="")
    return replace(
        trace,
        domain="",
        answer_start=3,
        token_ids_T=trace.token_ids_T[:3],
        aux_T3H=torch.stack([mean_E] * 3),
        last_TH=trace.last_TH[:0],
        lse_T=None,
        round_root_R=trace.round_root_R[:0],
        num_proposed_R=trace.num_proposed_R[:0],
        num_accepted_R=trace.num_accepted_R[:0],
        source_R=trace.source_R[:0],
        explored_R=trace.explored_R[:0],
    )


def detected_shifts(config: AuroraConfig, requests: Sequence[Trace]) -> list[int]:
    """Indices of the requests at which a new detector detects a shift."""
    detector = DomainDetector(max_domains=config.domain.max_domains, novelty_threshold=config.domain.novelty_threshold)
    return [index for index, trace in enumerate(requests) if detector.assign(trace).shift is not None]


def delays(detected: Sequence[int], phases: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each phase: requests until its first detected shift (None: none), and the number of further shifts.

    In the first phase, which is no change, every shift counts as a further one.
    """
    rows = []
    for number, name in enumerate(names):
        indices = [index for index, phase in enumerate(phases) if phase == number]
        inside = [index for index in detected if indices and indices[0] <= index <= indices[-1]]
        first = number == 0
        rows.append(
            {
                "phase": name,
                "delay_requests": None if first or not inside else inside[0] - indices[0],
                "more_shifts": len(inside) if first else max(0, len(inside) - 1),
            }
        )
    return rows


def table(report: dict[str, Any]) -> Table:
    """One row for each phase."""
    shown = Table(
        title=f"shifts: {report['false_alarms_per_1000_requests']} false alarms per 1,000 requests in random orders"
    )
    for name in ("phase", "delay (requests)", "more shifts"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for number, row in enumerate(report["phases"]):
        delay = "" if number == 0 else "missed" if row["delay_requests"] is None else str(row["delay_requests"])
        shown.add_row(row["phase"], delay, str(row["more_shifts"]))
    return shown
