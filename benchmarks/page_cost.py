"""What a viewer of the live page costs in tokens a second, in pairs inside one server.

    python -m benchmarks.page_cost --prompts chat.jsonl code.jsonl --pairs 12
    python -m benchmarks.page_cost --prompts ... --browser                      # beside a browser on this machine

A pair is the same requests sent twice, greedy and without speculation, so that both halves are the same work: once
while a viewer is connected, once without, in changing order. The viewer reads the page's events and throws them away,
as the server of a page on another machine sees it; with --browser it is a Chromium on this machine that draws them,
and both halves have the browser's idle process beside them. Printed are the geometric means of the ratios of tokens a
second, and of the server's processor time a token, with over without, each with its 95 % interval (Student's t on the
logarithms). Other work on the machine changes the second less. The learner is off unless an override enables it.

Before the pairs, while no request is there, the processor time that the HTTP process takes is measured, with a viewer
and without: a figure that other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil

from aurora_lit.bench.server_process import LOOPBACK, free_port, running_server
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


class Half(NamedTuple):
    """One half of a pair."""

    tokens_per_s: float
    processor_ms: float
    """Processor time for each token, of all processes of the server."""


class ServerProcesses:
    """The processes of a running server, and the processor time that they have taken."""

    def __init__(self, port: int) -> None:
        with LOOPBACK.open(f"http://127.0.0.1:{port}/v1/aurora/status", timeout=30) as response:
            self.worker = psutil.Process(json.load(response)["worker"]["pid"])
        main = self.worker.parent()
        assert main is not None, "the server's main process has started the worker"
        self._family = [main, *main.children(recursive=True)]

    def processor_s(self, *, with_worker: bool) -> float:
        """Since they began."""
        counted = [each for each in self._family if with_worker or each != self.worker]
        return sum(sum(process.cpu_times()[:2]) for process in counted)

    def idle_ms_per_s(self, seconds: float) -> float:
        """Of the processes without the engine worker, which measures its costs while no request is there."""
        before = self.processor_s(with_worker=False)
        time.sleep(seconds)
        return 1000 * (self.processor_s(with_worker=False) - before) / seconds


def serve(port: int, server: ServerProcesses, prompts: list[str], *, name: str, options: argparse.Namespace) -> Half:
    """Send all prompts, some at a time."""
    tokens, seconds, before = 0, 0.0, server.processor_s(with_worker=True)
    for first in range(0, len(prompts), options.clients):
        some = prompts[first : first + options.clients]
        outcome = run(port, some, _ARM, max_tokens=options.max_tokens, seed=0, setting=name)
        tokens += outcome.tokens
        seconds += outcome.tokens / outcome.tokens_per_s
    return Half(tokens / seconds, 1000 * (server.processor_s(with_worker=True) - before) / tokens)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True, help="JSONL files, taken in turn")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs before them that are not counted")
    parser.add_argument("--requests", type=int, default=8, help="of each half")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="of each measurement without requests")
    parser.add_argument("--browser", action="store_true", help="the viewer is a browser on this machine")
    parser.add_argument("--out", type=Path, default=Path("page_cost.json"), help="the pairs, as JSON")
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    config = load_config(None, ["learn.enabled=false", *options.overrides])
    port = free_port()
    config = replace(config, server=replace(config.server, port=port))
    chats = [
        [[{"role": "user", "content": prompt.messages[0][:3000]}] for prompt in read_prompts(path)]
        for path in options.prompts
    ]
    turns = itertools.cycle(chat for group in zip(*chats, strict=False) for chat in group)
    pairs: list[tuple[Half, Half]] = []
    with ExitStack() as stack:
        url = stack.enter_context(running_server(config, options.out.with_suffix(".log")))
        watching: Watching = (
            stack.enter_context(browser_tab(url)) if options.browser else lambda: reader(port)  # noqa: B023
        )
        server = ServerProcesses(port)
        with watching():
            watched_ms = server.idle_ms_per_s(options.idle_seconds)
        idle_ms = server.idle_ms_per_s(options.idle_seconds)
        print(
            f"without requests: {watched_ms:.1f} ms of processor time a second watched, {idle_ms:.1f} not", flush=True
        )
        for pair in range(-options.warm_up, options.pairs):
            prompts = list(itertools.islice(turns, options.requests))
            halves: dict[bool, Half] = {}
            for watched in (True, False) if pair % 2 else (False, True):
                with ExitStack() as viewer:
                    if watched:
                        viewer.enter_context(watching())
                    # The name is a salt: neither half finds the other's prompts in the cache.
                    halves[watched] = serve(port, server, prompts, name=f"{pair} {watched}", options=options)
            pairs.append((halves[True], halves[False]))
            print(
                pair,
                *(f"{half.tokens_per_s:.1f} tokens/s {half.processor_ms:.2f} ms" for half in pairs[-1]),
                flush=True,
            )
    del pairs[: options.warm_up]
    found = {
        what: interval([getattr(watched, what) / getattr(alone, what) for watched, alone in pairs])
        for what in Half._fields
    }
    for what, (mean, low, high) in found.items():
        print(f"{what}, watched over not: {mean:.4f} ({low:.4f} to {high:.4f}), {len(pairs)} pairs")
    report = {"watched_ms_per_s": watched_ms, "idle_ms_per_s": idle_ms, "ratios": found, "pairs": pairs}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
