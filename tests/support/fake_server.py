"""A whole server in a process of its own, on the engine without a model.

    with FakeServer(server={"max_queue": 2}, options={"round_s": 0.01}) as server:
        httpx.get(server.url + "/health")

By default it is forked from a process that has imported everything, which takes a tenth of a second. With spawn=True a
new interpreter runs it and LitServe spawns its worker, as in production, which takes four seconds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from aurora_lit.bench.servers import free_port
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.process_lifetime import die_with_parent
from aurora_lit.settings import (
    AuroraConfig,
    CheckpointSettings,
    DraftSettings,
    EngineSettings,
    LearnSettings,
    MemorySettings,
    ServerSettings,
)
from support import child_environment
from support.fake_engine import FakeOptions, build_fake_worker, load_tiny_tokenizer, prepare_nothing
from support.fork_host import ForkedProcess, fork, fork_engine_workers

MODEL = "tiny"
_START_TIMEOUT_S = 60.0


class FakeServer:
    """Starts at once, is ready on entry; ends with SIGTERM on exit, and then no process may be left."""

    def __init__(
        self,
        *,
        server: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        checkpoints: Path | None = None,
        learner: str | None = None,
        spawn: bool = False,
    ) -> None:
        """server: settings. options: of FakeOptions. learner: behaviour of the server's own one (fake_learner.py)."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        for path in (self._stdout, self._stderr):
            path.touch()
        arguments = {
            "server": {"port": self.port, "model_name": MODEL, **(server or {})},
            "options": options or {},
            "checkpoints": str(checkpoints or folder / "nonexistent"),
            "learner": learner,
        }
        self.process: ForkedProcess | subprocess.Popen[bytes]
        if spawn:
            with self._stdout.open("ab") as stdout, self._stderr.open("ab") as stderr:
                self.process = subprocess.Popen(
                    [sys.executable, __file__, json.dumps(arguments), str(os.getpid())],
                    stdout=stdout,
                    stderr=stderr,
                    env=child_environment(),
                )
        else:
            self.process = fork(
                "support.fake_server", "serve_forked", [arguments], stdout=self._stdout, stderr=self._stderr
            )

    def __enter__(self) -> FakeServer:
        end = time.monotonic() + _START_TIMEOUT_S
        while not self.ready_line.endswith("\n"):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not become ready; it says: {self.stderr}")
            time.sleep(0.005)
        self.family = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(True))]
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        assert self.left_behind() == []

    @property
    def run_folder(self) -> Path:
        """The folder in shared memory of a running server."""
        mapped = {mapping.path for mapping in psutil.Process(self.process.pid).memory_maps()}
        (folder,) = {Path(path).parent for path in mapped if "aurora-lit-run-" in path}
        return folder

    @property
    def ready_line(self) -> str:
        """What the server has printed: one line, once it is ready."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> tuple[int, str]:
        """Send a signal, unless the server has ended, and wait; exit code and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout_s), self.stderr

    def wait(self, timeout_s: float) -> int:
        """Wait until the server has ended; its exit code. Kills it after the timeout."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def left_behind(self, timeout_s: float = 5) -> list[int]:
        """Processes of this server that still run."""
        return [process.pid for process in psutil.wait_procs(_running(self.family), timeout=timeout_s)[1]]

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/v1/aurora/status", verify=False).json())

    def wait_until(self, condition: Callable[[dict[str, Any]], object], timeout_s: float) -> float:
        """Poll the status until `condition(status)`; return the seconds it took."""
        began = time.monotonic()
        while not condition(self.status()):
            assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {self.status()}"
            time.sleep(0.01)
        return time.monotonic() - began


def post_and_do_not_read(port: int, body: dict[str, Any]) -> socket.socket:
    """Ask for a text completion; the connection, for a client that leaves."""
    connection, content = socket.create_connection(("127.0.0.1", port)), json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def _running(pids: list[int]) -> list[psutil.Process]:
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.NoSuchProcess:
            pass
    return processes


# -- in the server's process ---------------------------------------------------------------------------------------


def serve_forked(arguments: dict[str, Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has servers ignore it
    fork_engine_workers()
    serve_fake(arguments)


def serve_fake(arguments: dict[str, Any]) -> None:
    from aurora_lit.logs import log_to_stderr
    from aurora_lit.serve import server
    from aurora_lit.serve.backend import Backend

    log_to_stderr("server")
    options = FakeOptions(**arguments["options"])
    server.WORKER_GRACE_S = options.worker_grace_s
    config = AuroraConfig(
        server=ServerSettings(**arguments["server"]),
        engine=EngineSettings(max_draft_tokens=2, lookup=False),
        memory=MemorySettings(capacity_mb=0),
        draft=DraftSettings(checkpoint="anything"),
        checkpoint=CheckpointSettings(dir=arguments["checkpoints"]),
        learn=LearnSettings(enabled=arguments["learner"] is not None),
    )
    backend = Backend(
        prepare=prepare_nothing,
        build_worker=functools.partial(build_fake_worker, options=options),
        load_tokenizer=functools.partial(load_tiny_tokenizer, options=options),
        learner_command=functools.partial(fake_learner, behaviour=arguments["learner"]),
    )
    try:
        server.serve(config, backend=backend)
    except AuroraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def fake_learner(run_folder: Path, *, behaviour: str) -> list[str]:
    """The command of a learner that behaves as asked."""
    script = Path(__file__).with_name("fake_learner.py")
    return [sys.executable, str(script), str(run_folder), str(os.getpid()), behaviour]


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    serve_fake(json.loads(sys.argv[1]))
