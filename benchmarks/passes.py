"""What a forward pass of the target costs: by precision, number of sequences and query length, and part by part.

    python benchmarks/passes.py --config qwen2.5-coder-0.5b --precisions auto int4 --rows 1 8 --widths 1 2 3 5 8 16

Decoding passes follow `--context` cached tokens, and the greedy choice of every position is included. A prompt is read
from its start in one pass, or in chunks of `--chunk` tokens, without a choice. Milliseconds are medians; of the parts,
products and attention are those of the first thread, the head is the greedy choice, and the rest is the remainder:
norms, activations, synchronisation, embedding, calls. Each precision is measured alone, as it would be served: two
would take the processor's cache from each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aurora_lit.config import load_config
from aurora_lit.kernels.decoder import PASS_PARTS
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.loading import load_target
from aurora_lit.models.native_target import NativeTarget
from aurora_lit.models.source import find_target

ROUNDS = 3  # the shapes take turns
SHOWN_PARTS = (*PASS_PARTS[:2], "head")


@dataclass(frozen=True)
class Shape:
    """`rows` sequences that compute `width` positions each after `start` cached ones, at most `chunk` in a pass."""

    rows: int
    width: int
    start: int
    is_prompt: bool = False
    chunk: int = 1 << 30

    def __str__(self) -> str:
        return f"prompt of {self.width}" if self.is_prompt else f"{self.rows} x {self.width}"


class Passes:
    """Runs passes of one target and times their parts."""

    def __init__(self, target: Target, *, rows: int, capacity: int) -> None:
        self._target = target
        self._kv_cache: KVCache = target.make_kv_cache(num_slots=rows, capacity=capacity)
        for states in (*self._kv_cache.keys_SGCQPE, *self._kv_cache.values_SGMDE):
            states.normal_()  # what was never written is read from one page of zeros
        self._nanoseconds = torch.zeros(len(PASS_PARTS), dtype=torch.int64)
        if isinstance(target, NativeTarget):
            target.decoder.nanoseconds = self._nanoseconds
        torch.manual_seed(0)

    def seconds(self, shape: Shape) -> dict[str, float]:
        """The whole pass (`total`) and its parts; random tokens."""
        ids_BT = torch.randint(0, self._target.vocab_size, (shape.rows, shape.width))
        slots_B = torch.arange(shape.rows)
        self._nanoseconds.zero_()
        started = time.perf_counter()
        for ids_BC, at in zip(
            ids_BT.split(shape.chunk, dim=1), range(shape.start, shape.start + shape.width, shape.chunk), strict=True
        ):
            _, last_BTH = self._target(
                ids_BC,
                kv_cache=self._kv_cache,
                slots_B=slots_B,
                starts_B=torch.full((shape.rows,), at),
                num_prompts=shape.rows if shape.is_prompt else 0,
            )
        forwarded = time.perf_counter()
        if not shape.is_prompt:
            self._target.greedy_tokens(last_BTH)
        ended = time.perf_counter()
        parts = dict(zip(PASS_PARTS[:2], (self._nanoseconds[:2] / 1e9).tolist(), strict=True))
        return {"total": ended - started, **parts, "head": ended - forwarded}


@torch.inference_mode()
def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="file or name of the deployment")
    parser.add_argument("--precisions", nargs="+", help="default: the deployment's own")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--widths", nargs="*", type=int, default=[1, 2, 3, 4, 5, 8, 16])
    parser.add_argument("--prompts", nargs="*", type=int, default=[64, 256, 1000, 2000])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and precision")
    parser.add_argument("overrides", nargs="*", help="settings, key=value, after --")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    folder = find_target(config)
    shapes = [Shape(rows, width, arguments.context) for rows in arguments.rows for width in arguments.widths]
    shapes += [Shape(1, length, 0, is_prompt=True, chunk=arguments.chunk) for length in arguments.prompts]
    rows, capacity = max(shape.rows for shape in shapes), max(shape.start + shape.width for shape in shapes)
    table = Table(title=f"ms a pass; {torch.get_num_threads()} threads; decoding after {arguments.context} tokens")
    for column in ("precision", "pass", "total", *SHOWN_PARTS, "rest", "ms a token"):
        table.add_column(column, justify="right")
    for name in arguments.precisions or [config.target.precision]:
        passes = Passes(load_target(folder, precision=name), rows=rows, capacity=capacity)
        measured: dict[Shape, list[dict[str, float]]] = defaultdict(list)
        for _ in range(ROUNDS):
            for shape in shapes:
                passes.seconds(shape)
                ends = time.perf_counter() + arguments.seconds / ROUNDS
                while time.perf_counter() < ends or not measured[shape]:
                    measured[shape].append(passes.seconds(shape))
        for shape in shapes:
            median = {
                part: statistics.median(each[part] for each in measured[shape]) * 1e3
                for part in ("total", *SHOWN_PARTS)
            }
            parts = [median[part] for part in SHOWN_PARTS]
            cells = [median["total"], *parts, median["total"] - sum(parts)]
            table.add_row(
                name,
                str(shape),
                *(f"{cell:.2f}" for cell in cells),
                f"{median['total'] / (shape.rows * shape.width):.3f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
