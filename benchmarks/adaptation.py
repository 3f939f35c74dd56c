"""How fast a draft learns new kinds of traffic, and what it forgets: for settings of the learner, in processor time.

    python -m benchmarks.adaptation --prompts billing.jsonl support.jsonl --seconds 30 --traces kept -- \\
        learn.learning_rate=1e-3

Each file is one domain, greedily answered by the configured engine in a process of its own, which records the traces;
`--traces` keeps them for the next call with the same prompts, options of the answers and target. The learner gets the
domains one after the other, `--seconds` of optimiser steps each (choosing batches included), about as many requests as
a server at the default share would send it meanwhile: `--rate` in a second of which it computes `--share`. A sixth of
each domain's requests is held out; the table has their accepted length, with chains of learn.unroll_steps, at the start
and after each domain. Answers are learned from again, under new names, when a domain's are used up.

No trials are held: this is what a step teaches, good or bad. Leaves out what learning costs
(benchmarks/learner_step.py) and what is served (`aurora-lit bench online --phases`, `bench ablation`).
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.learn.offline.replay import read_traces
from aurora_lit.learn.offline.scoring import RoundScorer, RoundTotals
from aurora_lit.learn.online.build import make_batcher
from aurora_lit.learn.online.intake import is_looping
from aurora_lit.learn.online.learner import Learner
from aurora_lit.traces.record import Trace
from benchmarks.learner_step import Deployment, record


class Domain:
    """The traces of one kind of traffic."""

    def __init__(self, name: str, traces: list[Trace], config: AuroraConfig) -> None:
        """Answers in a loop are left out, as the learner does."""
        self.name = name
        traces = [t for t in traces if not is_looping(t, max_repeated_share=config.learn.max_repeated_share)]
        self.held_out, self._traffic = traces[::6], [trace for i, trace in enumerate(traces) if i % 6]
        random.Random(config.learn.seed).shuffle(self._traffic)

    def traffic(self) -> Iterator[Trace]:
        """Its requests without end; those that come again have new names."""
        for turn in range(1 << 30):
            for trace in self._traffic:
                yield dataclasses.replace(trace, request_id=f"{trace.request_id}-{turn}")


def adapt(
    deployment: Deployment, domains: list[Domain], *, seconds: float, requests_per_processor_s: float
) -> Iterator[tuple[str, Learner, int, dict[str, float]]]:
    """Yield at the start and after each domain: its name, the learner, live positions, and accepted lengths."""
    config, learner, live = deployment.config, deployment.learner(), 0
    with tempfile.TemporaryDirectory(dir=deployment.folder) as folder:
        batcher = make_batcher(config, deployment.target_head, Path(folder))
        yield "", learner, live, _accepted_lengths(learner, deployment, domains)
        for domain in domains:
            spent_s, sent, traffic = 0.0, 0, domain.traffic()
            while spent_s < seconds:
                began_s = time.process_time()
                while sent <= spent_s * requests_per_processor_s + 4:
                    batcher.add(learner.controller.assign_domain(next(traffic)))
                    sent += 1
                batch = batcher.next_batch(oldest_fresh=0)
                assert batch is not None, "there is traffic without end"
                learner.update(batch)
                live += int((batch.traces.weight_BT > 0)[batch.live_B].sum())
                spent_s += time.process_time() - began_s
            yield domain.name, learner, live, _accepted_lengths(learner, deployment, domains)


@torch.no_grad()
def _accepted_lengths(learner: Learner, deployment: Deployment, domains: list[Domain]) -> dict[str, float]:
    with learner.averaged() as module, learner.fabric.autocast():
        scorer = RoundScorer(module, deployment.target_head, batch_positions=deployment.config.learn.batch_positions)
        return {
            domain.name: sum(scorer.score(domain.held_out), start=RoundTotals()).accepted_length for domain in domains
        }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="one file for each domain, in order")
    parser.add_argument("--continued", nargs="*", default=[], help="names of files whose prompts are continued as text")
    parser.add_argument("--limit", type=int, default=420, help="prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=112)
    parser.add_argument("--seconds", type=float, default=30.0, help="processor seconds of steps for each domain")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--share", type=float, default=0.056, help="processor seconds of steps in a second")
    parser.add_argument("--traces", type=Path, required=True, help="folder that keeps the traces")
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    args = parser.parse_args()
    config = load_config(None, args.overrides)
    for path in args.prompts:
        record(
            config,
            args.traces / path.stem,
            [path],
            limit=args.limit,
            max_tokens=args.max_tokens,
            temperatures=[0.0],
            continued=path.name in args.continued,
        )
    torch.manual_seed(config.learn.seed)
    domains = [Domain(path.stem, list(read_traces(args.traces / path.stem)), config) for path in args.prompts]
    table = Table(title="accepted length on held-out requests")
    for column in ("after", "steps", "positions", "live", *(f"{d.name} ({len(d.held_out)})" for d in domains)):
        table.add_column(column, justify="left" if column == "after" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        found = adapt(
            Deployment(config, Path(scratch)),
            domains,
            seconds=args.seconds,
            requests_per_processor_s=args.rate / args.share,
        )
        for after, learner, live, lengths in found:
            counts = (learner.steps, learner.positions, live)
            table.add_row(after or "start", *map(str, counts), *(f"{lengths[d.name]:.3f}" for d in domains))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
