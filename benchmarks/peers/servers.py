"""Runs a server while it is measured: in its own session, and stopped together with every process it started.

If this process is killed, the kernel signals the server to end.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from aurora_lit.bench.server_process import wait_until_ready
from aurora_lit.ipc.process_lifetime import die_with_parent

_START_S = 600.0
_END_S = 30.0


class Server:
    """A running server."""

    def __init__(self, pid: int) -> None:
        self._pid, self._started_s = pid, time.monotonic()

    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started_s

    def memory_mb(self) -> float:
        """MB of all its processes; shared pages are counted once (PSS)."""
        parent = psutil.Process(self._pid)
        return sum(process.memory_full_info().pss for process in (parent, *parent.children(recursive=True))) / 1e6


@contextmanager
def running(command: Sequence[str], environ: Mapping[str, str], *, ready_url: str, log: Path) -> Iterator[Server]:
    """Start a server, wait until it is ready, and stop it at the end; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    follow = functools.partial(die_with_parent, os.getpid(), by=signal.SIGTERM)  # SIGTERM, so that it can clean up
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(environ),
            preexec_fn=follow,
            start_new_session=True,
        )
        started = Server(server.pid)
        try:
            wait_until_ready(ready_url, server, log, within_s=_START_S)
            yield started
        finally:
            _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Terminate the server, then kill it and whatever it started if they have not ended."""
    family = []
    if server.poll() is None:
        family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    try:
        server.wait(_END_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)
