"""How close plain decoding comes to the memory's bandwidth: to decode a token, every weight is read once.

    python benchmarks/bandwidth.py

For each precision, two things are timed in turn: a forward pass of one token, all logits included, and reading as many
bytes without any other work (the sum of a buffer of that size, on huge pages as the weights are, with all threads).
Each is run a few times untimed before it is timed, so that the caches help both alike. Prints medians, and the
quartiles of reading time / pass time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.config import load_config
from aurora_lit.kernels import huge_pages
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.machine import use_threads
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.models.source import find_target

CONTEXT = 100
UNTIMED = 8


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    arguments = parser.parse_args()
    config = load_config(None, arguments.overrides)
    use_threads(config.engine.threads)
    folder = find_target(config)
    table = Table(title=f"a forward pass of one token, {torch.get_num_threads()} threads")
    for column in ("precision", "weights, MB", "reading alone, GB/s", "the pass, ms", "share of bandwidth"):
        table.add_column(column, justify="right")
    for precision in arguments.precisions:
        target = load_target(folder, precision=precision)
        weights = weight_bytes(target)
        buffer = huge_pages.empty(weights // 4, torch.float32).fill_(1.0)
        step = one_token(target)
        pairs = [(seconds(buffer.sum), seconds(step)) for _ in range(arguments.repeats)]
        read_s, pass_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        low, middle, high = np.percentile([read_s / taken for _, taken in pairs], [25, 50, 75])
        table.add_row(
            precision,
            f"{weights / 1e6:.0f}",
            f"{weights / read_s / 1e9:.1f}",
            f"{pass_s * 1e3:.2f}",
            f"{middle:.0%} ({low:.0%} to {high:.0%})",
        )
    Console(width=120).print(table)


def weight_bytes(target: Target) -> int:
    """Bytes of all packed linear layers, the head included; the embedding adds one row, which is negligible."""
    packed = [module.packed for module in target.in_torch.model.modules() if isinstance(module, PackedLinear)]
    return sum(weight.numel() * weight.element_size() for weight in packed)


def one_token(target: Target) -> Callable[[], object]:
    """A function that decodes one token after CONTEXT tokens, always the same one."""
    slots = target.make_kv_cache(num_slots=1, capacity=CONTEXT + 1)
    ids_11, zero = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    start = torch.full((1,), CONTEXT)
    return lambda: target.logits(target(ids_11, kv_cache=slots, slots_B=zero, starts_B=start)[1])


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one call, after UNTIMED untimed calls."""
    for _ in range(UNTIMED):
        action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
