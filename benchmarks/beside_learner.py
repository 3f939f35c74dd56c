"""What a learner costs the requests that are served beside it: one server, its learner stopped and let go in turn.

    python -m benchmarks.beside_learner --prompts traffic.jsonl --config qwen2.5-coder-0.5b

--clients clients send the file's prompts without a pause, every second one greedy, all of them recorded and learned
from. The learner is stopped (SIGSTOP) in every second window of --seconds; a window's first two seconds do not count.
Printed are tokens a second and the gaps between two pieces of a running answer with the learner over those without, as
means of the pairs of neighbouring windows with 95 % intervals, and the medians of both.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aurora_lit.bench.load import LOOPBACK, Answer, ask, body_of, interval, sending, status
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config
from aurora_lit.learn.pretrain.prompts import read_prompts

from .live_learning import learner_status

_SETTLES_S = 2.0


class Window(NamedTuple):
    """A time in which the learner ran or did not. Times are those of the monotonic clock."""

    learns: bool
    begin_s: float
    end_s: float
    tokens_per_s: float

    def gaps_ms(self, answers: list[Answer]) -> list[float]:
        """Between two pieces of an answer that both came in this window, ms."""
        return [
            1e3 * (after - before)
            for answer in answers
            for before, after in itertools.pairwise(answer.pieces_s)
            if self.begin_s <= before and after < self.end_s
        ]


def generated_tokens(url: str) -> float:
    """The server's own counter."""
    with LOOPBACK.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    return sum(float(each) for each in re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", text, flags=re.MULTILINE))


def watch(url: str, learner: int, *, learns: bool, seconds: float) -> Window:
    """One window."""
    os.kill(learner, signal.SIGCONT if learns else signal.SIGSTOP)
    time.sleep(_SETTLES_S)
    begin_s, before = time.monotonic(), generated_tokens(url)
    time.sleep(seconds - _SETTLES_S)
    end_s, after = time.monotonic(), generated_tokens(url)
    return Window(learns, begin_s, end_s, (after - before) / (end_s - begin_s))


def compare(windows: list[Window], answers: list[Answer]) -> dict[str, tuple[float, float, tuple[float, float, float]]]:
    """For each figure: its median with the learner, without it, and the ratio's mean and interval over the pairs."""
    figures = {
        "tokens/s": [window.tokens_per_s for window in windows],
        **{
            f"gap p{percent}, ms": [float(np.percentile(window.gaps_ms(answers), percent)) for window in windows]
            for percent in (50, 99)
        },
    }
    found = {}
    for name, values in figures.items():
        on, off = (
            [value for value, window in zip(values, windows, strict=True) if window.learns is learns]
            for learns in (True, False)
        )
        ratios = [beside / alone for beside, alone in zip(on, off, strict=True)]
        found[name] = (float(np.median(on)), float(np.median(off)), interval(ratios))
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL file")
    parser.add_argument("--config", type=Path, help="a preset's name or a YAML file; without it that of SmolLM2")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("overrides", nargs="*", help="key=value, after `--`")
    options = parser.parse_args()
    prompts = itertools.cycle(read_prompts(options.prompts))
    bodies = (
        body_of(prompt, stream=True, max_tokens=options.max_tokens, temperature=0.0 if number % 2 else None)
        for number, prompt in enumerate(prompts)
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(options.config, [f"checkpoint.dir={scratch}", *options.overrides])
        config = replace(config, server=replace(config.server, port=free_port()))
        with running_server(config, Path(scratch) / "log") as url:
            before = learner_status(url)
            learner = status(url)["learner"]["pid"]
            with sending(functools.partial(ask, url), bodies, clients=options.clients) as running:
                running.wait(2 * options.seconds)
                windows = [
                    watch(url, learner, learns=learns, seconds=options.seconds)
                    for pair in range(options.pairs)
                    for learns in ((True, False) if pair % 2 else (False, True))
                ]
                os.kill(learner, signal.SIGCONT)
            after = learner_status(url)
    for name, (on, off, (mean, low, high)) in compare(windows, running.answers).items():
        print(f"{name}: {on:.1f} and {off:.1f} without, {mean:.3f} ({low:.3f}-{high:.3f})")
    print(f"{after['positions'] - before['positions']} positions, {after['published'] - before['published']} published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
