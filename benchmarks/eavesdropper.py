"""How well prompts are told apart by someone who sees only sizes and times of the messages of encrypted streams.

    python benchmarks/eavesdropper.py --prompts chat.jsonl --repeats 6
    python benchmarks/eavesdropper.py --prompts chat.jsonl --interval-ms 200 --padding 1024 -- target.precision=bf16

Every prompt is asked several times, as a stream, at temperature 0.3 and with other seeds, in four ways: with messages
as rounds make them (off), on a clock (interval), with filled chunks (padding), and with both. Of each message of the
response its size and its time of arrival are kept, which TLS does not hide, and nothing else.

The attack: each stream is compared with all others of its way, and gets the prompt that most of its three nearest ones
have. Two streams are as far from each other as the sizes of their messages (or the times between them) differ, message
by message, together with their number and their sum. Every such value is scaled by its standard deviation over all
streams. The attacker thus knows the prompts that may be asked, and has seen each of them answered before. A better one
may tell more than the table says. The size of the request, which also tells prompts apart, is not looked at.

The prefix cache is off, so that repeating a prompt does not show in the time of its first message; so is the learner.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.server_process import free_port, running_server
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import read_prompts

_OVERRIDES = ("learn.enabled=false", "engine.prefix_cache=false")
_TIMEOUT_S = 600.0
_NEIGHBOURS = 3
VIEWS = ("sizes", "times", "both")


class Arm(NamedTuple):
    """How streams are sent."""

    name: str
    on_clock: bool
    padded: bool


ARMS = (
    Arm("off", False, False),
    Arm("interval", True, False),
    Arm("padding", False, True),
    Arm("both", True, True),
)


class Seen(NamedTuple):
    """What an eavesdropper sees of one stream."""

    sizes_bytes: list[int]
    """Of each message, in order."""
    gaps_s: list[float]
    """Time before each message: since the one before it, or since the request."""


def listen(port: int, prompt: str, *, padded: bool, max_tokens: int, temperature: float, seed: int) -> Seen:
    """Ask, and see the messages of the answer: HTTP chunks, each of which TLS would send as a record of its own."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_obfuscation": padded},
    }
    seen = Seen([], [])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        before_s = time.monotonic()
        response = connection.getresponse()
        if response.status != 200:
            raise AuroraError(f"the server answered {response.status}: {response.read().decode()}")
        while message := response.read1(1 << 20):
            now_s = time.monotonic()
            seen.sizes_bytes.append(len(message))
            seen.gaps_s.append(now_s - before_s)
            before_s = now_s
    finally:
        connection.close()
    return seen


def distances(seen: Sequence[Seen], view: str, *, first: int) -> np.ndarray:
    """How far each of N streams is from each other one, [N, N].

    view: one of VIEWS. first: number of messages, from the start, that are compared one by one.
    """
    if view == "both":
        return distances(seen, "sizes", first=first) + distances(seen, "times", first=first)
    rows = []
    for stream in seen:
        values = list(map(float, stream.sizes_bytes if view == "sizes" else stream.gaps_s))
        rows.append([*values[:first], *[0.0] * (first - len(values)), float(len(values)), sum(values)])
    features_NC = np.array(rows)
    deviation_C = features_NC.std(0)
    scaled_NC = (features_NC - features_NC.mean(0)) / np.where(deviation_C > 0, deviation_C, 1.0)
    return np.stack([np.abs(scaled_NC - row_C).sum(1) for row_C in scaled_NC])


def share_recognised(seen: Sequence[Seen], prompts: Sequence[int], view: str, *, first: int = 64) -> float:
    """Share of the streams whose prompt is found from the other streams; `prompts`: that of each stream."""
    found = 0
    distances_NN = distances(seen, view, first=first)
    np.fill_diagonal(distances_NN, np.inf)
    for own, distances_N in zip(prompts, distances_NN, strict=True):
        # Counter keeps the order of insertion, so of prompts with equally many votes the nearest one is taken.
        votes = Counter(prompts[place] for place in np.argsort(distances_N, kind="stable")[:_NEIGHBOURS])
        found += votes.most_common(1)[0][0] == own
    return found / len(prompts)


def measure(port: int, prompts: Sequence[str], arms: Sequence[Arm], options: Any) -> dict[str, list[tuple[int, Seen]]]:
    """For each arm the number of the prompt and what was seen, for all streams; the arms take turns."""
    rng = random.Random(0)
    found: dict[str, list[tuple[int, Seen]]] = {arm.name: [] for arm in arms}
    how = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    for number, prompt in enumerate(prompts):  # not counted: caches fill, and costs are learned
        listen(port, prompt, padded=False, seed=number, **how)
    for repeat in range(options.repeats):
        turns = [(number, arm) for number in range(len(prompts)) for arm in arms]
        rng.shuffle(turns)
        for number, arm in turns:
            seed = rng.randrange(1 << 31)
            found[arm.name].append((number, listen(port, prompts[number], padded=arm.padded, seed=seed, **how)))
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a prompt file; its first prompts are asked")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=6, help="streams of each prompt and arm")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-prompt-characters", type=int, default=1000)
    parser.add_argument("--first", type=int, default=64, help="messages of a stream that are compared one by one")
    parser.add_argument("--interval-ms", type=float, default=100.0, help="server.stream_interval_ms of two arms")
    parser.add_argument("--padding", type=int, default=512, help="server.stream_padding of two arms")
    parser.add_argument("--out", type=Path, help="also write the table, and all that was seen, as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    texts = [prompt.messages[0] for prompt in read_prompts(options.prompts)]
    prompts = [text for text in texts if len(text) <= options.max_prompt_characters][: options.num_prompts]
    if len(prompts) < options.num_prompts:
        raise AuroraError(f"{options.prompts} has {len(prompts)} prompts that are short enough; ask for fewer")
    found: dict[str, list[tuple[int, Seen]]] = {}
    for on_clock in (False, True):
        settings = [f"server.stream_padding={options.padding}"]
        settings += [f"server.stream_interval_ms={options.interval_ms}"] * on_clock
        config = load_config(None, [*_OVERRIDES, *settings, *options.overrides])
        config = dataclasses.replace(config, server=dataclasses.replace(config.server, port=free_port()))
        with running_server(config, Path(options.out or "eavesdropper").with_suffix(".log")):
            arms = [arm for arm in ARMS if arm.on_clock == on_clock]
            found |= measure(config.server.port, prompts, arms, options)
    table = Table("streams", "messages", "bytes", "first message, ms", "whole, ms", *(f"told by {v}" for v in VIEWS))
    rows = []
    for arm in ARMS:
        numbers, seen = [number for number, _ in found[arm.name]], [stream for _, stream in found[arm.name]]
        row: dict[str, Any] = {
            "messages": statistics.mean(len(stream.sizes_bytes) for stream in seen),
            "bytes": statistics.mean(sum(stream.sizes_bytes) for stream in seen),
            "first_ms": 1000 * statistics.mean(stream.gaps_s[0] for stream in seen),
            "whole_ms": 1000 * statistics.mean(sum(stream.gaps_s) for stream in seen),
            **{view: share_recognised(seen, numbers, view, first=options.first) for view in VIEWS},
        }
        rows.append({"streams": arm.name, **row})
        cells = [f"{row[key]:.0f}" for key in ("messages", "bytes", "first_ms", "whole_ms")]
        table.add_row(arm.name, *cells, *(f"{row[view]:.0%}" for view in VIEWS))
    report_console().print(table)
    print(f"{len(prompts)} prompts, {options.repeats} streams each and way; by chance {1 / len(prompts):.0%}")
    if options.out:
        listed = {name: [[number, *stream] for number, stream in streams] for name, streams in found.items()}
        options.out.write_text(json.dumps({"rows": rows, "seen": listed}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
