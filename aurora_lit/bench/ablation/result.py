"""What one arm of an ablation was worth with one seed: the record, and its file.

What is left out: how it comes about (bench/ablation/run.py), what is made of it (bench/ablation/report.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Result:
    """What one arm was worth with one seed; a list a request, in the stream's order."""

    arm: str
    seed: int
    requests: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    tallies: list[list[int]] = field(default_factory=list)
    """Rounds by proposals accepted, 0 to K."""
    answer_tokens: list[int] = field(default_factory=list)
    """Of all requests since the one before, this one included."""
    measured: list[dict[str, list[list[int]]]] = field(default_factory=list)
    """Before the stream and after each phase: by domain, a tally a measured request."""
    shifts: list[tuple[int, str, str]] = field(default_factory=list)
    """Requests of all traffic before it, cause, the detector's domain."""
    steps: int = 0
    positions: int = 0
    learner_s: float = 0.0
    """Processor time of steps, trials, and placing requests in domains."""
    propose_s: float = 0.0
    """Of making rounds, which a live server does anyway."""
    published: int = 0
    trials: int = 0
    explored_rounds: int = 0


def result_path(out: Path, arm: str, seed: int) -> Path:
    """Of one arm and seed."""
    return out / "arms" / f"{arm}-{seed}.json"


def store(out: Path, result: Result) -> None:
    """Whole or not at all."""
    path = result_path(out, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
    temporary.replace(path)


def stored(out: Path, arm: str) -> Iterator[Result]:
    """All seeds of an arm that are done."""
    for path in sorted((out / "arms").glob(f"{arm}-*.json")):
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if result.arm == arm:
            yield result
