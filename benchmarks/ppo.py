"""Does PPO over all actions teach the draft as much as the LK loss? Deleted once it is answered.

    python -m benchmarks.ablation --phases train/billing.jsonl train/support.jsonl --requests 400 --arms static \\
        --measure test/billing.jsonl test/support.jsonl --max-tokens 80 --out streams/templates
    python -m benchmarks.ppo streams/templates streams/code --seeds 0 1 2 3 4 --every 5 --out ppo.json

Each stream is a recording of `benchmarks.ablation`. With each seed one of --every requests is learned from, phase by
phase, without gate and detector, each position once as new traffic and maybe again as replay beside it. The arms:

lk            the LK loss
v             PPO with the value head (without V it is LK where q_old = q: tests compare the gradients)
lk-rest       the LK loss, and after each phase traffic rests, so that positions are used again, four times in the mean
none-rest     v, used again at rest with q_old = q
clip-0-rest   PPO with V = 0, kept near the draft that the rest began with by PPO's clip
clip-rest     the same with V
tv-rest       the same with V and a region of total variation

Accepted length is tokens a round of the draft's chains on the measured requests and on --held-out of those that the
seed did not learn from. Ratios to `lk`, and of arms with a rest to `lk-rest` too, are paired by seed and request, with
95 % intervals from the ablation's bootstrap. Printed with them: how much of the target's probability the region
stopped, by q_old.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aurora_lit.bench.reporting import report_console
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.durable import replace_file
from aurora_lit.learn.offline.loop import blocks, read_traces
from aurora_lit.learn.offline.on_policy import RoundSimulator
from aurora_lit.learn.online.build import controller_for, load_head_and_draft, make_batcher, online_module
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.modules.losses.ppo import Q_RANGES
from aurora_lit.traces.record import Trace
from benchmarks.ablation import Rows, accepted_length, interval, length_ratio, phase_of, takes

ARMS: dict[str, dict[str, Any]] = {
    "lk": {},
    "v": {"ppo": True},
    "lk-rest": {},
    "none-rest": {"ppo": True, "region": None},
    "clip-0-rest": {"ppo": True, "credits_depth": False},
    "clip-rest": {"ppo": True},
    "tv-rest": {"ppo": True, "region": "tv"},
}
"""Changed `OnlineWeights`."""
_BLOCK = 8
"""Requests that come together."""


def run_arm(
    name: str, seed: int, *, config: AuroraConfig, head_and_draft: Any, learned: Sequence[Trace], held: Sequence[Trace]
) -> dict[str, Any]:
    """Learn in the order of the traces, then score: rounds by accepted tokens of each request, positions, seconds."""
    target_head, starting = head_and_draft
    torch.manual_seed(seed)
    module = online_module(config, copy.deepcopy(starting), target_head)
    module.online = replace(module.online, **ARMS[name])
    stopped_R2, started = torch.zeros(len(Q_RANGES), 2), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        learner = Learner(
            module, controller_for(config), Path(scratch) / "state", target_head=target_head, version=STARTING_VERSION
        )
        batcher = make_batcher(config, Path(scratch), seed=seed)

        def learn(*, rests: bool) -> None:
            while (rests or batcher.num_waiting) and (batch := batcher.next_batch()) is not None:
                report = learner.update(batch)
                if report is not None and batch.at_rest:
                    stopped_R2.add_(report.stats.stopped_R2)

        for _, phase in itertools.groupby(learned, key=lambda trace: phase_of(trace.request_id)):
            for block in blocks(phase, _BLOCK):
                for trace in block:
                    batcher.add(learner.controller.assign_domain(replace(trace, domain="")))
                learn(rests=False)
            if name.endswith("rest"):
                learn(rests=True)
        seconds, positions = time.process_time() - started, learner.positions
        with learner.fabric.autocast():
            rounds = RoundSimulator(module=learner.module.module).simulate_rounds(held, version=0)
    steps = module.num_steps
    return {
        "arm": name,
        "seed": seed,
        "counts": {t.request_id: torch.bincount(t.num_accepted_R.long(), minlength=steps + 1).tolist() for t in rounds},
        "positions": positions,
        "seconds": seconds,
        "stopped": stopped_R2.tolist(),
    }


def run_stream(folder: Path, options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run what `results` lacks of a stream, and add it there."""
    config = load_config(None, ["domain.detect=false", *options.overrides])
    torch.set_num_threads(options.threads)
    head_and_draft = load_head_and_draft(config)
    traffic, measured = list(read_traces(folder / "traffic")), list(read_traces(folder / "measure"))
    done = {(each["stream"], each["arm"], each["seed"]) for each in results}
    for seed, name in itertools.product(options.seeds, options.arms):
        if (folder.name, name, seed) in done:
            continue
        taken = [takes(trace.request_id, seed=seed, every=options.every) for trace in traffic]
        learned = [trace for trace, is_taken in zip(traffic, taken, strict=True) if is_taken]
        others = [trace for trace, is_taken in zip(traffic, taken, strict=True) if not is_taken]
        held = [*measured, *others[:: max(1, len(others) // max(1, options.held_out))]]
        result = run_arm(name, seed, config=config, head_and_draft=head_and_draft, learned=learned, held=held)
        results.append({"stream": folder.name, **result})
        replace_file(options.out, json.dumps(results).encode())


def rows_of(results: Sequence[dict[str, Any]]) -> Rows:
    """All requests of some results."""
    return Rows.of([(each["seed"], request, counts) for each in results for request, counts in each["counts"].items()])


def report(results: Sequence[dict[str, Any]]) -> None:
    """Print a line an arm and stream."""
    for stream in dict.fromkeys(each["stream"] for each in results):
        by_arm = {arm: [each for each in results if (each["stream"], each["arm"]) == (stream, arm)] for arm in ARMS}
        for arm, own in by_arm.items():
            line = f"{stream:12} {arm:12} " + (f"{accepted_length(rows_of(own).hist_NA):.3f}" if own else "-")
            for base in ("lk", "lk-rest"):
                seeds = {each["seed"] for each in own} & {each["seed"] for each in by_arm[base]}
                if not seeds or arm == base or (base == "lk-rest" and not arm.endswith("rest")):
                    continue
                rows, of_base = (
                    rows_of([each for each in side if each["seed"] in seeds]) for side in (own, by_arm[base])
                )
                low, high = interval(length_ratio, rows, of_base)
                ratio = length_ratio(rows.hist_NA, of_base.hist_NA)
                line += f"  over {base} {ratio:.4f} ({low:.4f} to {high:.4f})"
            if own:
                stopped_R2 = torch.tensor([each["stopped"] for each in own]).sum(0)
                shares = [f"{stopped / counted:.3f}" for stopped, counted in stopped_R2.tolist() if counted]
                line += f"  {sum(each['positions'] for each in own) / len(own):.0f} positions"
                line += f", {sum(each['seconds'] for each in own) / len(own):.1f} s"
                line += f", stopped by q_old {' '.join(shares)}" if shares else ""
            report_console().print(line, highlight=False, soft_wrap=True)


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", nargs="+", type=Path, help="folders of benchmarks.ablation")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--every", type=int, default=5, help="learn from one of so many requests")
    parser.add_argument("--held-out", type=int, default=100, help="requests of the traffic that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("ppo.json"), help="results; what is in it is not run again")
    parser.add_argument("overrides", nargs="*", help="key=value, after `--`")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    for folder in options.streams:
        run_stream(folder, options, results)
    report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
