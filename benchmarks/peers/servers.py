"""A server that runs while it is measured: started in a session of its own, ended with all that it started.

If we are killed ourselves, the kernel tells the server to end.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from aurora_lit.errors import AuroraError
from aurora_lit.ipc.lifetime import die_with_parent

_START_S = 600.0
_END_S = 30.0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str], environ: Mapping[str, str], *, ready_url: str, log: Path) -> Iterator[None]:
    """The server, ready; `log` gets what it prints."""
    log.parent.mkdir(parents=True, exist_ok=True)
    follow = functools.partial(die_with_parent, os.getpid(), by=signal.SIGTERM)  # SIGTERM, so that it tidies up
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=os.environ | dict(environ),
            preexec_fn=follow, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_until_ready(server, ready_url, log)
            yield
        finally:
            _end(server)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AuroraError(f"the server ended at its start; {log} says why")
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AuroraError(f"the server was not ready after {_START_S:.0f} s; {log} says why")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Told to end; then it and every process that it started is made to."""
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
