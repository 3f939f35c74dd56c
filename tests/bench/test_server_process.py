"""Servers that benchmarks start."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import aurora_lit
from aurora_lit.bench import online
from aurora_lit.bench.server_process import LOOPBACK, free_port, running_server, wait_until_ready
from aurora_lit.config import load_config


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


def test_a_server_gets_sigterm_when_its_benchmark_is_killed(tmp_path: Path) -> None:
    server = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path("terminated").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path("up").touch()
time.sleep(60)
"""
    bench = f"""
import sys, time
from aurora_lit.bench.server_process import _start
_start([sys.executable, "-c", {server!r}], sys.stderr)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", bench], cwd=tmp_path) as process:
        until((tmp_path / "up").exists)
        process.kill()
    until((tmp_path / "terminated").exists)


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
    monkeypatch.chdir(Path(aurora_lit.__file__).parents[1])
    config = load_config(None, [f"server.port={free_port()}"])
    with running_server(config, tmp_path / "log", code=package.parent) as url, LOOPBACK.open(f"{url}/ready") as answer:
        assert answer.read() == b"the other one"


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"object": "list", "data": []}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_servers_are_asked_without_a_proxy_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps what it has read of the environment
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    runs: Any = SimpleNamespace(poll=lambda: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            wait_until_ready(url, runs, tmp_path / "log", within_s=10)
            assert online._status(url)["data"] == []
            with online._client(url) as client:
                assert client.models.list().data == []
        finally:
            server.shutdown()
            thread.join()
