"""benchmarks/cancelled.py: what is sent and cut, what counts as held, and a run against a server."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console
from support.fake_server import FakeServer

from benchmarks.cancelled import Held, grown, held, planned, report, run, settled

QUEUE = {"running": 1, "waiting": 2, "in_flight": 3}
NOTHING = Held(running=0, waiting=0, in_flight=0, processes=4, resident_mb=9.0, threads=7, files=5, sockets=2)


def test_a_seed_draws_all_kinds_of_requests_and_of_cuts() -> None:
    how = {"kinds": ("chat", "completion", "infill"), "longest": 500, "most_s": 2.0}
    cuts = planned(400, 3, **how)
    assert cuts == planned(400, 3, **how)
    assert cuts != planned(400, 4, **how)
    assert {cut.path for cut in cuts} == {"/v1/chat/completions", "/v1/completions", "/infill"}
    assert {(cut.where, cut.resets) for cut in cuts} == {
        (where, resets) for where in ("request", "time", "event") for resets in (False, True)
    }
    sizes = [len(cut.body["prompt"]) for cut in cuts if "messages" not in cut.body and "prompt" in cut.body]
    assert min(sizes) < 100 < 900 < max(sizes) <= 2 * 500


def test_what_a_process_holds_is_counted() -> None:
    before = held(QUEUE, os.getpid())
    assert before[:3] == (1, 2, 3)
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    try:
        with socket.socket(), open(os.devnull):
            during = held(QUEUE, os.getpid())
    finally:
        ends.set()
        thread.join()
    assert (during.threads, during.files, during.sockets) == (
        before.threads + 1,
        before.files + 2,
        before.sockets + 1,
    )
    assert during.resident_mb > 10
    assert grown(before, before, during) == grown(before, during, during) == [], "a pool that fills"
    later = during._replace(threads=during.threads + 1, files=during.files + 1)
    assert grown(before, during, later) == ["files"], "a pool that fills slowly"
    later = during._replace(threads=during.threads + 40)
    assert grown(before, during, later) == ["threads"]
    assert grown(before, before, before._replace(in_flight=4, resident_mb=1e6)) == ["in_flight"]


def test_a_reading_waits_until_nothing_runs_and_the_counts_stand_still() -> None:
    def readings() -> Iterator[Held]:
        yield from [NOTHING._replace(running=1)] * 50
        yield from (NOTHING._replace(threads=threads) for threads in range(20, 7, -1))
        while True:
            yield NOTHING

    found = readings()
    assert settled(lambda: next(found), still_s=0.01) == NOTHING
    busy = NOTHING._replace(in_flight=1)
    assert settled(lambda: busy, still_s=0.01, within_s=0.05) == busy, "a request that never ends is seen"


@pytest.mark.slow
def test_a_server_holds_as_much_after_cancelled_requests() -> None:
    with FakeServer(options={"fills_holes": True, "round_s": 0.01}) as server:
        found = run(server.url, server.process.pid, requests=60, seed=0, connections=4, longest=200, most_s=0.1)
    assert found["grown"] == [], found
    assert sum(found["cut"].values()) == 60
    assert {"request", "prompt", "stream"} <= found["cut"].keys() <= {"request", "prompt", "stream", "end", "409"}
    assert found["held"]["after"]["processes"] > 1
    assert min(found["first_token_ms"].values()) > 5
    shown = io.StringIO()
    Console(width=120, file=shown).print(report(found))
    assert "first token, ms" in shown.getvalue()
