"""Servers that benchmarks start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


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
