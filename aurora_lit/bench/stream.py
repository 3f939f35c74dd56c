"""`aurora-lit bench stream`: the target answers a stream's prompts once, and what a live server would have recorded is
kept: traffic in the order in which it ended, and measured answers beside it.

    out/traffic/   a trace log          out/measure/   another          out/stream.json   what they are

With a draft (draft.checkpoint) rounds are recorded as it was served: proposals, exploration, behaviour
log-probabilities. Greedy and seeded answers do not depend on it, so engine.speculate=false gives the same text, and
learn/offline/on_policy.py makes any other draft's rounds from it. Killed, it goes on where it was; at most one shard is lost.
What is left out: what a stream is (bench/stream_plan.py), what drafts are worth along it (bench/ablation/run.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from aurora_lit.bench.prompts import progress_bar, repeated_share
from aurora_lit.bench.stream_plan import Asked, Stream, plan, read_stream
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError, ConfigError
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.worker.build import build_engine
from aurora_lit.traces.log import TraceLogWriter, read_index, read_shard
from aurora_lit.traces.record import Trace

TRAFFIC, MEASURED, ABOUT_NAME = "traffic", "measure", "stream.json"
_SHARD_POSITIONS = 16_384


@dataclass(kw_only=True)
class Answers:
    """What was answered in this run."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0


def run(config: AuroraConfig, *, stream: Path, prompts: Path | None = None, out: Path) -> dict[str, Any]:
    """Record the stream in the file `stream`, whose prompt files lie in `prompts` (None: beside it); returns what
    `out`/stream.json says. Raises ConfigError when `out` holds another stream."""
    described = read_stream(stream)
    _claim(out, described)
    traces: list[Trace] = []
    # A copy: what the recorder hands over lies in slots that are used again.
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
            done = recorded_ids(out / part)
            for number, group in enumerate(groups):
                name = described.phases[number].name if part == TRAFFIC else part
                task = bar.add_task(name, total=len(group))
                left = [asked for asked in group if asked.request.request_id not in done]
                bar.advance(task, len(group) - len(left))
                found = ask(engine, left, traces=traces, keep=log.append, on_answer=lambda task=task: bar.advance(task))
                _note(out, f"{number}-{name}" if part == TRAFFIC else part, found)
            log.flush()
    return _finish(out)


def ask(
    engine: Engine,
    asked: Sequence[Asked],
    *,
    traces: list[Trace],
    keep: Callable[[Trace], None],
    on_answer: Callable[..., None],
) -> Answers:
    """Submit each request when it is due and run rounds until all are answered; `traces` is where the engine's
    recorder puts what ends, `keep` takes it from there."""
    waiting = sorted(asked, key=lambda each: each.arrives_s)
    skipped_s = waiting[0].arrives_s if waiting else 0.0
    found, started = Answers(), time.perf_counter()
    while waiting or engine.has_work:
        while waiting and waiting[0].arrives_s - skipped_s <= time.perf_counter() - started:
            engine.submit(waiting.pop(0).request)
        if not engine.has_work:
            time.sleep(max(0.0, waiting[0].arrives_s - skipped_s - (time.perf_counter() - started)))
            continue
        for output in engine.round():
            if output.error is not None:
                raise AuroraError(f"the engine gave up on {output.request_id}: {output.error}")
            found.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                found.requests += 1
                on_answer()
        for trace in traces:
            keep(trace)
        traces.clear()
    found.seconds = time.perf_counter() - started
    return found


def recorded_ids(folder: Path) -> set[str]:
    """Requests that a log holds."""
    return {trace.request_id for shard in read_index(folder) for trace in read_shard(folder / shard.name)}


def about(folder: Path) -> dict[str, Any]:
    """What `stream.json` says. Raises AuroraError when the folder holds no whole stream."""
    path = folder / ABOUT_NAME
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not found.get("complete"):
        raise AuroraError(f"{folder} holds no whole stream; record one with aurora-lit bench stream --out {folder}")
    return found


def _claim(out: Path, stream: Stream) -> None:
    """Begin or go on in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ABOUT_NAME
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["stream"] != asdict(stream):
            raise ConfigError(f"--out {out}: holds another stream; name another folder")
        return
    _write(path, {"complete": False, "stream": asdict(stream), "runs": {}})


def _note(out: Path, name: str, answers: Answers) -> None:
    """Add a part's numbers of this run to those of the runs before."""
    found = json.loads((out / ABOUT_NAME).read_text(encoding="utf-8"))
    before = Answers(**found["runs"].get(name, {}))
    found["runs"][name] = asdict(
        Answers(
            requests=before.requests + answers.requests,
            tokens=before.tokens + answers.tokens,
            seconds=round(before.seconds + answers.seconds, 2),
        )
    )
    _write(out / ABOUT_NAME, found)


def _finish(out: Path) -> dict[str, Any]:
    """Say what the logs hold: requests, answer tokens, and how much of the answers repeats itself, by domain."""
    found: dict[str, Any] = json.loads((out / ABOUT_NAME).read_text(encoding="utf-8"))
    for part in (TRAFFIC, MEASURED):
        answers: dict[str, list[list[int]]] = {}
        for shard in read_index(out / part):
            for trace in read_shard(out / part / shard.name):
                answers.setdefault(trace.domain, []).append(trace.token_ids_T[trace.answer_start :].tolist())
        found[part] = {
            domain: {
                "segments": len(each),
                "tokens": sum(map(len, each)),
                "repeated_share": round(repeated_share(each), 4),
            }
            for domain, each in sorted(answers.items())
        }
    found["complete"] = True
    _write(out / ABOUT_NAME, found)
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
