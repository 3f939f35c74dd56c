"""The result of one arm of an ablation with one seed, and its file.

Leaves out how it is computed (bench/ablation/run.py) and the report of all results (bench/ablation/report.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aurora_lit.durable import replace_file


@dataclass(kw_only=True)
class Result:
    """One arm with one seed; lists have an entry for each scored request, in the order of the stream."""

    arm: str
    seed: int
    requests: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """The phases in the order in which they came."""
    counts: list[list[list[int]]] = field(default_factory=list)
    """What `round_counts` (bench/ablation/statistics.py) says of each."""
    answer_tokens: list[int] = field(default_factory=list)
    """Answer tokens of the stream since the previous scored request, this one's included."""
    measured: list[dict[str, list[list[list[int]]]]] = field(default_factory=list)
    """Before the stream and after each phase: by domain, the same of each measured request."""
    shifts: list[tuple[int, str, str]] = field(default_factory=list)
    """Detected shifts: number of requests before, cause, the detector's domain."""
    steps: int = 0
    positions: int = 0
    learner_s: float = 0.0
    """Processor time of learning: steps, trials, domain detection."""
    simulation_s: float = 0.0
    """Processor time of simulating rounds, which a live server spends on serving."""
    published: int = 0
    trials: int = 0
    explored_rounds: int = 0


def result_path(out: Path, arm: str, seed: int) -> Path:
    """The file of one arm and seed."""
    return out / "arms" / f"{arm}-{seed}.json"


def store(out: Path, result: Result) -> None:
    """Write a result atomically."""
    path = result_path(out, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(asdict(result)) + "\n").encode())


def stored(out: Path, arm: str) -> Iterator[Result]:
    """The results of an arm, for all seeds that are done."""
    for path in sorted((out / "arms").glob(f"{arm}-*.json")):
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if result.arm == arm:
            yield result
