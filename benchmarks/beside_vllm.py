"""What a learner beside vLLM brings, and what it costs. Servers are started before, as docs/results/vllm.md says.

    python -m benchmarks.beside_vllm learn --url http://127.0.0.1:8000 --traffic train.jsonl --held-out test.jsonl \\
        --held-out-prompts 32 --minutes 12 --clients 4 --out learned.json
    python -m benchmarks.beside_vllm texts --url http://127.0.0.1:8001 --held-out test.jsonl --against learned.json \\
        --out texts.json
    python -m benchmarks.beside_vllm overhead --on http://127.0.0.1:8000 --off http://127.0.0.1:8001 \\
        --prompts test.jsonl --clients 1 8 --pairs 30 --out overhead.json
    python -m benchmarks.beside_vllm swaps --url http://127.0.0.1:8000 --prompts test.jsonl --draft DRAFT \\
        --versions checkpoints/live --seconds 100 --out swaps.json

learn: the accepted length on held-out prompts (greedy, one client, `store: false`, so that nothing is learned of them),
before and after so many minutes of traffic, and whether any of their texts changed. overhead: two servers in turn,
each pair the same prompts, the order changing from pair to pair; the ratio of tokens a second, with the 95 % interval
of the paired ratios' mean, and the gaps between tokens. Accepted lengths are vLLM's own counters. Leaves out starting
servers.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import itertools
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_lit.bench.load import LOOPBACK, Answer, ask, chat, interval, percentile_ms, send_all, sending
from aurora_lit.drafts.checkpoint import load_draft, read_config
from aurora_lit.drafts.store import DraftStore
from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import read_prompts

MAX_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Counters:
    """vLLM's counters of speculation."""

    drafts: float
    accepted: float

    def accepted_length_since(self, before: Counters) -> float:
        """Tokens that a sequence got from a step with proposals, its own included."""
        return 1 + (self.accepted - before.accepted) / max(1.0, self.drafts - before.drafts)


def counters(url: str) -> Counters:
    """The counters' values now."""
    with LOOPBACK.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()

    def value(name: str) -> float:
        return sum(float(each) for each in re.findall(rf"^{name}{{.*}} (\S+)$", text, flags=re.MULTILINE))

    return Counters(
        drafts=value("vllm:spec_decode_num_drafts_total"), accepted=value("vllm:spec_decode_num_accepted_tokens_total")
    )


def held_out(url: str, messages: list[str]) -> dict[str, Any]:
    """Accepted length on held-out prompts at one client, and their texts."""
    before = counters(url)
    texts = [ask(url, chat(each, temperature=0, max_tokens=MAX_TOKENS, store=False)).text for each in messages]
    after = counters(url)
    return {
        "accepted_length": after.accepted_length_since(before),
        "rounds": after.drafts - before.drafts,
        "texts": texts,
    }


def learn(arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out prompts, traffic, held-out prompts again."""
    messages = [prompt.messages[0] for prompt in read_prompts(arguments.held_out)][: arguments.held_out_prompts]
    traffic = iter([prompt.messages[0] for prompt in read_prompts(arguments.traffic)])
    first = held_out(arguments.url, messages)
    windows, end = [], time.monotonic() + 60 * arguments.minutes
    window_start, window_counters = time.monotonic(), counters(arguments.url)

    def succeeds(message: str) -> bool:
        try:
            ask(arguments.url, chat(message, temperature=0, max_tokens=MAX_TOKENS))
        except (AuroraError, OSError, http.client.HTTPException):
            return False
        return True

    with sending(succeeds, traffic, clients=arguments.clients) as running:
        while running.wait(1) and time.monotonic() < end:
            if time.monotonic() - window_start >= 60:
                now = counters(arguments.url)
                windows.append(now.accepted_length_since(window_counters))
                window_start, window_counters = time.monotonic(), now
                print(f"minute {len(windows)}: accepted length {windows[-1]:.3f}", flush=True)
    last = held_out(arguments.url, messages)
    return {
        "before": {name: value for name, value in first.items() if name != "texts"},
        "after": {name: value for name, value in last.items() if name != "texts"},
        "ratio": last["accepted_length"] / first["accepted_length"],
        "held_out_prompts": len(messages),
        "texts_that_differ": sum(a != b for a, b in zip(first["texts"], last["texts"], strict=True)),
        "by_minute": windows,
        "requests": len(running.answers),
        "failed": running.answers.count(False),
        "texts": last["texts"],
    }


def texts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The held-out texts of a server, compared with those of another report."""
    messages = [prompt.messages[0] for prompt in read_prompts(arguments.held_out)][: arguments.held_out_prompts]
    found = held_out(arguments.url, messages)
    if arguments.against is None:
        return found
    other = json.loads(arguments.against.read_text())["texts"]
    return {**found, "texts_that_differ": sum(a != b for a, b in zip(found["texts"], other, strict=True))}


def stream(url: str, message: str) -> Answer:
    """A streamed answer of full length. Raises AuroraError if it fails: a failed request would be a fast one."""
    return ask(url, chat(message, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, stream=True))


def block(url: str, messages: list[str], clients: int) -> tuple[float, list[float]]:
    """Tokens a second of these prompts, and the gaps between their pieces of text, in seconds."""
    began = time.monotonic()
    answers = send_all(functools.partial(stream, url), messages, clients=clients)
    seconds = time.monotonic() - began
    gaps = [gap for answer in answers for gap in answer.pauses_s]
    return sum(answer.tokens for answer in answers) / seconds, gaps


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two servers in turn."""
    messages = iter([prompt.messages[0] for prompt in read_prompts(arguments.prompts)])
    urls = {"on": arguments.on, "off": arguments.off}
    report: dict[str, Any] = {}
    for clients in arguments.clients:
        for url in urls.values():
            block(url, [next(messages) for _ in range(clients)], clients)
        speeds: dict[str, list[float]] = {"on": [], "off": []}
        gaps: dict[str, list[float]] = {"on": [], "off": []}
        for pair in range(arguments.pairs):
            same = [next(messages) for _ in range(clients * arguments.requests)]
            for name in ("on", "off") if pair % 2 else ("off", "on"):
                speed, found = block(urls[name], same, clients)
                speeds[name].append(speed)
                gaps[name] += found
        mean, low, high = interval([on / off for on, off in zip(speeds["on"], speeds["off"], strict=True)])
        report[f"{clients} clients"] = {
            "tokens_per_s": {name: statistics.median(found) for name, found in speeds.items()},
            "ratio": mean,
            "interval": [low, high],
            "gap_p50_ms": {name: percentile_ms(found, 50) for name, found in gaps.items()},
            "gap_p99_ms": {name: percentile_ms(found, 99) for name, found in gaps.items()},
        }
        print(json.dumps(report[f"{clients} clients"]), flush=True)
    return report


def swaps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Gaps of streams in steps that swap a draft, and in all others: the same draft is published again and again."""
    messages = itertools.cycle([prompt.messages[0] for prompt in read_prompts(arguments.prompts)])
    store, shape = DraftStore(arguments.versions, keep=3), read_config(arguments.draft)
    draft, end = load_draft(arguments.draft, shape), time.monotonic() + arguments.seconds
    began, offset_s = time.time(), time.time() - time.monotonic()
    with sending(functools.partial(stream, arguments.url), messages, clients=arguments.clients) as running:
        while running.wait(4) and time.monotonic() < end:
            store.publish(draft, record={"reason": "measuring swaps"})
    gaps = [
        (offset_s + after, after - before)
        for answer in running.answers
        for before, after in itertools.pairwise(answer.pieces_s)
    ]
    served = [event["time"] for event in store.history() if event["event"] == "served" and event["time"] >= began]
    # The event is written when the version has been validated; the call to the ranks follows within 0.1 s.
    swapping = [gap for at, gap in gaps if any(at - gap - 0.25 < moment < at for moment in served)]
    return {
        "swaps": len(served),
        "gap_p50_ms": percentile_ms([gap for _, gap in gaps], 50),
        "gap_p99_ms": percentile_ms([gap for _, gap in gaps], 99),
        "near_swaps": len(swapping),
        "near_swaps_gap_p50_ms": percentile_ms(swapping, 50),
        "near_swaps_gap_p99_ms": percentile_ms(swapping, 99),
    }


def main() -> None:
    """Read the arguments, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("learn")
    one.add_argument("--traffic", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=12)
    one.add_argument("--clients", type=int, default=4)
    one.set_defaults(measure=learn)
    same = commands.add_parser("texts")
    same.add_argument("--against", type=Path, help="Another report, whose texts should be the same.")
    same.set_defaults(measure=texts)
    for command in (one, same):
        command.add_argument("--url", required=True)
        command.add_argument("--held-out", type=Path, required=True)
        command.add_argument("--held-out-prompts", type=int, default=32)
    two = commands.add_parser("overhead")
    two.add_argument("--on", required=True)
    two.add_argument("--off", required=True)
    two.add_argument("--prompts", type=Path, required=True)
    two.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    two.add_argument("--pairs", type=int, default=30)
    two.add_argument("--requests", type=int, default=1, help="Requests of a client in each block.")
    two.set_defaults(measure=overhead)
    three = commands.add_parser("swaps")
    three.add_argument("--url", required=True)
    three.add_argument("--prompts", type=Path, required=True)
    three.add_argument("--draft", type=Path, required=True, help="What vLLM was started with; it is published again.")
    three.add_argument("--versions", type=Path, required=True, help="Folder of the server's versions.")
    three.add_argument("--clients", type=int, default=4)
    three.add_argument("--seconds", type=float, default=100)
    three.set_defaults(measure=swaps)
    for command in (one, same, two, three):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report = arguments.measure(arguments)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in report.items() if name != "texts"}, indent=2))


if __name__ == "__main__":
    main()
