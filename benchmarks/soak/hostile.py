"""Seven running streams beside one attack after another: their gaps, memory before and after, restarts.

    python -m benchmarks.soak.hostile --seconds 20
    python -m benchmarks.soak.hostile --attacks endless_head idle --config qwen2.5-coder-0.5b -- target.source=FILE

Seven clients stream long greedy answers without a pause. A gap is the time from one piece of text of a stream to its
next. They are counted while nothing else is sent (`quiet`), beside an honest eighth client whose prompts have 1,000
characters (`an eighth client`), and beside each attack (attacks.py), which takes --seconds and comes from a process of
its own at the lowest priority. Memory is the Pss of all processes, read before an attack and, once the server has no
other requests, after it; every slot has been full once before. The learner is off. `others` are the cores that were
busy with something else. The exit status is 1 if a 99th percentile is more than twice the quiet one, a gap longer than
0.5 s, memory more than 32 MB above what it was, an answer fails, or a process has ended.
"""

from __future__ import annotations

import argparse
import http.client
import inspect
import itertools
import json
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from aurora_lit.bench.load import Json, chat, exchange, send_all, status
from aurora_lit.bench.servers import free_port

from .attacks import ATTACKS, run_attack
from .server import Supervised, enter_mounts, supervised

_STREAMS, _TOKENS = 7, 1500
_LONGEST_S, _TIMES, _GROWTH_MB = 0.5, 2.0, 32.0
_SETTLES_S = 20.0
"""After an attack, before memory is read again: ten seconds without a byte end a connection."""
_SETTINGS = ("learn.enabled=false", "engine.prefix_cache_mb=32", "memory.capacity_mb=8")


class Beside(NamedTuple):
    """What an attack came to."""

    name: str
    gaps: int
    p50_ms: float
    p99_ms: float
    longest_ms: float
    before_mb: float
    after_mb: float
    restarts: int
    failed: int
    """Answers of the seven."""
    others_cores: float
    """Cores that were busy with neither the server, the clients nor the attack: the figures hold only if few."""
    answers: Json
    """What the attacker saw."""


class Streams:
    """Seven streams, until the end of the block."""

    def __init__(self, server: Supervised) -> None:
        self._server = server
        self.gaps: list[tuple[float, float]] = []
        """When each ended, and how long it was; seconds of the monotonic clock."""
        self.failed = 0
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(_STREAMS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def between(self, begin_s: float, end_s: float) -> list[float]:
        """Gaps that ended in a window."""
        return [gap_s for ended_s, gap_s in self.gaps if begin_s <= ended_s < end_s]

    def _stream(self, number: int) -> None:
        for turn in itertools.count():
            if self._ends.is_set():
                return
            try:
                self._one(f"Tell a story of {number + 2} friends who count to {turn + 10}.")
            except (OSError, http.client.HTTPException):
                self.failed += 1
                self._ends.wait(0.2)

    def _one(self, prompt: str) -> None:
        body = chat(prompt, max_tokens=_TOKENS, temperature=0.0, ignore_eos=True, stream=True)
        connection = http.client.HTTPConnection(urlsplit(self._server.url).netloc, timeout=60)
        headers = {"Authorization": f"Bearer {self._server.key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(response.read()[:200])
            before_s = None
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                if b'"error"' in line[:20]:
                    raise OSError(line[:200])
                now_s = time.monotonic()
                if before_s is not None:
                    self.gaps.append((now_s, now_s - before_s))
                before_s = now_s
                if self._ends.is_set():
                    return
        finally:
            connection.close()


def _eighth(server: Supervised, seconds: float) -> Json:
    """An honest client: reads a prompt of 1,000 characters, is told 64 tokens, and begins again."""
    code, deadline, number = Path(inspect.__file__).read_text(), time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        text = code[1000 * number : 1000 * number + 1000]
        exchange(server.url, "/v1/chat/completions", chat(text, max_tokens=64), key=server.key)
        number += 1
    return {"200": number}


def _fill_slots(server: Supervised) -> None:
    """Read eight prompts that leave little room, so that later answers touch no memory for the first time."""
    code = Path(inspect.__file__).read_text()
    most = int(status(server.url, key=server.key)["limits"]["max_seq_len"]) - 64
    body = {"prompt": code[: 8 * most], "add_special_tokens": False}
    _, lines, _ = exchange(server.url, "/tokenize", body, key=server.key)
    tokens = json.loads(b"".join(line for _, line in lines))["tokens"]

    def send(number: int) -> None:
        prompt = {"prompt": tokens[number : number + most], "max_tokens": 32, "ignore_eos": True}
        exchange(server.url, "/v1/completions", prompt, key=server.key)

    send_all(send, range(_STREAMS + 1), clients=_STREAMS + 1)


def _memory_mb(server: Supervised) -> float:
    return server.server.memory_mb() if server.server is not None else 0.0


def _busy_s(server: Supervised) -> tuple[float, float]:
    """Processor time of the machine since its start, and of all that is measured here."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    members = server.server.members() if server.server is not None else []
    served = sum(sum(member.cpu_times()[:2]) for member in members)
    return machine.user + machine.nice + machine.system, sum(own[:4]) + served


def measure(server: Supervised, streams: Streams, name: str, seconds: float) -> Beside:
    """Gaps beside one attack, and what it left."""
    before_mb, lives, failed = _memory_mb(server), server.lives, streams.failed
    begin_s, (machine_s, own_s) = time.monotonic(), _busy_s(server)
    if name == "quiet":
        time.sleep(seconds)
        answers: Json = {}
    elif name == "an eighth client":
        answers = _eighth(server, seconds)
    else:
        answers = run_attack(name, server.url, seconds)
    end_s, (machine_end_s, own_end_s) = time.monotonic(), _busy_s(server)
    others_cores = max(0.0, machine_end_s - machine_s - (own_end_s - own_s)) / (end_s - begin_s)
    gaps_ms = 1e3 * np.asarray(streams.between(begin_s, end_s) or [1e3 * seconds])
    if name in ATTACKS:
        time.sleep(_SETTLES_S)
    p50_ms, p99_ms = (float(each) for each in np.percentile(gaps_ms, (50, 99)))
    return Beside(
        name,
        len(gaps_ms),
        p50_ms,
        p99_ms,
        float(gaps_ms.max()),
        before_mb,
        _memory_mb(server),
        server.lives - lives,
        streams.failed - failed,
        others_cores,
        answers,
    )


def faults(found: list[Beside]) -> list[str]:
    """What is beyond the limits of the file's docstring."""
    quiet = found[0]
    return [
        f"{each.name}: {what}"
        for each in found
        if each.name in ATTACKS
        for what, is_wrong in (
            (f"p99 {each.p99_ms:.0f} ms, quiet {quiet.p99_ms:.0f} ms", each.p99_ms > _TIMES * quiet.p99_ms),
            (f"a gap of {each.longest_ms:.0f} ms", each.longest_ms > 1e3 * _LONGEST_S),
            (f"{each.before_mb:.0f} → {each.after_mb:.0f} MB", each.after_mb > each.before_mb + _GROWTH_MB),
            (f"{each.restarts} restarts", each.restarts > 0),
            (f"{each.failed} streams failed", each.failed > 0),
        )
        if is_wrong
    ]


def report(found: list[Beside]) -> Table:
    """A row each."""
    table = Table(
        "beside", "gaps", "p50, ms", "p99, ms", "longest, ms", "MB before → after", "restarts", "others", "answers"
    )
    for each in found:
        memory = f"{each.before_mb:.0f} → {each.after_mb:.0f}"
        gaps = (f"{number:.0f}" for number in (each.gaps, each.p50_ms, each.p99_ms, each.longest_ms))
        answers = ", ".join(f"{number} × {name}" for name, number in sorted(each.answers.items()))
        table.add_row(
            each.name.replace("_", " "), *gaps, memory, str(each.restarts), f"{each.others_cores:.2f}", answers
        )
    return table


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--config", default="smollm2", help="preset or file of settings")
    parser.add_argument("--out", type=Path, help="folder for the figures and the server's log")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    enter_mounts("benchmarks.soak.hostile")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, and its files deleted
    found: list[Beside] = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        settings = ["--config", options.config, f"checkpoint.dir={scratch}/checkpoints", *_SETTINGS, *options.settings]
        with supervised(settings, Path(scratch), free_port()) as server, Streams(server) as streams:
            time.sleep(10.0)
            for name in ("quiet", "an eighth client", *options.attacks):
                found.append(measure(server, streams, name, options.seconds))
                print(found[-1], file=sys.stderr, flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "hostile.json").write_text(json.dumps([each._asdict() for each in found], indent=1) + "\n")
            for log in Path(scratch).glob("server-*.log"):
                with suppress(OSError):
                    (options.out / log.name).write_bytes(log.read_bytes())
    Console(width=140).print(report(found))
    wrong = faults(found)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
