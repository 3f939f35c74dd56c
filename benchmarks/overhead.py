"""What learning adds to a serving round: traces, checks for a new draft and the status page, timed inside real rounds.

    python benchmarks/overhead.py --prompts FILE... --limit 16 --max-tokens 128 -- engine.max_batch_size=8

Everything that an engine worker does for a learner is timed, but for the states that the target's pass stores; a reader
empties the ring as a learner would. Prints milliseconds per round (mean, median, 99th percentile) and the share of the
round's time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.prompts import load_prompts, params_for
from aurora_lit.config import load_config
from aurora_lit.drafts.hot_reload import HotReloader
from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.drafts.store import DraftStore
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.ring import RingReader
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.request import Request
from aurora_lit.serve.engine import engine as engine_module
from aurora_lit.serve.worker.build import build_worker
from aurora_lit.serve.worker.live_draft import LiveDraft
from aurora_lit.serve.worker.load_models import load_tokenizer
from aurora_lit.traces.record import LAYOUT_DIGEST

PARTS = ("traces", "reload checks", "status page")


class PartTimer:
    """Adds up the seconds that the parts of a round take."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.rounds: list[dict[str, float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its time counts for `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return call

    def end_round(self, seconds: float) -> None:
        """End a round that took `seconds` in all."""
        self.rounds.append({**self.seconds, "round": seconds})
        self.seconds = dict.fromkeys(PARTS, 0.0)


@torch.no_grad()
def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=16, help="prompts taken from each file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    args = parser.parse_args()
    config = load_config(None, args.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        LearnerStatusPage.create(folder / LEARNER_STATUS_NAME)
        parts = build_worker(config, folder)
        engine: Any = parts.engine
        timer = PartTimer()
        engine_module.notify_round = timer.timed("traces", engine_module.notify_round)
        engine._observer.on_finish = timer.timed("traces", engine._observer.on_finish)
        assert parts.load_draft is not None, "no draft to train: set draft.checkpoint"
        live = LiveDraft(engine, HotReloader(DraftStore(folder / "drafts", keep=2), parts.load_draft))
        before = timer.timed("reload checks", live.before_round)
        after = timer.timed("reload checks", live.after_round)
        status = EngineStatusPage.create(folder / "status")
        write = timer.timed("status page", status.write)
        room = config.engine.max_seq_len - args.max_tokens
        tokenizer = load_tokenizer(config)
        prompts = load_prompts(args.prompts, limit=args.limit, tokenizer=tokenizer, max_prompt_tokens=room)
        with contextlib.closing(RingReader.open(folder / RING_NAME, layout=LAYOUT_DIGEST)) as reader:
            for number, prompt in enumerate(prompts):
                params = params_for(0.0, max_tokens=args.max_tokens)
                engine.submit(Request(request_id=str(number), prompt_ids=prompt.token_ids, params=params))
            while engine.has_work:
                started = time.perf_counter()
                before()
                outputs = engine.round()
                after(outputs, [TrafficKind()] * len(outputs))
                stats = engine.counters
                write(
                    running=engine.num_running,
                    rounds=stats.rounds,
                    generated_tokens=stats.generated_tokens,
                    drafts=stats.drafts,
                    proposed=stats.proposed,
                    accepted=stats.accepted,
                )
                timer.end_round(time.perf_counter() - started)
                while reader.pop() is not None:
                    pass
        parts.close()
    _report(timer.rounds[8:], batch=config.engine.max_batch_size)
    return 0


def _report(rounds: list[dict[str, float]], *, batch: int) -> None:
    total_s = sum(each["round"] for each in rounds)
    table = Table(title=f"{len(rounds)} rounds, at most {batch} requests, {total_s / len(rounds) * 1e3:.1f} ms a round")
    for column in ("part", "mean ms", "p50 ms", "p99 ms", "share of time"):
        table.add_column(column, justify="left" if column == "part" else "right")
    sums = {"all three": [sum(each[part] for part in PARTS) for each in rounds]}
    for part, seconds in {**{part: [each[part] for each in rounds] for part in PARTS}, **sums}.items():
        median_s, p99_s = np.percentile(seconds, [50, 99])
        table.add_row(
            part,
            *(f"{value * 1e3:.3f}" for value in (statistics.mean(seconds), median_s, p99_s)),
            f"{sum(seconds) / total_s:.2%}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
