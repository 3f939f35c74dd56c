"""Servers that are started, watched and ended, with every process that they started.

    with running_server(config, Path("log")) as url:
        ...

Leaves out their requests (load.py).
"""

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import yaml

from aurora_lit.bench.load import LOOPBACK, Json
from aurora_lit.config import AuroraConfig
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.process_lifetime import die_with_parent, module_command

_START_S, _END_S = 600.0, 60.0
"""Longest waits for a server to become ready, and to end."""


def free_port() -> int:
    """A free TCP port of the loopback interface, below those that systems give to connections: it stays free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A server's main process, and those that it started."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log, self._started_s = process, log, time.monotonic()

    def age_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._started_s

    def members(self) -> list[psutil.Process]:
        """All its processes."""
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def role(self, member: psutil.Process) -> str:
        """Which of our server's processes this is."""
        command = " ".join(member.cmdline())
        if member.pid == self.process.pid:
            return "main"
        for words, name in ((" learn ", "learner"), ("resource_tracker", "resource tracker")):
            if words in command:
                return name
        if "spawn_main" in command:
            return "engine worker"
        return "HTTP" if any(c.status == psutil.CONN_LISTEN for c in member.net_connections("tcp")) else "queue manager"

    def memory_by_role_mb(self) -> dict[str, float]:
        """MB of the processes of each role; memory that processes share is divided among them (PSS)."""
        found: dict[str, float] = {}
        for member in self.members():
            role = self.role(member)
            found[role] = found.get(role, 0.0) + member.memory_full_info().pss / 1e6
        return found

    def memory_mb(self) -> float:
        """MB of all its processes."""
        return sum(self.memory_by_role_mb().values())

    def wait_until_ready(self, url: str, *, within_s: float = _START_S) -> None:
        """Wait until `url` answers 200. Raises AuroraError if the server ends before, or after `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            self.check_runs()
            try:
                with LOOPBACK.open(url, timeout=5) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise AuroraError(f"the server was not ready after {within_s:.0f} s; see {self.log}")

    def check_runs(self) -> None:
        """Raise AuroraError, with the end of its log, if the server has ended."""
        if self.process.poll() is not None:
            last = self.log.read_text(errors="replace")[-2000:]
            raise AuroraError(f"the server exited while starting; see {self.log}: {last}")


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Start a server in a session of its own, and at the end end it with every process that it started.

    It gets SIGTERM, so that it can clean up, when this process ends in any way. Its output goes to `log`.
    """
    follow = functools.partial(die_with_parent, os.getpid(), by=signal.SIGTERM)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=os.environ | dict(environment),
            preexec_fn=follow,
            start_new_session=True,
        )
        server = Server(process, log)
        try:
            yield server
        finally:
            _end(server)


def _end(server: Server) -> None:
    """Terminate a server, then kill it and whatever it started if they have not ended."""
    family = server.members()[1:] if server.process.poll() is None else []
    server.process.terminate()
    try:
        server.process.wait(_END_S)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive)


@contextmanager
def started_aurora(arguments: Sequence[str], log: Path, *, code: Path | None = None) -> Iterator[Server]:
    """Start `aurora-lit serve` with these arguments. code: a checkout whose package it runs; None: this one."""
    # Not the working directory, which `python -m` would look into first: it may be a checkout as well.
    other = {} if code is None else {"PYTHONPATH": str(code.resolve()), "PYTHONSAFEPATH": "1"}
    with started([*module_command("aurora_lit"), "serve", *arguments], other, log) as server:
        yield server


@contextmanager
def running_server(config: AuroraConfig, log: Path, *, code: Path | None = None) -> Iterator[str]:
    """A running `aurora-lit serve`, with all settings that are not their default; yields its URL.

    code: a checkout whose package it runs, which must know those settings and keeps its own defaults; None: this one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "server.yaml"
        path.write_text(yaml.safe_dump(changed_settings(config)))
        with started_aurora(["--config", str(path)], log, code=code) as server:
            url = f"http://127.0.0.1:{config.server.port}"
            server.wait_until_ready(f"{url}/ready")
            yield url


def changed_settings(config: AuroraConfig) -> dict[str, Json]:
    """Section → key → value of the settings that are not their default."""
    default = asdict(AuroraConfig())
    return {
        name: {key: value for key, value in section.items() if value != default[name][key]}
        for name, section in asdict(config).items()
    }
