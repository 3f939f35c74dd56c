"""Faults of a real server: a full queue, clients that leave, killed processes, signals, a hung round, a used port."""

import json
import os
import re
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest
from support.fake_server import MODEL, FakeServer, post_and_do_not_read

from aurora_lit.errors import ConfigError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.serve.server import check_address


def body(prompt="abc", **options):
    return {"model": MODEL, "prompt": prompt, "max_tokens": 400, **options}


class Stream:
    """A streamed completion read in a thread."""

    def __init__(self, server, **options):
        self.text, self.first_line = "", threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server, options), daemon=True)
        self._thread.start()

    def _read(self, server, options):
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body(stream=True, **options), timeout=30) as response:
            self.status_code = response.status_code
            for line in response.iter_lines():
                self.text += line + "\n"
                self.first_line.set()

    def begun(self):
        assert self.first_line.wait(10)
        return self

    def whole(self, timeout_s=15):
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the client hangs"
        return self.text


@pytest.fixture(scope="module")
def slow_server():
    """400 tokens take about 4 s; two slots, three choices at most."""
    options = {"round_s": 0.03, "max_batch_size": 2}
    with FakeServer(server={"max_queue": 3}, options=options) as running:
        yield running


def in_flight(count):
    return lambda now: now["queue"]["in_flight"] == count


def idle(now):
    return now["queue"]["running"] == now["queue"]["waiting"] == now["queue"]["in_flight"] == now["queue"]["calls"] == 0


def test_a_full_queue_answers_429(slow_server):
    with httpx.Client(base_url=slow_server.url, timeout=20) as client:
        streams = [Stream(slow_server, max_tokens=60) for _ in range(3)]
        slow_server.wait_until(in_flight(3), 5)
        refused = client.post("/v1/completions", json=body())
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert all("[DONE]" in stream.whole() for stream in streams), "those inside are served"
        assert client.post("/v1/completions", json=body(max_tokens=3)).status_code == 200
    slow_server.wait_until(idle, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_second(slow_server, stream):
    connection = post_and_do_not_read(slow_server.port, body(stream=stream, n=2))
    slow_server.wait_until(lambda now: now["queue"]["running"] == 2, 5)
    connection.close()
    took_s = slow_server.wait_until(idle, 3)
    assert took_s < 1


def test_a_client_that_leaves_while_waiting_gives_up_its_place(slow_server):
    streams = [Stream(slow_server, max_tokens=100).begun() for _ in range(2)]
    connection = post_and_do_not_read(slow_server.port, body())
    slow_server.wait_until(lambda now: now["queue"]["waiting"] == 1, 5)
    connection.close()
    assert slow_server.wait_until(lambda now: now["queue"]["waiting"] == 0, 3) < 1
    assert all("[DONE]" in stream.whole() for stream in streams)


def test_a_stop_string_ends_the_request_in_the_engine_too(slow_server):
    generated = slow_server.status()["tokens"]["generated"]
    with httpx.Client(base_url=slow_server.url, timeout=20) as client:
        answer = client.post("/v1/completions", json=body("abcdX", stop="X", n=2)).json()
    assert answer["usage"]["completion_tokens"] == 10
    assert slow_server.wait_until(idle, 3) < 1, "400 tokens would take 4 s"
    assert slow_server.status()["tokens"]["generated"] - generated <= 10 + 2 * 3 * 4, "a few rounds more at most"


def error_of(text):
    """The error event that ends a stream: a whole event, so a client sees it."""
    events = text.strip().split("\n\n")
    return json.loads(events[-1].removeprefix("data: "))["error"]


def test_a_killed_worker_turns_health_red_and_clients_get_an_error():
    # Longer than by default, so that all of it is asked in time on a busy machine too.
    with FakeServer(options={"round_s": 0.03, "worker_grace_s": 4.0}) as server:
        stream = Stream(server).begun()
        whole = {}
        plain = threading.Thread(
            target=lambda: whole.update(response=httpx.post(f"{server.url}/v1/completions", json=body(), timeout=20))
        )
        plain.start()
        server.wait_until(in_flight(2), 5)
        os.kill(server.status()["worker"]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        assert error_of(stream.whole())["code"] == "engine_dead"
        plain.join(5)
        assert time.monotonic() - killed < 2
        assert whole["response"].status_code == 503
        for path in ("/health", "/ready"):
            assert httpx.get(server.url + path).status_code == 503
        refused = httpx.post(f"{server.url}/v1/completions", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        code, stderr = server.end()
        assert code != 0
        assert "the engine worker" in stderr


def test_an_engine_that_fails_ends_every_call_with_an_error():
    with FakeServer(options={"round_s": 0.03}) as server:
        stream = Stream(server).begun()
        crashing = httpx.post(f"{server.url}/v1/completions", json=body("<|crash|>"), timeout=20)
        assert (crashing.status_code, crashing.json()["error"]["code"]) == (500, "engine_dead")
        assert error_of(stream.whole())["code"] == "engine_dead"
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "the fake engine crashed" in health.json()["status"]
        assert "the fake engine crashed" in server.end()[1]
        assert server.wait(10) == 2


def test_sigterm_lets_running_requests_finish():
    with FakeServer(options={"round_s": 0.03}) as server:
        folder = server.run_folder
        stream = Stream(server, max_tokens=90).begun()
        code, _ = server.end(signal.SIGTERM)
        assert code == 0
        assert stream.whole().endswith("data: [DONE]\n\n")
        assert server.left_behind() == []
        assert not folder.exists()


def test_sigterm_ends_what_takes_longer_than_drain_s():
    with FakeServer(server={"drain_s": 0.5}, options={"round_s": 0.05}) as server:
        stream = Stream(server).begun()
        began = time.monotonic()
        code, _ = server.end(signal.SIGTERM)
        assert code == 0
        assert time.monotonic() - began < 5
        assert error_of(stream.whole())["code"] == "shutting_down"


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_still_drains(number):
    """As Ctrl-C in a terminal, a service manager and a terminal that is closed send it."""
    with FakeServer(options={"round_s": 0.03}) as server:
        stream = Stream(server, max_tokens=60).begun()
        for pid in server.family[1:]:
            os.kill(pid, number)
        assert server.end(number)[0] == 0
        assert "[DONE]" in stream.whole()
        assert server.left_behind() == []


@pytest.mark.process
def test_an_http_process_that_stalls_does_not_stop_the_rounds_and_then_delivers_all_of_them():
    """Stalls it while the worker sends more than the socket's buffer holds."""
    options = {"round_s": 0.0005, "tokens_per_round": 1, "max_seq_len": 8192}
    with FakeServer(options=options) as server:
        folder = server.run_folder
        page = EngineStatusPage.open(folder / STATUS_NAME)
        (http,) = {pid for pid in server.family[1:] if pid != page.read().worker_pid and psutil.pid_exists(pid)}
        stream = Stream(server, max_tokens=3000).begun()
        os.kill(http, signal.SIGSTOP)
        stopped, until = page.read().rounds, time.monotonic() + 20
        assert stopped < 1000, "the answer must be longer than what was sent before"
        try:
            while page.read().running:
                assert time.monotonic() < until, f"rounds wait for the HTTP process: {page.read().rounds} of 3000"
                time.sleep(0.01)
        finally:
            os.kill(http, signal.SIGCONT)
        text = stream.whole()
        assert text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc" * 1000
        again = httpx.post(f"{server.url}/v1/completions", json=body(max_tokens=3), timeout=20)
        assert again.json()["choices"][0]["text"] == "abc"


@pytest.mark.process
def test_kill_9_of_the_main_process_leaves_nothing():
    with FakeServer() as server:
        os.kill(server.process.pid, signal.SIGKILL)
        assert server.left_behind() == []


def test_a_killed_http_process_ends_the_server_instead_of_letting_clients_hang():
    with FakeServer() as server:
        with httpx.Client(base_url=server.url) as client:
            client.get("/health")
            (http,) = {
                pid
                for pid in server.family
                for each in psutil.Process(pid).net_connections("tcp")
                if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == server.port
            }
            os.kill(http, signal.SIGKILL)
        assert server.wait(10) == 2
        assert server.left_behind() == []


def log_lines(server, level, process, name, message):
    """Lines of the log with the time, this level, process, logger and message."""
    begin = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {level} {process}\[\d+\] "
    return re.findall(f"^{begin}{re.escape(f'{name}: {message}')}$", server.stderr, re.MULTILINE)


@pytest.mark.process
def test_log_lines_tell_the_time_the_level_and_the_process_once():
    with FakeServer(learner="dies") as server:
        server.wait_until(lambda now: now["learner"]["restarts"] >= 1, 20)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"no HTTP\r\n\r\n")
            connection.settimeout(10)
            while connection.recv(4096):
                pass
        server.end()
    ended = "the learner ended (exit code 3); it restarts in 1 s, serving continues"
    assert len(log_lines(server, "WARNING", "server", "aurora_lit.serve.learner_child", ended)) == 1
    assert len(log_lines(server, "WARNING", "LitServer-0", "uvicorn.error", "Invalid HTTP request received.")) == 1
    assert server.stderr.count("Invalid HTTP request") == 1
    assert len(server.ready_line.splitlines()) == 1, "nothing more on stdout"


def test_an_engine_that_cannot_be_built_is_one_clear_error():
    server = FakeServer(options={"build_error": "no such weights"})
    assert server.wait(30) == 2
    said = "the engine could not be built"
    assert len(log_lines(server, "ERROR", "engine-worker", "aurora_lit.serve.engine_process", said)) == 1
    assert server.stderr.splitlines()[-1] == "AuroraError: the engine could not be built: RuntimeError: no such weights"


def test_a_used_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=rf"server\.port={other.getsockname()[1]} on 127\.0\.0\.1"):
            check_address("127.0.0.1", other.getsockname()[1])


@pytest.mark.process
def test_a_server_without_worker_ends_by_itself():
    with FakeServer(options={"worker_grace_s": 0.2}) as server:
        os.kill(server.status()["worker"]["pid"], signal.SIGKILL)
        assert server.wait(10) == 2


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads(number):
    server = FakeServer(options={"build_s": 30})
    while not (children := psutil.Process(server.process.pid).children(recursive=True)):  # the engine worker
        time.sleep(0.05)
    time.sleep(0.2)
    code, stderr = server.end(number)
    assert code == 0, stderr
    assert psutil.wait_procs(children, timeout=5)[1] == [], "nothing is left behind"


@pytest.mark.process
def test_a_worker_that_is_killed_while_the_model_loads_ends_the_start():
    server = FakeServer(options={"build_s": 30})
    while not (children := psutil.Process(server.process.pid).children()):
        time.sleep(0.05)
    children[0].kill()
    assert server.wait(10) == 2
    assert "the engine worker was killed (signal 9)" in server.stderr


@pytest.mark.process
def test_a_round_that_hangs_stops_the_heartbeat_until_it_ends():
    with FakeServer(options={"round_s": 2.0, "hang_timeout_s": 0.3}) as server:
        time.sleep(1)
        assert server.status()["worker"]["heartbeat_age_s"] < 0.9, "an idle worker lives, however long it waits"
        stream = Stream(server, max_tokens=1)
        server.wait_until(lambda now: now["worker"]["heartbeat_age_s"] > 1.2, 10)
        assert '"finish_reason":"length"' in stream.whole()
        assert server.wait_until(lambda now: now["worker"]["heartbeat_age_s"] < 0.9, 10) < 5
