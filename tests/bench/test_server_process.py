"""Servers that benchmarks start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

import aurora_lit
from aurora_lit.bench.server_process import free_port, running_server
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
    with running_server(config, tmp_path / "log", code=package.parent) as url, urlopen(f"{url}/ready") as answer:
        assert answer.read() == b"the other one"
