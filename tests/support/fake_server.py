"""A whole server in a process of its own, with FakeEngine behind it.

with FakeServer(server={"max_queue": 2}, options={"round_s": 0.01}) as server:
    httpx.get(server.url + "/health")
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from aurora_lit.errors import AuroraError
from aurora_lit.ipc.process_lifetime import die_with_parent
from aurora_lit.settings import (
    AuroraConfig,
    CheckpointSettings,
    DraftSettings,
    EngineSettings,
    LearnSettings,
    ServerSettings,
)
from support import child_environment
from support.fake_engine import FakeOptions, build_fake_worker, load_tiny_tokenizer, prepare_nothing

MODEL = "tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FakeServer:
    """Starts on entry, is ready then; ends with SIGTERM on exit and leaves no process."""

    def __init__(
        self,
        *,
        server: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        checkpoints: Path | None = None,
        learner: str | None = None,
    ) -> None:
        """checkpoints: where draft versions live; learner: how the server's own one behaves (fake_learner.py)."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = {
            "server": {"port": self.port, "model_name": MODEL, **(server or {})},
            "options": options or {},
            "checkpoints": str(checkpoints or "/nonexistent"),
            "learner": learner,
            "parent": os.getpid(),
        }
        # The package may be installed or not; a helper thread per core would only slow the tests' neighbours down.
        environment = child_environment()
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> FakeServer:
        self.ready_line = self.process.stdout.readline() if self.process.stdout else ""
        if not self.ready_line:
            raise RuntimeError(f"no ready line; the server says: {self.process.communicate()[1]}")
        self.family = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(True))]
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        assert self.left_behind() == []

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 20) -> tuple[int, str]:
        """Send a signal and wait; exit code and what was written to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            stderr = self.process.communicate(timeout=timeout_s)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        except ValueError:  # ended before
            stderr = ""
        return self.process.returncode, stderr

    def left_behind(self, timeout_s: float = 5) -> list[int]:
        """Processes of this server that still run."""
        return [process.pid for process in psutil.wait_procs(_alive(self.family), timeout=timeout_s)[1]]

    def status(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/v1/aurora/status").json())

    def wait_until(self, condition: Any, timeout_s: float) -> float:
        """Poll the status until `condition(status)`; return the seconds it took."""
        began = time.monotonic()
        while not condition(self.status()):
            assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {self.status()}"
            time.sleep(0.01)
        return time.monotonic() - began


def _alive(pids: list[int]) -> list[psutil.Process]:
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except psutil.NoSuchProcess:
            pass
    return processes


def main(arguments: dict[str, Any]) -> None:
    from aurora_lit.serve import server
    from aurora_lit.serve.api import Backend

    die_with_parent(arguments["parent"])
    options = FakeOptions(**arguments["options"])
    server.WORKER_GRACE_S = options.worker_grace_s
    config = AuroraConfig(
        server=ServerSettings(**arguments["server"]),
        engine=EngineSettings(max_draft_tokens=2, lookup=False),
        draft=DraftSettings(checkpoint="anything"),
        checkpoint=CheckpointSettings(dir=arguments["checkpoints"]),
        learn=LearnSettings(enabled=arguments["learner"] is not None),
    )
    server.serve(
        config,
        backend=Backend(
            prepare=prepare_nothing,
            build_worker=functools.partial(build_fake_worker, options=options),
            load_tokenizer=load_tiny_tokenizer,
            learner_command=functools.partial(fake_learner, behaviour=arguments["learner"]),
        ),
    )


def fake_learner(run_folder: Path, *, behaviour: str) -> list[str]:
    script = Path(__file__).with_name("fake_learner.py")
    return [sys.executable, str(script), str(run_folder), str(os.getpid()), behaviour]


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except AuroraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
