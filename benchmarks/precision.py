"""What each `target.precision` costs in accuracy and in time.

    python benchmarks/precision.py --prompts FILE... --limit 20

The model reads the prompts in every precision. The distribution at each position is compared with that of fp32: the
Kullback-Leibler divergence in nats, and how often the likeliest token is the same. Forward passes of one sequence are
timed in turn: of one token, of five (four proposals are verified) and of 128 (a prompt is read), logits included.
Positions of prompts have an arithmetic of their own, so that all are computed once as such and once as decoding ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.prompts import load_prompts
from aurora_lit.config import load_config
from aurora_lit.machine import use_threads
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.models.source import find_target
from aurora_lit.serve.worker.load_models import load_tokenizer

WIDTHS = (1, 5, 128)
CONTEXT = 150


@torch.inference_mode()
def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20, help="prompts taken from each file")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    arguments = parser.parse_args()
    config = load_config(None, arguments.overrides)
    use_threads(config.engine.threads)
    folder = find_target(config)
    prompts = load_prompts(
        arguments.prompts, limit=arguments.limit, tokenizer=load_tokenizer(config), max_prompt_tokens=512
    )
    targets = {name: load_target(folder, precision=name) for name in ["fp32", *arguments.precisions]}
    exact = targets["fp32"]
    kinds = [(name, as_prompt) for name in targets for as_prompt in (False, True)]
    divergence, same, positions = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0), 0
    for prompt in prompts:
        ids_1T = torch.tensor([prompt.token_ids])
        logp_TV = log_probabilities(exact, ids_1T, as_prompt=False)
        positions += len(logp_TV)
        for name, as_prompt in kinds:
            found_TV = log_probabilities(targets[name], ids_1T, as_prompt=as_prompt)
            divergence[name, as_prompt] += float((logp_TV.exp() * (logp_TV - found_TV)).sum())
            same[name, as_prompt] += int((logp_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    times = time_passes(targets, repeats=arguments.repeats)
    table = Table(title=f"against fp32, over {positions:,} positions; passes: median of {arguments.repeats}")
    errors = [f"{what} {kind}" for kind in ("decoding", "of a prompt") for what in ("divergence, nats,", "same token,")]
    for column in ("precision", *errors, *(f"pass of {width}, ms" for width in WIDTHS)):
        table.add_column(column, justify="right")
    for name in arguments.precisions:
        row = []
        for kind in ((name, False), (name, True)):
            row += [f"{divergence[kind] / positions:.6f}", f"{same[kind] / positions:.2%}"]
        table.add_row(name, *row, *(f"{statistics.median(times[name][width]) * 1e3:.2f}" for width in WIDTHS))
    Console(width=120).print(table)


def log_probabilities(target: Target, ids_1T: torch.Tensor, *, as_prompt: bool) -> torch.Tensor:
    """The target's log-probabilities after each token [T, V], computed as positions of a prompt or as decoding ones."""
    slots = target.make_kv_cache(num_slots=1, capacity=ids_1T.shape[1])
    zero = torch.zeros(1, dtype=torch.int64)
    _, last_1TH = target(ids_1T, kv_cache=slots, slots_B=zero, starts_B=zero, num_prompts=int(as_prompt))
    return target.logits(last_1TH)[0].log_softmax(-1)


def time_passes(targets: dict[str, Target], *, repeats: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of forward passes after CONTEXT tokens, by precision and query length; the precisions take turns."""
    seconds: dict[str, dict[int, list[float]]] = {name: {width: [] for width in WIDTHS} for name in targets}
    slots = {
        name: target.make_kv_cache(num_slots=1, capacity=CONTEXT + max(WIDTHS)) for name, target in targets.items()
    }
    zero, start = torch.zeros(1, dtype=torch.int64), torch.full((1,), CONTEXT)
    for width in WIDTHS:
        ids_1T = torch.arange(width)[None]
        for _ in range(repeats):
            for name, target in targets.items():
                started = time.perf_counter()
                is_prompt = width == max(WIDTHS)
                _, last_1TH = target(
                    ids_1T, kv_cache=slots[name], slots_B=zero, starts_B=start, num_prompts=int(is_prompt)
                )
                target.logits(last_1TH[:, -5:])
                seconds[name][width].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
