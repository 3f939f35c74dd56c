"""Requests cancelled at random moments: what a server holds afterwards, and how soon it answers the next request.

    python -m benchmarks.cancelled --url http://127.0.0.1:8000 --pid PID --requests 1000 --seed 0

PID is the main process of a server that runs without other traffic. The requests are streamed chats, streamed text
completions and, if the model has the tokens for it, `POST /infill`, with prompts of up to --longest tokens out of the
standard library's code, a few connections at a time. Each is cut by closing its socket, half of them with a reset:
while it is sent, a random time after it (its prompt is read meanwhile), or after a random number of its events. What
is sent and where it is cut depend on --seed alone; how far the server was by then is counted.

Before, half way and after, once no request is left and the numbers stand still, it reads the sequences with a slot,
those that wait and those in flight, and the resident memory, threads, files and sockets of the server's processes. The
first token's time is the median of ten requests with one prompt, each under a new `cache_salt`, so that the whole
prompt is read. First a tenth as many requests, but at least 40, run unmeasured: threads start and caches fill when they
are first needed. The exit status is 1 if more slots are held than before, or if processes, threads, files or sockets
became more in both halves, as what leaks does and a pool that fills does not; threads by more than a pool has. Memory
grows until the prefix cache has its `engine.prefix_cache_mb`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import os
import random
import secrets
import socket
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import Json, ask, chat, exchange, send_all, status
from aurora_lit.errors import AuroraError
from aurora_lit.progress import Progress

_ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "infill": "/infill"}
_TOKENS, _PROBES, _PROBE_CHARACTERS = 64, 10, 2000
_CHARACTERS_PER_TOKEN = 2
"""Of code at least, so that a prompt has at most as many tokens as it may."""
_STANDS_STILL_S, _SETTLES_S = 2.0, 60.0
_LEAST_WARM = 40
_OF_REQUESTS = ("running", "waiting", "in_flight")
_OF_PROCESSES = ("processes", "threads", "files", "sockets")
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Most threads of a pool (concurrent.futures' default). It starts one when all are busy, so it may fill slowly."""


class Cut(NamedTuple):
    """A request, and where it is cut."""

    path: str
    body: Json
    where: str
    """"request", "time" or "event"."""
    at: float
    """The share of the request that is sent; seconds after it; or the number of events."""
    resets: bool
    """The connection is reset, not closed in order."""


class Held(NamedTuple):
    """What a server holds while it has nothing to do."""

    running: int
    """Sequences with a slot."""
    waiting: int
    in_flight: int
    """As the HTTP process counts them."""
    processes: int
    resident_mb: float
    """Of all processes; pages that they share count in each."""
    threads: int
    files: int
    """Open descriptors, sockets included."""
    sockets: int


# -- requests ----------------------------------------------------------------------------------------------------------


def planned(number: int, seed: int, *, kinds: Sequence[str], longest: int, most_s: float) -> list[Cut]:
    """The requests; longest: tokens of a prompt, most_s: of the times at which requests are cut."""
    draws, code = random.Random(seed), Path(inspect.__file__).read_text()
    cuts = []
    for index in range(number):
        kind = draws.choice(kinds)
        size = int(_CHARACTERS_PER_TOKEN * math.exp(draws.uniform(math.log(16), math.log(longest))))
        begin = draws.randrange(max(1, len(code) - size))
        text = code[begin : begin + size]
        body: Json
        if kind == "infill":
            half = size // 2
            body = {
                "input_prefix": text[:half],
                "input_suffix": text[half:],
                "n_predict": _TOKENS,
                "id_slot": index % 3,
            }
            body |= {"stream": draws.random() < 0.5}
        elif kind == "chat":
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": _TOKENS, "stream": True}
        else:
            body = {"prompt": text, "max_tokens": _TOKENS, "stream": True}
        where = draws.choices(("request", "time", "event"), (1, 4, 3))[0]
        at = {
            "request": draws.random(),
            "time": most_s * draws.random() ** 2,
            "event": float(draws.randint(1, _TOKENS)),
        }
        cuts.append(Cut(_ROUTES[kind], body, where, at[where], draws.random() < 0.5))
    return cuts


def send_and_cut(url: str, cut: Cut, *, key: str | None = None) -> str:
    """Send a request, and close its connection. How far it was: "request", "prompt", "stream", "end", or its status."""
    host, content = urlsplit(url).netloc, json.dumps(cut.body).encode()
    head = (
        f"POST {cut.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    authority = "" if key is None else f"\r\nAuthorization: Bearer {key}"
    sent = f"{head}{authority}\r\nConnection: close\r\n\r\n".encode() + content
    name, _, port = host.rpartition(":")
    with socket.create_connection((name.strip("[]"), int(port)), timeout=60) as connection:
        if cut.resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if cut.where == "request":
            connection.sendall(sent[: int(cut.at * len(sent))])
            return "request"
        connection.sendall(sent)
        end_s = time.monotonic() + (cut.at if cut.where == "time" else 600.0)
        received, has_ended = bytearray(), False
        while (left_s := end_s - time.monotonic()) > 0 and not has_ended:
            if cut.where == "event" and received.count(b"data: ") >= cut.at:
                break
            connection.settimeout(left_s)
            try:
                part = connection.recv(1 << 16)
            except TimeoutError:
                break
            received += part
            has_ended = not part
    if not received:
        return "prompt"
    found = received.split(b" ", 2)[1].decode()
    return found if found != "200" else "end" if has_ended else "stream"


def first_token_s(url: str, number: int, *, longest: int) -> float:
    """The median time to the first token of one prompt of at most so many characters, each time read whole."""
    prompt = Path(inspect.__file__).read_text()[: min(_PROBE_CHARACTERS, longest)]
    times_s = []
    for _ in range(number):
        fields = {"max_tokens": 4, "temperature": 0.0, "cache_salt": secrets.token_hex(8), "store": False}
        times_s.append(ask(url, chat(prompt, stream=True, **fields)).first_token_s)
    return statistics.median(times_s)


# -- what the server holds ---------------------------------------------------------------------------------------------


def held(queue: Json, pid: int) -> Held:
    """queue: what the server's status says of it. pid: the first of the server's processes."""
    main = psutil.Process(pid)
    family = [main, *main.children(recursive=True)]
    resident = threads = files = sockets = 0
    for member in family:
        resident += member.memory_info().rss
        threads += member.num_threads()
        descriptors = [_target(path) for path in Path(f"/proc/{member.pid}/fd").iterdir()]
        files += len(descriptors)
        sockets += sum(target.startswith("socket:") for target in descriptors)
    counts = {name: queue[name] for name in ("running", "waiting", "in_flight")}
    return Held(
        **counts, processes=len(family), resident_mb=resident / 1e6, threads=threads, files=files, sockets=sockets
    )


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # closed meanwhile
        return ""


def settled(read: Callable[[], Held], *, still_s: float = _STANDS_STILL_S, within_s: float = _SETTLES_S) -> Held:
    """What is held once nothing runs and the counts stand still for so long; the last reading if they never do."""
    deadline = time.monotonic() + within_s
    found, since_s = read(), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(still_s / 10)
        now = read()
        if now._replace(resident_mb=0.0) != found._replace(resident_mb=0.0):
            since_s = time.monotonic()
        found = now
        if not (now.running or now.waiting or now.in_flight) and time.monotonic() - since_s >= still_s:
            break
    return found


def grown(before: Held, half_way: Held, after: Held) -> list[str]:
    """The names of what is held more of than it should be; see the file's docstring."""
    return [name for name in _OF_REQUESTS if getattr(after, name) > getattr(before, name)] + [
        name
        for name in _OF_PROCESSES
        if getattr(before, name) < getattr(half_way, name) < getattr(after, name)
        and not (name == "threads" and after.threads <= before.threads + _POOL_THREADS)
    ]


# -- the run -----------------------------------------------------------------------------------------------------------


def fills_holes(url: str) -> bool:
    """True if the model has tokens for it."""
    found, _, _ = exchange(url, "/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 0})
    return found == 200


def run(url: str, pid: int, *, requests: int, seed: int, connections: int, longest: int, most_s: float) -> Json:
    """Cancel the requests; the three readings, the first token's times, and how far the requests were."""
    context = int(status(url)["limits"]["max_seq_len"])
    kinds = [kind for kind in _ROUTES if kind != "infill" or fills_holes(url)]
    num_warm = max(_LEAST_WARM, requests // 10)
    size = max(32, min(longest, context - 2 * _TOKENS))
    cuts = planned(num_warm + requests, seed, kinds=kinds, longest=size, most_s=most_s)
    send = functools.partial(send_and_cut, url)

    def reading() -> tuple[Held, float]:
        return settled(lambda: held(status(url)["queue"], pid)), first_token_s(url, _PROBES, longest=size)

    ends = Counter[str]()
    middle = num_warm + requests // 2
    with Progress("cancelled", len(cuts), "requests") as progress:
        readings = []
        for part in (cuts[:num_warm], cuts[num_warm:middle], cuts[middle:]):
            for at in range(0, len(part), 10 * connections):
                group = part[at : at + 10 * connections]
                found = send_all(send, group, clients=connections)
                ends.update(found if readings else ())
                progress.advance(len(group))
            if not readings:
                first_token_s(url, 1, longest=size)
            readings.append(reading())
    names = ("before", "half way", "after")
    return {
        "requests": requests,
        "seed": seed,
        "kinds": kinds,
        "cut": dict(sorted(ends.items())),
        "held": {name: now._asdict() for name, (now, _) in zip(names, readings, strict=True)},
        "first_token_ms": {name: 1e3 * seconds for name, (_, seconds) in zip(names, readings, strict=True)},
        "grown": grown(*(now for now, _ in readings)),
    }


def report(found: Json) -> Table:
    """The figures of the file's docstring."""
    where = ", ".join(f"{number} {name}" for name, number in found["cut"].items())
    table = Table(title=f"{found['requests']} cancelled ({', '.join(found['kinds'])}): {where}", min_width=70)
    table.add_column("held")
    for name in found["held"]:
        table.add_column(name, justify="right")
    for field in Held._fields:
        table.add_row(field, *(f"{now[field]:.0f}" for now in found["held"].values()))
    table.add_row("first token, ms", *(f"{ms:.0f}" for ms in found["first_token_ms"].values()))
    return table


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server's main process")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument(
        "--longest", type=int, default=3000, help="tokens of a prompt, if the context has room for them"
    )
    parser.add_argument("--most-s", type=float, default=2.0, help="longest time after which a request is cut")
    parser.add_argument("--out", type=Path, help="JSON: the figures")
    options: dict[str, Any] = vars(parser.parse_args())
    out = options.pop("out")
    try:
        found = run(options.pop("url"), options.pop("pid"), **options)
    except (AuroraError, psutil.Error) as error:
        print(error, file=sys.stderr)
        return 1
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=120).print(report(found))
    for name in found["grown"]:
        print(f"more {name} than before", file=sys.stderr)
    return 1 if found["grown"] else 0


if __name__ == "__main__":
    sys.exit(main())
