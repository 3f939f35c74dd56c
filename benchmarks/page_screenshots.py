"""Pictures of the live page, of a server under real traffic: desktop.png, dark.png and phone.png.

    python -m benchmarks.page_screenshots --out docs/images/page
    python -m benchmarks.page_screenshots --out DIR --seconds 600 -- learn.compute_share=0.3

A server with the given settings gets templated requests (templated_prompts.py) of three labelled domains from a few
clients, one domain after the other; after so many seconds a question is put in the page's chat, and the pictures are
taken. It needs Playwright (`pip install -e '.[browser]'`), a Chromium and Pillow, which reduces the pictures' colours
so that they stay small.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aurora_lit.bench.load import Json, ask, chat, sending
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import load_config
from benchmarks.templated_prompts import make_prompts

_DOMAINS = ("billing", "support", "alerts")
_QUESTION = "Write SQL that counts orders per customer."
_COLOURS = 128
_MOST_REQUESTS = 10_000
"""Of a domain, before its prompts repeat, and the memory answers them."""


def find_chromium() -> str | None:
    """A Chromium of the system; None: Playwright's own, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def traffic(*, seconds: float, clients: int, max_tokens: int) -> Iterator[Json]:
    """Requests for so many seconds and on, of one domain in each third of them."""
    began, prompts = time.monotonic(), {domain: make_prompts(domain, _MOST_REQUESTS) for domain in _DOMAINS}
    for number in itertools.count():
        phase = int((time.monotonic() - began) / seconds * len(_DOMAINS))
        domain = _DOMAINS[min(phase, len(_DOMAINS) - 1)]
        how: Json = {"max_tokens": max_tokens, "temperature": 0.0, "user": f"client {number % clients}"}
        yield chat(prompts[domain][number % _MOST_REQUESTS], **how, metadata={"aurora_domain": domain})


def picture(page: Any, path: Path, *, height: int) -> None:
    """The upper part of the page, in few colours."""
    from PIL import Image

    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)  # for a sample, and a chart of the present size
    width = page.viewport_size["width"]
    page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    with Image.open(path) as image:
        # By coverage, not by frequency, so that the colours of few tokens stay.
        few = image.convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> int:
    """Start a server, send traffic, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seconds", type=float, default=180.0, help="of traffic before the pictures")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("overrides", nargs="*", help="key=value for the server, after `--`")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright  # --help works without

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        config = load_config(None, [f"checkpoint.dir={scratch}", *options.overrides])
        config = replace(config, server=replace(config.server, port=free_port()))
        requests = traffic(seconds=options.seconds, clients=options.clients, max_tokens=options.max_tokens)
        browser = playwright.chromium.launch(executable_path=find_chromium())
        with (
            running_server(config, options.out / "server.log") as url,
            sending(functools.partial(ask, url), requests, clients=options.clients),
        ):
            page = browser.new_page(viewport={"width": 1360, "height": 900})
            page.goto(url)
            page.wait_for_timeout(1000 * options.seconds)
            page.get_by_label("Message").fill(_QUESTION)
            page.get_by_role("button", name="Send").click()
            page.locator(".meta br").wait_for(state="attached", timeout=120_000)
            page.locator("#prompt").blur()
            picture(page, options.out / "desktop.png", height=1240)
            page.emulate_media(color_scheme="dark")
            picture(page, options.out / "dark.png", height=1240)
            page.set_viewport_size({"width": 390, "height": 844})
            picture(page, options.out / "phone.png", height=1500)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
