"""What a look-up and an insertion of the traffic memory take when it is full, and how much memory it holds.

    python benchmarks/look_ups.py
    python benchmarks/look_ups.py --capacity-mb 64 --rows 8 --answers 20000

Answers are made of phrases that come again, phrases frequent by Zipf's law, so that the index has short chains and very
long ones. Look-ups for `--rows` sequences go in one call, as in a round, while 96 MB of other memory are read in
between, as a target's weights are: caches hold what they hold in a server.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import torch
from rich.table import Table

from aurora_lit.bench.reporting import report_console
from aurora_lit.kernels import native
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import DOMAIN_BITS, LookUp, SuffixMemory, look_up

_VOCABULARY, _PHRASES, _WEIGHTS_BYTES = 49_152, 4_000, 96 << 20


def answers(rng: random.Random) -> Iterator[list[int]]:
    """Answers of 60 to 200 tokens, without end."""
    phrases = [[rng.randrange(_VOCABULARY) for _ in range(rng.randint(2, 12))] for _ in range(_PHRASES)]
    weights = [1 / (rank + 1) for rank in range(_PHRASES)]
    while True:
        length, answer = rng.randint(60, 200), list[int]()
        while len(answer) < length:
            answer += rng.choices(phrases, weights)[0]
        yield answer[:length]


def time_look_ups(memory: SuffixMemory, source: Iterator[list[int]], *, rows: int, calls: int, part: int) -> np.ndarray:
    """Microseconds of each call, with a displaced cache."""
    weights_N = torch.ones(_WEIGHTS_BYTES // 4)
    reliability = CopyReliability()
    tokens_SL = torch.zeros(rows, 1024, dtype=torch.int64)
    found = []
    for _ in range(calls):
        lengths = []
        for slot in range(rows):
            answer = next(source)
            tokens_SL[slot, : len(answer)] = torch.tensor(answer)
            lengths.append(len(answer))
        asked = LookUp(
            slots=list(range(rows)),
            lengths=lengths,
            most=[15] * rows,
            parts=[part] * rows,
            tables=[reliability.table(sampled=False)] * rows,
            rate_RC=reliability.rate_RC,
            least=0.05,
        )
        weights_N.sum()
        began = time.perf_counter()
        look_up(tokens_SL, asked, memory=memory)
        found.append(1e6 * (time.perf_counter() - began))
    return np.array(found)


def main() -> int:
    """Fill a memory, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity-mb", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--calls", type=int, default=1_000)
    options = parser.parse_args()
    if native.library() is None:
        print("there is no traffic memory without the native kernels", file=sys.stderr)
        return 1
    source, part, process = answers(random.Random(0)), 1 << DOMAIN_BITS, psutil.Process()
    batch = [next(source) for _ in range(2000)]
    before = process.memory_info().rss
    memory = SuffixMemory(options.capacity_mb << 20)
    resident, inserted, seconds = list[str](), 0, 0.0
    for number in range(options.answers):
        answer = batch[number % len(batch)] if number < len(batch) else next(source)
        began = time.perf_counter()
        memory.insert_answer(answer, answer=len(answer), part=part)
        seconds += time.perf_counter() - began
        inserted += len(answer)
        if (number + 1) % max(1, options.answers // 4) == 0:
            resident.append(f"{(process.memory_info().rss - before) >> 20}")
    held, forgotten = memory.counts
    times = time_look_ups(memory, source, rows=options.rows, calls=options.calls, part=part)
    table = Table(title=f"{held:,} tokens held, {forgotten:,} forgotten")
    table.add_column("question")
    table.add_column("figure")
    median, p99 = np.percentile(times, (50, 99))
    table.add_row(f"a look-up for {options.rows} rows, median and 99th percentile", f"{median:.0f}, {p99:.0f} µs")
    table.add_row("the same, a row", f"{median / options.rows:.1f}, {p99 / options.rows:.1f} µs")
    table.add_row("inserting, a token", f"{1e6 * seconds / inserted:.2f} µs")
    table.add_row(f"resident after each quarter of {options.answers:,} answers, MiB", ", ".join(resident))
    report_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
