"""Starts test processes in milliseconds: forks them from one process that has already imported everything.

    process = fork("support.tiny_server", "run_command", [...], stdout=folder / "out", stderr=folder / "err")
    process.wait(10)                       # its exit code, negative for a signal

The forking process (the host) starts with the first call, serves all workers of a run of pytest and ends with the run;
the forked processes end with the host. A server that is forked should also fork its engine worker, which would
otherwise be spawned, a new interpreter that imports everything again: see `fork_engine_workers`.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from aurora_lit.ipc.process_lifetime import die_with_parent
from support import child_environment

PRELOADED = (
    "aurora_lit.cli.main",
    "aurora_lit.distributed",
    "aurora_lit.learn.online.build",
    "aurora_lit.learn.online.loop",
    "aurora_lit.learn.online.process",
    "aurora_lit.models.partition",
    "aurora_lit.models.sharded_target",
    "aurora_lit.serve.api",
    "aurora_lit.serve.server",
    "aurora_lit.serve.worker.build",
    "aurora_lit.serve.worker.live_draft",
    "aurora_lit.serve.worker.loop",
    "support.fake_engine",
    "support.tiny_models",
)


class ForkedProcess:
    """A process of the host; as much of subprocess.Popen as tests need."""

    def __init__(self, host: _Host, pid: int) -> None:
        self._host, self.pid = host, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._host.request({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end; the exit code. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Host:
    """The pytest process's side of the host: one JSON line for a request, one for the answer."""

    def __init__(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(_ADDRESS)
            except OSError as error:  # another worker has started the host
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                listener.listen()
                listener.set_inheritable(True)
                command = [sys.executable, __file__, str(listener.fileno()), str(_RUN_PID)]
                os.spawnve(os.P_NOWAIT, sys.executable, command, _ENVIRONMENT)
            self._connection = _connect()
        self._lines = self._connection.makefile("rw")
        atexit.register(self._close)

    def request(self, message: dict[str, Any]) -> Any:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        assert answer, "the host cannot import the package; its error is on stderr"
        return json.loads(answer)

    def _close(self) -> None:
        self._lines.close()
        self._connection.close()


def _connect() -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(_ADDRESS)
            return connection
        except ConnectionRefusedError:  # another worker is about to listen
            connection.close()
            time.sleep(0.01)


_IS_WORKER = "PYTEST_XDIST_TESTRUNUID" in os.environ
_RUN_PID = os.getppid() if _IS_WORKER else os.getpid()
_ADDRESS = f"\0aurora-lit-tests-{_RUN_PID}"
"""A name for this run alone, in no folder; whoever takes it first starts the host."""
_ENVIRONMENT = child_environment()  # as it was before any test changed it

_host: _Host | None = None


def fork(
    module: str,
    function: str,
    arguments: Sequence[Any],
    *,
    stdout: Path,
    stderr: Path,
    environment: Mapping[str, str] | None = None,
) -> ForkedProcess:
    """Run `module.function(*arguments)` (plain data) in a new process; output is appended to the two files."""
    global _host
    _host = _host or _Host()
    pid = _host.request(
        {
            "module": module,
            "function": function,
            "arguments": list(arguments),
            "files": [os.devnull, str(stdout), str(stderr)],
            "environment": dict(environment or {}),
        }
    )
    return ForkedProcess(_host, pid)


def fork_engine_workers() -> None:
    """Let the server in this process fork its engine's processes, which it would spawn."""
    from aurora_lit.serve import backend

    backend.START_METHOD = "fork"


class Finished(NamedTuple):
    """How a program ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_program(code: str, *, timeout_s: float = 100.0, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a program in a new process until its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = fork("support.fork_host", "run_code", [code], stdout=out, stderr=err, environment=environment)
        return Finished(process.wait(timeout_s), out.read_text(), err.read_text())


def run_code(code: str) -> None:
    """Run a program, for `fork`."""
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})


# -- the host ------------------------------------------------------------------------------------------------------


def _serve_requests(listener: socket.socket, run_pid: int) -> None:
    """Until the run has ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    exit_codes: dict[int, int] = {}

    def reap(*_: object) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            exit_codes[pid] = os.waitstatus_to_exitcode(status)

    signal.signal(signal.SIGCHLD, reap)
    host_pid = os.getpid()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while psutil.pid_exists(run_pid):
        for key, _ in selector.select(timeout=0.1):
            if key.fileobj is listener:
                worker = listener.accept()[0]
                selector.register(worker, selectors.EVENT_READ, worker.makefile("rw"))
            elif not (line := key.data.readline()):  # that worker has ended
                selector.unregister(key.fileobj)
            else:
                message = json.loads(line)
                if "poll" in message:
                    answer = exit_codes.get(message["poll"])
                else:
                    answer = os.fork()
                    if answer == 0:
                        _run(message, host_pid)
                key.data.write(json.dumps(answer) + "\n")
                key.data.flush()


def _run(message: dict[str, Any], host_pid: int) -> None:
    """In the forked process; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent(host_pid)
        for number, path in enumerate(message["files"]):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.update(message["environment"])
        tempfile.tempdir = None  # it may be in the environment
        getattr(importlib.import_module(message["module"]), message["function"])(*message["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve_requests(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
