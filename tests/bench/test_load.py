"""Load on a server: what is sent and when, what an answer is said to have come to, and servers that are started."""

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support import ROOT

from aurora_lit.bench.load import (
    LOOPBACK,
    Answer,
    ask,
    chat,
    get,
    interval,
    percentile_ms,
    read_answer,
    send_all,
    send_at,
    sending,
)
from aurora_lit.bench.servers import changed_settings, free_port, running_server, started
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n"


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_timed_by_its_pieces_of_text_and_counted_by_its_usage() -> None:
    source = {"token_sources": [{"text": "Hello", "source": "draft"}]}
    lines = [
        (10.0, event(choices=[{"delta": {"role": "assistant", "content": ""}}])),
        (10.5, event(choices=[{"delta": {"content": "Hello"}, **source}])),
        (10.5, b"\n"),
        (10.9, event(**delta(" you"))),
        (11.0, event(choices=[{"delta": {}, "finish_reason": "stop"}])),
        (11.0, event(choices=[], usage={"completion_tokens": 5})),
        (11.1, b"data: [DONE]\n"),
    ]
    answer = read_answer(lines, sent_s=9.0, ended_s=11.2, streamed=True)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("Hello you", 5, "stop")
    assert (answer.pieces_s, answer.chunks_s) == ((10.5, 10.9), (10.0, 10.5, 10.9, 11.0, 11.0))
    assert (answer.first_token_s, answer.seconds) == (1.5, pytest.approx(2.2))
    assert answer.pauses_s == pytest.approx([0.4])
    assert answer.sources == {"draft": 1}
    assert answer.accepted_length == 1


def test_a_whole_answer_has_the_servers_counts_and_no_pieces() -> None:
    body = {
        "choices": [{"message": {"content": "Hello"}, "finish_reason": "length"}],
        "usage": {"completion_tokens": 3},
        "metrics": {"speculative_decoding": {"mean_acceptance_length": 2.5}},
    }
    lines = [(1.0, json.dumps(body).encode())]
    answer = read_answer(lines, sent_s=0.0, ended_s=1.0, streamed=False)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("Hello", 3, "length")
    assert (answer.accepted_length, answer.pieces_s, answer.chunks_s) == (2.5, (), ())
    others = json.dumps({**body, "metrics": None}).encode()  # as vLLM answers
    assert read_answer([(1.0, others)], sent_s=0.0, ended_s=1.0, streamed=False).speculation == {}


def test_an_incomplete_answer_is_an_error() -> None:
    for lines, reason in (
        ([event(**delta("a"))], "without its usage"),
        ([event(**delta("a")), event(error={"message": "out of memory"})], "out of memory"),
    ):
        with pytest.raises(AuroraError, match=reason):
            read_answer([(0.0, line) for line in lines], sent_s=0.0, ended_s=1.0, streamed=True)


def test_a_body_leaves_out_what_is_none_and_a_stream_asks_for_its_usage() -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert chat("hi", temperature=None, seed=0) == {"messages": turns[1:], "seed": 0}
    assert chat(turns, stream=True) == {
        "messages": turns,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# -- clients -----------------------------------------------------------------------------------------------------------


class StubServer(ThreadingHTTPServer):
    """Answers with the prompt's words, and records the largest number of concurrent requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.num_concurrent = self.max_concurrent = 0
        self.bodies: list[dict[str, Any]] = []


class StubHandler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "stub"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.num_concurrent += 1
            self.server.max_concurrent = max(self.server.max_concurrent, self.server.num_concurrent)
            self.server.bodies.append(body)
        words = body["messages"][0]["content"].split()
        self.send_response(429 if words == ["refuse"] else 200)
        self.end_headers()
        for word in words:
            self.wfile.write(event(**delta(word)))
            time.sleep(0.02)
        with self.server.lock:
            self.server.num_concurrent -= 1
        self.wfile.write(event(choices=[], usage={"completion_tokens": len(words)}) + b"data: [DONE]\n")

    def log_message(self, format: str, *words: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_clients_run_concurrently_and_answers_keep_the_prompts_order(stub: StubServer) -> None:
    prompts = [f"a{i} b{i} c{i}" for i in range(9)]
    bodies = [chat(prompt, max_tokens=7, stream=True) for prompt in prompts]
    answers = send_all(functools.partial(ask, stub.url), bodies, clients=3)
    assert stub.max_concurrent == 3
    assert [answer.text for answer in answers] == [prompt.replace(" ", "") for prompt in prompts]
    assert [answer.tokens for answer in answers] == [3] * 9
    assert sorted(map(json.dumps, stub.bodies)) == sorted(map(json.dumps, bodies))
    with pytest.raises(AuroraError, match=f"{stub.url} answered 429"):
        ask(stub.url, chat("refuse", stream=True))


def slowly(number: int) -> Answer:
    began = time.monotonic()
    time.sleep(0.01)
    return Answer(sent_s=began, ended_s=time.monotonic(), text=str(number), tokens=7)


def test_clients_are_kept_busy_until_the_end_and_each_item_is_sent_once() -> None:
    with sending(slowly, itertools.count(), clients=4) as running:
        assert running.wait(0.2)
    found = sorted(int(answer.text) for answer in running.answers)
    assert len(found) > 4
    assert found == list(range(len(found)))


def test_clients_end_when_nothing_is_left_and_pass_on_an_error() -> None:
    began = time.monotonic()
    with sending(slowly, iter(range(6)), clients=2) as running:
        assert not running.wait(60.0)
    assert len(running.answers) == 6
    with pytest.raises(ZeroDivisionError), sending(lambda n: 1 / n, iter([1, 0]), clients=2) as running:
        running.wait(60.0)
    assert time.monotonic() - began < 30


def test_requests_are_sent_at_their_times_though_others_run() -> None:
    began = time.monotonic()
    answers = send_at(slowly, itertools.count(), [0.0, 0.004, 0.004, 0.15])
    assert 0.15 <= time.monotonic() - began < 2
    assert answers[1].sent_s < answers[0].ended_s, "the second did not wait for the first"
    assert answers[3].sent_s - began >= 0.15
    assert {answer.text for answer in answers} == {"0", "1", "2", "3"}


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_interval_of_two_ratios_is_that_of_students_t_and_one_has_none() -> None:
    mean, low, high = interval([math.exp(0.1), math.exp(0.3)])
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)
    assert (mean, low, high) == pytest.approx((math.exp(0.2), math.exp(0.2 - half), math.exp(0.2 + half)), rel=1e-4)
    mean, low, high = interval([1.25])
    assert mean == pytest.approx(1.25)
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_percentile_is_not_beyond_the_largest_value() -> None:
    assert percentile_ms([0.01] * 49 + [0.1], 99) == pytest.approx(55.9)
    assert percentile_ms([0.03], 99) == pytest.approx(30)
    assert percentile_ms([], 99) is None


# -- servers -----------------------------------------------------------------------------------------------------------

SERVER = """
import http.server, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                                                "time.sleep(60)"])
pathlib.Path(sys.argv[2]).write_text(str(child.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.process
@pytest.mark.slow
def test_stopping_a_server_ends_its_child_processes(tmp_path: Path) -> None:
    port, pid_file = free_port(), tmp_path / "child"
    command = [sys.executable, "-c", SERVER, str(port), str(pid_file)]
    with started(command, {}, tmp_path / "log") as server:
        server.wait_until_ready(f"http://127.0.0.1:{port}/")
        child = psutil.Process(int(pid_file.read_text()))
        assert child.is_running()
        alone = psutil.Process(child.ppid()).memory_full_info().pss / 1e6
        assert server.memory_mb() > alone + 2, "its child counts too"
        assert 0 < server.age_s() < 600
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_server_gets_sigterm_when_its_benchmark_is_killed(tmp_path: Path) -> None:
    server = """
import os, pathlib, signal, sys, time
def end(*_):
    pathlib.Path("terminated").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path("up").touch()
time.sleep(60)
"""
    killed = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from aurora_lit.bench.servers import started
with started([sys.executable, "-c", {server!r}], {{}}, pathlib.Path("log")):
    time.sleep(60)
"""
    end = time.monotonic() + 60

    def wait_for(name: str) -> None:
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, f"the server has not {name}"
            time.sleep(0.02)

    with subprocess.Popen([sys.executable, "-c", killed], cwd=tmp_path) as process:
        wait_for("up")
        process.kill()
    wait_for("terminated")


def test_a_server_that_exits_at_start_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model')"]
    with (
        pytest.raises(AuroraError, match=f"see {tmp_path}/log: no such model"),
        started(command, {}, tmp_path / "log") as server,
    ):
        server.wait_until_ready("http://127.0.0.1:1/")


def test_another_checkout_is_run_even_from_a_folder_that_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "other" / "aurora_lit"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("""
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the other one")
config = open(sys.argv[-1]).read()
http.server.HTTPServer(("127.0.0.1", int(config.split("port:")[1].split()[0])), Ready).serve_forever()
""")
    monkeypatch.chdir(ROOT)
    config = load_config(None, [f"server.port={free_port()}"])
    with running_server(config, tmp_path / "log", code=package.parent) as url, LOOPBACK.open(f"{url}/ready") as answer:
        assert answer.read() == b"the other one"


def test_a_server_is_told_the_settings_that_are_not_their_default(tmp_path: Path) -> None:
    """Another checkout may not know all settings of this one."""
    config = load_config(None, ["engine.max_batch_size=3", "learn.enabled=false"])
    changed = changed_settings(config)
    assert (changed["engine"], changed["server"]) == ({"max_batch_size": 3}, {})
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(changed))
    assert load_config(tmp_path / "server.yaml", []) == config


def test_servers_are_asked_without_a_proxy_that_the_environment_names(
    stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps what it has read of the environment
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert get(stub.url, "/v1/models") == {"data": [{"id": "stub"}]}
    assert ask(stub.url, chat("a b", stream=True)).text == "ab"
