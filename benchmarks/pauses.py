"""How long running answers pause while long prompts arrive: with this checkout and, in turn, with another one.

    python -m benchmarks.pauses --prompts chat.jsonl summarize.jsonl --against ../before -- learn.enabled=false
    python -m benchmarks.pauses --prompts chat.jsonl summarize.jsonl --port 8000     # a server that runs already

--clients clients stream long greedy answers without end. Meanwhile another client sends --long-prompts prompts of about
--characters characters each, one after the other, made by joining the file's prompts. Every pause between two pieces of
a running answer that overlaps one of these requests, up to its first token, is counted. The table has the percentiles
of these pauses, the time to the first token of the long prompts, and the running answers' tokens a second.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aurora_lit.bench.load import Answer, ask, chat, get, sending
from aurora_lit.bench.servers import free_port, started_aurora
from aurora_lit.learn.pretrain.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[1]


def measure(url: str, short: Iterator[str], long: list[str], *, clients: int, max_tokens: int) -> dict[str, Any]:
    """The running answers' pauses beside every long prompt."""
    model = get(url, "/v1/models")["data"][0]["id"]

    def stream(prompt: str, most: int = max_tokens) -> Answer:
        return ask(url, chat(prompt, model=model, max_tokens=most, temperature=0.0, stream=True))

    stream(next(short), most=32)
    arrivals: list[Answer] = []
    with sending(stream, short, clients=clients) as running:
        time.sleep(3.0)
        for prompt in long:
            arrivals.append(stream(prompt, most=4))
            time.sleep(0.5)
    answers = running.answers
    pauses = [
        after - before
        for answer in answers
        for before, after in itertools.pairwise(answer.pieces_s)
        if any(before < arrival.pieces_s[0] and after > arrival.sent_s for arrival in arrivals)
    ]
    began, ended = min(answer.sent_s for answer in answers), max(answer.ended_s for answer in answers)
    return {
        "pauses": pauses,
        "first": [arrival.first_token_s for arrival in arrivals],
        "speed": sum(answer.tokens for answer in answers) / (ended - began),
    }


def run(checkout: Path, settings: list[str], short: Iterator[str], long: list[str], options: Any) -> dict[str, Any]:
    """Measure a server of a checkout, or the one that listens on --port."""
    how = {"clients": options.clients, "max_tokens": options.max_tokens}
    if options.port:
        return measure(f"http://127.0.0.1:{options.port}", short, long, **how)
    url = f"http://127.0.0.1:{(port := free_port())}"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [f"server.port={port}", f"checkpoint.dir={scratch}", *settings]
        with started_aurora(arguments, Path(scratch) / "log", code=checkout) as server:
            server.wait_until_ready(f"{url}/ready")
            return measure(url, short, long, **how)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    others.add_argument("--port", type=int, help="of a running server with OpenAI's API, measured instead of ours")
    parser.add_argument("--clients", type=int, default=7)
    parser.add_argument("--long-prompts", type=int, default=8)
    parser.add_argument("--characters", type=int, default=4200)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a running answer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("settings", nargs="*", help="key=value")
    options = parser.parse_args()
    if options.port is not None and options.repeats > 1:
        parser.error("--port needs --repeats 1: a server that goes on running has long prompts in its cache")
    texts = [prompt.messages[0] for path in options.prompts for prompt in read_prompts(path)]
    short = itertools.cycle(text for text in texts if len(text) < 300)
    joined = " ".join(texts)
    long = [joined[i * options.characters : (i + 1) * options.characters] for i in range(options.long_prompts)]
    checkouts = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    found: dict[Path, list[dict[str, Any]]] = {checkout: [] for checkout in checkouts}
    for _, checkout in itertools.product(range(options.repeats), checkouts):
        found[checkout].append(run(checkout, options.settings, short, long, options))
    for checkout in checkouts:
        pauses = np.array([pause for each in found[checkout] for pause in each["pauses"]]) * 1e3
        first = statistics.median(seconds for each in found[checkout] for seconds in each["first"])
        speed = statistics.mean(each["speed"] for each in found[checkout])
        p50, p90, p99 = np.percentile(pauses, (50, 90, 99))
        name = f"port {options.port}" if options.port else checkout.name
        print(f"{name}: pauses p50 {p50:.0f}, p90 {p90:.0f}, p99 {p99:.0f}, most {pauses.max():.0f} ms", end="")
        print(f" ({len(pauses)} pauses); first token of a long prompt {first:.2f} s; {speed:.0f} tokens/s")


if __name__ == "__main__":
    main()
