"""Runs `aurora-lit serve` in a process of its own, for benchmarks over HTTP."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from aurora_lit.config import AuroraConfig, to_yaml
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.process_lifetime import die_with_parent, module_command

_START_S = 300.0
"""Longest wait for a server to become ready."""
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine. A proxy that the environment names would look for them on its own."""


def free_port() -> int:
    """A free TCP port of the loopback interface, below those that systems give to connections: it stays free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running_server(config: AuroraConfig, log: Path, *, code: Path | None = None) -> Iterator[str]:
    """A running server, in a process that SIGTERM ends; yields its URL. Its output goes to `log`.

    `code`: a checkout whose package it runs; None: this one.
    """
    url = f"http://127.0.0.1:{config.server.port}"
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as output:
        path = Path(scratch) / "server.yaml"
        path.write_text(to_yaml(config))
        # Not the working directory, which `python -m` would look into first: it may be a checkout as well.
        other = {} if code is None else {"PYTHONPATH": str(code.resolve()), "PYTHONSAFEPATH": "1"}
        environment = os.environ | other
        server = _start([*module_command("aurora_lit"), "serve", "--config", str(path)], output, environment)
        try:
            wait_until_ready(f"{url}/ready", server, log, within_s=_START_S)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _start(
    command: Sequence[str], output: IO[str], environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that gets SIGTERM, so that it cleans up, when this process ends in any way."""
    follow = functools.partial(die_with_parent, os.getpid(), by=signal.SIGTERM)
    return subprocess.Popen(command, stdout=output, stderr=output, env=environment, preexec_fn=follow)


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path, *, within_s: float) -> None:
    """Wait until `url` answers 200. Raises AuroraError if the server exits before, or after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AuroraError(f"the server exited while starting; see {log}")
        try:
            with LOOPBACK.open(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AuroraError(f"the server was not ready after {within_s:.0f} s; see {log}")
