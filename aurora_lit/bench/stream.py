"""`aurora-lit bench stream`: answers a stream's prompts with the target and records the traces, as a live server would.

    out/traffic/       trace log of the traffic, in the order in which answers ended
    out/measure/       trace log of the measured prompts
    out/stream.json    the stream, and how much was recorded

With a draft (draft.checkpoint), traces contain its rounds: proposals, exploration, behaviour log-probabilities. Answers
do not depend on the draft, so engine.speculate=false records the same text; along greedy ones,
learn/offline/on_policy.py simulates the rounds of any draft. A run that was killed continues where it stopped and has
lost at most one shard.

Leaves out what a stream is (bench/stream_plan.py) and comparing learners on it (bench/ablation/).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from aurora_lit.bench.prompts import repeated_share
from aurora_lit.bench.reporting import progress_bar
from aurora_lit.bench.stream_plan import PlannedRequest, Stream, plan, read_stream
from aurora_lit.config import AuroraConfig
from aurora_lit.durable import replace_file
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.traces.log import TraceLogWriter, read_index, read_shard
from aurora_lit.traces.record import Trace

TRAFFIC, MEASURED, INFO_NAME = "traffic", "measure", "stream.json"
_SHARD_POSITIONS = 16_384


@dataclass(kw_only=True)
class AnswerTotals:
    """How much was answered."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0


def run(config: AuroraConfig, *, stream: Path, prompts: Path | None = None, out: Path) -> dict[str, Any]:
    """Record the stream that the file `stream` describes; returns the content of `out`/stream.json.

    prompts: folder of the prompt files; None: the folder of `stream`. Raises ConfigError if `out` holds another stream,
    or another target's answers.
    """
    described = read_stream(stream)
    _start_or_resume(out, described, config)
    traces: list[Trace] = []
    # Copies, since the recorder's traces are views of slots that are reused.
    engine, tokenizer = build_engine(config, sink=lambda trace: traces.append(trace.copy()))
    phases, measured = plan(
        described,
        prompts=prompts or stream.parent,
        tokenizer=tokenizer,
        max_seq_len=engine.max_seq_len,
    )
    console = Console(stderr=True)
    with progress_bar(console) as bar:
        for part, groups in ((TRAFFIC, phases), (MEASURED, [measured])):
            log = TraceLogWriter(out / part, kind=part, shard_positions=_SHARD_POSITIONS)
            recorded = recorded_ids(out / part)
            for number, group in enumerate(groups):
                name = described.phases[number].name if part == TRAFFIC else part
                task = bar.add_task(name, total=len(group))
                remaining = [planned for planned in group if planned.request.request_id not in recorded]
                bar.advance(task, len(group) - len(remaining))
                totals = answer(engine, remaining, traces=traces, keep=log.append, on_answer=partial(bar.advance, task))
                _add_totals(out, f"{number}-{name}" if part == TRAFFIC else part, totals)
            log.close()
    return _finish(out)


def answer(
    engine: Engine,
    requests: Sequence[PlannedRequest],
    *,
    traces: list[Trace],
    keep: Callable[[Trace], None],
    on_answer: Callable[[], None],
) -> AnswerTotals:
    """Submit each request when it is due, and run rounds until all are answered.

    traces: list to which the engine's recorder appends; it is emptied after each round, each trace going to `keep`.
    """
    waiting = sorted(requests, key=lambda planned: planned.arrives_s)
    skipped_s = waiting[0].arrives_s if waiting else 0.0
    totals, started = AnswerTotals(), time.perf_counter()
    while waiting or engine.has_work:
        while waiting and waiting[0].arrives_s - skipped_s <= time.perf_counter() - started:
            engine.submit(waiting.pop(0).request)
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0].arrives_s - skipped_s - (time.perf_counter() - started)))
            continue
        for output in engine.round():
            if output.error is not None:
                raise AuroraError(f"the engine failed on {output.request_id}: {output.error}")
            totals.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                totals.requests += 1
                on_answer()
        for trace in traces:
            keep(trace)
        traces.clear()
    totals.seconds = time.perf_counter() - started
    return totals


def recorded_ids(folder: Path) -> set[str]:
    """Ids of the requests in a trace log."""
    return {trace.request_id for shard in read_index(folder) for trace in read_shard(folder / shard.name)}


def read_stream_info(folder: Path) -> dict[str, Any]:
    """The content of `stream.json`. Raises AuroraError if the folder has no completely recorded stream."""
    path = folder / INFO_NAME
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not info.get("complete"):
        raise AuroraError(f"{folder} has no complete stream; record one with aurora-lit bench stream --out {folder}")
    return info


def _start_or_resume(out: Path, stream: Stream, config: AuroraConfig) -> None:
    """Create `out`, or check that it belongs to the same stream and target."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / INFO_NAME
    if path.exists():
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["stream"] != asdict(stream):
            raise ConfigError(f"--out {out}: holds another stream; name another folder")
        check_target(info, config, folder=f"--out {out}")
        return
    _write(path, {"complete": False, "stream": asdict(stream), "target": _target(config), "runs": {}})


def check_target(info: dict[str, Any], config: AuroraConfig, *, folder: str) -> None:
    """Raise ConfigError if the stream that `info` describes holds answers of another target than the settings name.

    folder: option and name of the stream's folder, for the message.
    """
    target = _target(config)
    if (before := info.get("target", target)) != target:
        raise ConfigError(f"{folder}: holds answers of {before}, not of {target}; name another folder")


def _target(config: AuroraConfig) -> dict[str, Any]:
    return {name: getattr(config.target, name) for name in ("source", "precision")}


def _add_totals(out: Path, name: str, totals: AnswerTotals) -> None:
    """Add the totals of one phase to those of earlier runs in `stream.json`."""
    info = json.loads((out / INFO_NAME).read_text(encoding="utf-8"))
    before = AnswerTotals(**info["runs"].get(name, {}))
    info["runs"][name] = asdict(
        AnswerTotals(
            requests=before.requests + totals.requests,
            tokens=before.tokens + totals.tokens,
            seconds=round(before.seconds + totals.seconds, 2),
        )
    )
    _write(out / INFO_NAME, info)


def _finish(out: Path) -> dict[str, Any]:
    """Mark the stream as complete, with the logs' segments, answer tokens and repeated n-grams by domain."""
    info: dict[str, Any] = json.loads((out / INFO_NAME).read_text(encoding="utf-8"))
    for part in (TRAFFIC, MEASURED):
        answers: dict[str, list[list[int]]] = {}
        for shard in read_index(out / part):
            for trace in read_shard(out / part / shard.name):
                answers.setdefault(trace.domain, []).append(trace.token_ids_T[trace.answer_start :].tolist())
        info[part] = {
            domain: {
                "segments": len(segments),
                "tokens": sum(map(len, segments)),
                "repeated_share": round(repeated_share(segments), 4),
            }
            for domain, segments in sorted(answers.items())
        }
    info["complete"] = True
    _write(out / INFO_NAME, info)
    return info


def _write(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
