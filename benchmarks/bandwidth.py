"""How close decoding comes to the memory's bandwidth: to decode a token, every weight is read once.

    python benchmarks/bandwidth.py --config qwen2.5-coder-0.5b --columns 1 5

For each precision and number of columns (query positions of one sequence), two things are timed in turn: a forward
pass, all logits included, and reading as many bytes without any other work (the sum of a buffer of that size, on huge
pages as the weights are, with all threads). Each is run a few times untimed before it is timed, so that the caches help
both alike. Prints medians: the bandwidth of plain reading, the pass, and reading time / the time of the pass, and of
its products alone, the head's among them, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.config import load_config
from aurora_lit.kernels import huge_pages
from aurora_lit.kernels.decoder import PASS_PARTS
from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.machine import use_threads
from aurora_lit.models.loading import load_target
from aurora_lit.models.native_target import NativeTarget
from aurora_lit.models.source import find_target

CONTEXT = 100
UNTIMED = 8


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="file or name of the deployment")
    parser.add_argument("--precisions", nargs="+", help="default: the deployment's own")
    parser.add_argument("--columns", nargs="+", type=int, default=[1, 2, 3, 5])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    use_threads(config.engine.threads)
    folder = find_target(config)
    table = Table(title=f"forward passes of one sequence, {torch.get_num_threads()} threads")
    for column in ("precision", "weights, MB", "columns", "plain read, GB/s", "pass, ms", "pass", "products and head"):
        table.add_column(column, justify="right")
    for precision in arguments.precisions or [config.target.precision]:
        target = load_target(folder, precision=precision)
        assert isinstance(target, NativeTarget), "without native kernels there are no packed weights"
        weights = weight_bytes(target)
        buffer = huge_pages.empty(weights // 4, torch.float32).fill_(1.0)
        for columns in arguments.columns:
            step = pass_of(target, columns)
            pairs = [(seconds(buffer.sum), seconds(step), *step()) for _ in range(arguments.repeats)]
            read_s, pass_s = (statistics.median(side) for side in list(zip(*pairs, strict=True))[:2])
            of_pass = share([read / whole for read, whole, *_ in pairs])
            of_products = share([read / (products + head) for read, _, products, head in pairs])
            cells = (precision, f"{weights / 1e6:.0f}", columns, f"{weights / read_s / 1e9:.1f}", f"{pass_s * 1e3:.2f}")
            table.add_row(*map(str, cells), of_pass, of_products)
    Console(width=120).print(table)


def share(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.0%} ({low:.0%} to {high:.0%})"


def weight_bytes(target: NativeTarget) -> int:
    """Bytes of all packed linear layers, the head included; the embedding adds one row, which is negligible."""
    packed = [module.packed for module in target.in_torch.model.modules() if isinstance(module, PackedLinear)]
    return sum(weight.numel() * weight.element_size() for weight in packed)


def pass_of(target: NativeTarget, columns: int) -> Callable[[], tuple[float, float]]:
    """A function that computes so many columns after CONTEXT tokens, always the same, and returns the seconds of the
    layers' products in the first thread and of the head."""
    slots = target.make_kv_cache(num_slots=1, capacity=CONTEXT + columns)
    ids_1C, zero = torch.zeros(1, columns, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    start = torch.full((1,), CONTEXT)
    nanoseconds = torch.zeros(len(PASS_PARTS), dtype=torch.int64)
    target.decoder.nanoseconds = nanoseconds

    def run() -> tuple[float, float]:
        nanoseconds.zero_()
        last_1CH = target(ids_1C, kv_cache=slots, slots_B=zero, starts_B=start)[1]
        began = time.perf_counter()
        target.logits(last_1CH)
        return float(nanoseconds[PASS_PARTS.index("products")]) / 1e9, time.perf_counter() - began

    return run


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one call, after UNTIMED untimed calls."""
    for _ in range(UNTIMED):
        action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
