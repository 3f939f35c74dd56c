"""`aurora-lit bench repository`: what would memory and learner gain on my code?

Two servers run, one after the other. Each gets the requests of a repository's history (repository_traffic.py) for half
of its time; then those of held-out commits are sent to it, one at a time, with `store: false`, once in each *way*:

    plain     without speculation                               both servers
    frozen    the shipped draft and lookup, no memory           the one without a learner
    memory    … and what that server has answered before        the one without a learner
    learner   the learned draft and lookup, no memory           the one with a learner, which is stopped meanwhile
    both      … and what that server has answered before        the one with a learner, which is stopped meanwhile

A request under a `cache_salt` of its own reads no memory, which is how a way goes without. Requests are seeded, so all
ways must give the same text. Speed counts from the first piece of an answer to the last: how long a prompt takes
depends on the prefix cache. Ratios are geometric means over requests, over plain on the same server.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import Answer, Json, ask, interval, sending, status
from aurora_lit.bench.reporting import report_console
from aurora_lit.bench.repository_traffic import repository_requests
from aurora_lit.bench.servers import free_port, running_server
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError

WITHOUT_LEARNER, WITH_LEARNER = ("plain", "frozen", "memory"), ("plain", "learner", "both")
_LEAST_TOKENS = 8
"""Shorter answers tell nothing of speed."""
_START_SHARE, _LEARN_SHARE = 0.1, 0.5
"""Of a server's time: for its start; for the traffic that it learns from, before it is measured."""
_LEAST_REQUESTS = 4


class Timed(NamedTuple):
    """A held-out request, sent in one way."""

    request: int
    way: str
    tokens_per_s: float
    accepted_length: float
    text: str


def run(config: AuroraConfig, folder: Path, *, minutes: float, clients: int, seed: int, out: Path) -> list[Json]:
    """Measure, print and write; a row for each way of each server. Raises AuroraError if too little was measured."""
    requests = repository_requests(folder, seed=seed)
    traffic = [each.body for each in requests if not each.is_held_out]
    held_out = [each.body for each in requests if each.is_held_out]
    console = Console(stderr=True)
    console.print(f"{folder}: {len(traffic)} requests, {len(held_out)} held out; about {minutes:g} minutes")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Json] = []
    for learns, ways in ((False, WITHOUT_LEARNER), (True, WITH_LEARNER)):
        with tempfile.TemporaryDirectory() as versions:
            server = _settings(config, learns=learns, versions=Path(versions))
            log = out / f"server-{'learner' if learns else 'memory'}.log"
            timed, sent = _serve(server, traffic, held_out, ways, clients=clients, seconds=30 * minutes, log=log)
        rows += summarise(timed, ways, requests_sent=sent)
    report = {"repository": folder.resolve().name, "commits": len({each.commit for each in requests}), "rows": rows}
    (out / "repository.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report_console().print(_table(rows))
    if not save_picture(rows, out / "repository.png"):
        console.print("no picture: matplotlib is not installed (pip install 'aurora-lit\\[bench]')")
    return rows


def _settings(config: AuroraConfig, *, learns: bool, versions: Path) -> AuroraConfig:
    """A server on loopback with a run of its own, so that it begins with the shipped draft and disturbs no other."""
    return replace(
        config,
        server=replace(config.server, host="127.0.0.1", port=free_port(), api_key=None),
        learn=replace(config.learn, enabled=learns),
        checkpoint=replace(config.checkpoint, dir=str(versions), run="bench"),
    )


def _serve(
    config: AuroraConfig,
    traffic: Sequence[Json],
    held_out: Sequence[Json],
    ways: Sequence[str],
    *,
    clients: int,
    seconds: float,
    log: Path,
) -> tuple[list[Timed], int]:
    """Send the traffic, then the held-out requests; what they came to, and how many of the traffic were answered."""
    with running_server(config, log) as url:
        bodies = ({**body, "seed": number} for number, body in enumerate(itertools.cycle(traffic)))
        with sending(functools.partial(ask, url), bodies, clients=clients) as running:
            running.wait(seconds * _LEARN_SHARE)
        measured_until = time.monotonic() + seconds * (1 - _LEARN_SHARE - _START_SHARE)
        timed: list[Timed] = []
        with _stopped_learner(url) if config.learn.enabled else nullcontext():
            for number, body in enumerate(held_out):
                if time.monotonic() > measured_until and number >= _LEAST_REQUESTS:
                    break
                first = number % len(ways)
                answers = {way: _answer(url, body, way, number) for way in [*ways[first:], *ways[:first]]}
                timed += [timing for way in ways if (timing := _timed(number, way, answers[way]))]
    return timed, len(running.answers)


@contextmanager
def _stopped_learner(url: str) -> Iterator[None]:
    """Inside, the learner does not run: while nobody else asks, it would take its idle share of the processors."""
    learner = psutil.Process(status(url)["learner"]["pid"])
    learner.suspend()
    try:
        yield
    finally:
        learner.resume()


def _answer(url: str, body: Json, way: str, number: int) -> Answer:
    salt = {} if way in ("memory", "both") else {"cache_salt": secrets.token_hex(8)}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return ask(url, {**body, **stream, **salt, "seed": number, "store": False, "speculate": way != "plain"})


def _timed(number: int, way: str, answer: Answer) -> Timed | None:
    """None: too short to time."""
    if answer.tokens < _LEAST_TOKENS or len(answer.pieces_s) < 2:
        return None
    seconds = answer.pieces_s[-1] - answer.pieces_s[0]
    return Timed(number, way, (answer.tokens - 1) / seconds, answer.accepted_length, answer.text)


def summarise(timed: Sequence[Timed], ways: Sequence[str], *, requests_sent: int) -> list[Json]:
    """A row for each way, of the requests that were timed in all of them. Raises AuroraError if they are too few."""
    by_request = [
        {each.way: each for each in group} for _, group in itertools.groupby(timed, key=lambda each: each.request)
    ]
    whole = [each for each in by_request if each.keys() == set(ways)]
    if len(whole) < _LEAST_REQUESTS:
        raise AuroraError(
            f"{len(whole)} held-out requests were answered in time with {_LEAST_TOKENS} tokens; give more --minutes"
        )
    rows = []
    for way in ways:
        ratio, low, high = interval([each[way].tokens_per_s / each["plain"].tokens_per_s for each in whole])
        rows.append(
            {
                "way": way,
                "tokens_per_s": math.exp(sum(math.log(each[way].tokens_per_s) for each in whole) / len(whole)),
                "over_plain": ratio,
                "low": low,
                "high": high,
                "accepted_length": sum(each[way].accepted_length for each in whole) / len(whole),
                "unequal": sum(each[way].text != each["plain"].text for each in whole),
                "held_out": len(whole),
                "requests_sent": requests_sent,
            }
        )
    return rows


def _table(rows: Sequence[Json]) -> Table:
    table = Table(title="held-out requests of the repository")
    for name in ("way", "tokens/s", "over plain", "95 % interval", "tokens a round", "texts unequal", "requests"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['over_plain']:.2f}",
            f"{row['low']:.2f}–{row['high']:.2f}",
            f"{row['accepted_length']:.2f}",
            str(row["unequal"]),
            f"{row['held_out']} after {row['requests_sent']}",
        )
    return table


def save_picture(rows: Sequence[Json], path: Path) -> bool:
    """Bars of the speed over plain decoding with their intervals. False, and no file, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [row for row in rows if row["way"] != "plain"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ratios = [row["over_plain"] for row in shown]
    errors = [[row["over_plain"] - row["low"] for row in shown], [row["high"] - row["over_plain"] for row in shown]]
    bars = axes.bar(range(len(shown)), ratios, yerr=errors, capsize=3)
    axes.bar_label(bars, [f"×{ratio:.2f}" for ratio in ratios], padding=3)
    axes.set_xticks(range(len(shown)), [row["way"] for row in shown])
    axes.set_ylabel("tokens a second over plain decoding")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
