"""What a viewer of the live page costs in tokens a second, in pairs inside one server.

    python -m benchmarks.page_cost --prompts chat.jsonl code.jsonl --pairs 12
    python -m benchmarks.page_cost --prompts ... --browser                      # beside a browser on this machine

A pair is the same requests sent twice, greedy and without speculation, so that both halves are the same work: once
while a viewer is connected, once without, in changing order. The viewer reads the page's events and throws them away,
as the server of a page on another machine sees it; with --browser it is a Chromium on this machine that draws them,
and both halves have the browser's idle process beside them. The table gives the geometric mean of the ratios of tokens
a second, with over without, and its 95 % interval (Student's t on their logarithms). The learner is off unless an
override enables it.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from aurora_lit.bench.server_process import free_port, running_server
from aurora_lit.config import load_config
from aurora_lit.learn.pretrain.prompts import read_prompts
from benchmarks.page_screenshots import find_chromium
from benchmarks.paired import Arm, interval, run

_ARM = Arm(speculate=False, temperature=0.0, remembers=False)
Watching = Callable[[], AbstractContextManager[None]]


@contextmanager
def reader(port: int) -> Iterator[None]:
    """A viewer that reads the events and draws nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/v1/aurora/events")
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.readline() == b"event: history\n"
    socket = connection.sock

    def read() -> None:
        while response.readline():
            pass

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        socket.shutdown(2)
        thread.join()
        connection.close()


@contextmanager
def browser_tab(url: str) -> Iterator[Watching]:
    """A browser whose one tab shows the page inside the contexts that it gives, and nothing outside them."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        page = browser.new_page(viewport={"width": 1360, "height": 900})

        @contextmanager
        def watching() -> Iterator[None]:
            page.goto(url)
            expect(page.get_by_role("status")).to_have_text("live", timeout=30_000)
            yield
            page.goto("about:blank")

        yield watching
        browser.close()


def tokens_per_s(port: int, prompts: list[str], *, clients: int, max_tokens: int, name: str) -> float:
    """Of all prompts, `clients` of them at a time."""
    tokens, seconds = 0, 0.0
    for first in range(0, len(prompts), clients):
        outcome = run(port, prompts[first : first + clients], _ARM, max_tokens=max_tokens, seed=0, setting=name)
        tokens += outcome.tokens
        seconds += outcome.tokens / outcome.tokens_per_s
    return tokens / seconds


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSONL files, taken in turn")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs before them that are not counted")
    parser.add_argument("--requests", type=int, default=8, help="of each half")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--browser", action="store_true", help="the viewer is a browser on this machine")
    parser.add_argument("--out", type=Path, default=Path("page_cost.json"), help="the pairs, as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    config = load_config(None, ["learn.enabled=false", *options.overrides])
    port = free_port()
    config = replace(config, server=replace(config.server, port=port))
    texts = [[prompt.messages[0][:3000] for prompt in read_prompts(path)] for path in options.prompts]
    turns = itertools.cycle(text for group in zip(*texts, strict=False) for text in group)
    pairs: list[tuple[float, float]] = []
    with ExitStack() as stack:
        url = stack.enter_context(running_server(config, options.out.with_suffix(".log")))
        watching: Watching = (
            stack.enter_context(browser_tab(url)) if options.browser else lambda: reader(port)  # noqa: B023
        )
        for pair in range(-options.warm_up, options.pairs):
            prompts = list(itertools.islice(turns, options.requests))
            halves: dict[bool, float] = {}
            for watched in (True, False) if pair % 2 else (False, True):
                with ExitStack() as viewer:
                    if watched:
                        viewer.enter_context(watching())
                    halves[watched] = tokens_per_s(
                        port,
                        prompts,
                        clients=options.clients,
                        max_tokens=options.max_tokens,
                        name=f"{pair} {watched}",  # a salt: neither half finds the other's prompts in the cache
                    )
            print(pair, f"{halves[True]:.1f} watched, {halves[False]:.1f} not", flush=True)
            if pair >= 0:
                pairs.append((halves[True], halves[False]))
    mean, low, high = interval([watched / alone for watched, alone in pairs])
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"ratio {mean:.4f} ({low:.4f} to {high:.4f}), {medians[0]:.1f} / {medians[1]:.1f} tokens/s, {len(pairs)} pairs"
    )
    options.out.write_text(json.dumps({"ratio": mean, "low": low, "high": high, "pairs": pairs}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
