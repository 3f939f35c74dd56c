"""Which requests of a recorded stream a seed takes, in which order its phases come, and whether they are long enough.

Leaves out the stream (bench/stream_plan.py) and running it (bench/ablation/run.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from aurora_lit.bench.stream_plan import phase_of
from aurora_lit.config import AuroraConfig
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.learn.online.learner import PATIENCE_TRIALS
from aurora_lit.traces.record import Trace


def takes(request_id: str, *, seed: int, every: int) -> bool:
    """True if this seed scores the request and learns from it; all segments of a request agree.

    Each of the seeds 0 … `every` − 1 takes other requests, which together are all, and so does each of the next
    `every` seeds, which divide them otherwise. With `every` = 1 all seeds take all requests.
    """
    # Not the checksum by which requests are held out for the gate: that of a longer text agrees with it in single bits.
    return random.Random(f"{seed // every} {request_id}").randrange(every) == seed % every


def order_of_phases(count: int, *, seed: int, shuffled: bool) -> list[int]:
    """The numbers of the phases in the order in which they come; seed 0 keeps the recorded order."""
    order = list(range(count))
    return random.Random(seed).sample(order, count) if shuffled and seed else order


def phases_in_order(folder: Path, order: Sequence[int]) -> Iterator[tuple[int, Iterator[Trace]]]:
    """Yield each phase of a log with its traces. Another than the recorded order reads the log once for each phase."""
    if list(order) == sorted(order):
        yield from groupby(read_traces(folder), key=lambda trace: phase_of(trace.request_id))
        return
    for number in order:
        yield number, (trace for trace in read_traces(folder) if phase_of(trace.request_id) == number)


def short_phases(
    config: AuroraConfig, phases: Sequence[Mapping[str, Any]], *, steps_per_request: float, every: int
) -> list[str]:
    """Why gate and averaging cannot be judged on this stream, since they look back over more than its shortest phase.

    `phases`: name and number of requests of each. Empty if all are long enough.
    """
    shortest = min(phases, key=lambda phase: int(phase["requests"]))
    learn, requests, steps = config.learn, int(shortest["requests"]), shortest["requests"] * steps_per_request
    traffic, discarded = requests / every, PATIENCE_TRIALS * learn.publish_every_steps
    found = []
    if traffic < 4 * learn.gate_requests:
        found.append(
            f"has {traffic:.0f} requests, of which {learn.gate_requests} wait for a trial, so many trials judge by the "
            "phase before too: lower learn.gate_requests or --every, or record longer phases"
        )
    if steps < 2 * discarded:
        found.append(
            f"has {steps:.0f} optimiser steps, and {PATIENCE_TRIALS} refusals in a row discard {discarded}: lower "
            "learn.publish_every_steps, or raise --steps-per-request"
        )
    if learn.ema_decay and steps < 3 / (1 - learn.ema_decay):
        found.append(
            f"has {steps:.0f} optimiser steps, and the published average looks back over "
            f"{1 / (1 - learn.ema_decay):.0f}: lower learn.ema_decay, or raise --steps-per-request"
        )
    return [f"phase {shortest['name']} {reason}" for reason in found]
