"""A server that is started again whenever it ends, as a service manager would, in a mount namespace of its own.

Leaves out what is done to it (faults.py) and what is read of it (watch.py).

    enter_mounts()                                  # as root: /dev/shm is then this run's own, and small
    with supervised(settings, folder) as server:
        server.wait_until_healthy(60)
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from aurora_lit.bench.load import LOOPBACK, status
from aurora_lit.bench.servers import Server, started_aurora
from aurora_lit.errors import AuroraError

KEY_VARIABLE = "AURORA_LIT_API_KEY"
_MOUNTED = "AURORA_LIT_SOAK_MOUNTS"
_SHM_MB, _CHECKPOINTS_MB = 512, 1024
"""Versions of a draft of 31 MB, and twice the state of its learner, need 700."""
_CHECK_S = 3.0


def enter_mounts(module: str) -> None:
    """Run this command again in a mount namespace whose /dev/shm is its own, if this user may; else nothing happens."""
    command = ["unshare", "--mount", "--propagation", "private"]
    mount = f"mount -t tmpfs -o size={_SHM_MB}m,mode=1777 tmpfs /dev/shm"
    if _MOUNTED in os.environ or not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return
    if subprocess.run([*command, "sh", "-c", mount], capture_output=True).returncode == 0:
        script = f'{mount} && exec "$@"'
        again = ["sh", "-c", script, "sh", sys.executable, "-m", module, *sys.argv[1:]]
        os.environ[_MOUNTED] = "1"
        os.execvp(command[0], [*command, *again])


def has_mounts() -> bool:
    """True in the namespace of `enter_mounts`."""
    return _MOUNTED in os.environ


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make a folder that is a small file system of its own, if this is the namespace for it; yields whether it is."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={_CHECKPOINTS_MB}m", "tmpfs", str(folder)]
    is_mounted = has_mounts() and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


class Supervised:
    """The server that runs now; see the file's example."""

    def __init__(self, settings: Sequence[str], folder: Path, url: str) -> None:
        """folder: for its logs, one for each start, and its temporary files."""
        self.url, self.key, self.settings, self._folder = url, secrets.token_urlsafe(24), settings, folder
        self.exits: list[tuple[float, int]] = []
        """When each server before this one had ended (monotonic), and its exit code."""
        self.server: Server | None = None
        self._ending = threading.Event()
        # The kernel ends the server with the thread that started it, so this thread lives as long.
        self._thread = threading.Thread(target=self._run, name="supervisor")
        (folder / "tmp").mkdir()
        os.environ |= {KEY_VARIABLE: self.key, "TMPDIR": str(folder / "tmp")}
        self._thread.start()

    @property
    def lives(self) -> int:
        """Number of servers that have ended."""
        return len(self.exits)

    def logs(self) -> list[Path]:
        """What each of them printed."""
        return sorted(self._folder.glob("server-*.log"))

    def main(self) -> psutil.Process:
        """The main process. Raises AuroraError while there is none."""
        if self.server is None:
            raise AuroraError("no server runs")
        return psutil.Process(self.server.process.pid)

    def member(self, role: str) -> psutil.Process:
        """The process of a role of `Server.role`. Raises AuroraError if there is none."""
        if role == "main":
            return self.main()
        if self.server is not None:
            for member in self.server.members():
                with suppress(psutil.Error):
                    if self.server.role(member) == role:
                        return member
        raise AuroraError(f"the server has no {role} process now")

    def is_healthy(self) -> bool:
        """Whether /health is 200."""
        try:
            with LOOPBACK.open(f"{self.url}/health", timeout=_CHECK_S) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_healthy(self, within_s: float) -> float:
        """Seconds until /health is 200. Raises AuroraError."""
        began = time.monotonic()
        while time.monotonic() < began + within_s:
            if self.is_healthy():
                return time.monotonic() - began
            time.sleep(0.1)
        raise AuroraError(f"/health was not 200 within {within_s:.0f} s")

    def wait_for_learner(self, within_s: float) -> None:
        """Wait until its learner runs. Raises AuroraError."""
        deadline = time.monotonic() + within_s
        while status(self.url, key=self.key)["learner"]["state"] != "running":
            if time.monotonic() > deadline:
                raise AuroraError(f"no learner ran within {within_s:.0f} s")
            time.sleep(0.2)

    def end(self) -> None:
        """End the server, and start no other."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            log = self._folder / f"server-{self.lives:03d}.log"
            with started_aurora(self.settings, log) as server:
                self.server = server
                while server.process.poll() is None and not self._ending.wait(0.05):
                    pass
                self.server = None
            self.exits.append((time.monotonic(), server.process.returncode))
            self._ending.wait(0.5)


@contextmanager
def supervised(settings: Sequence[str], folder: Path, port: int) -> Iterator[Supervised]:
    """A server on this port with a key, until the end of the block."""
    key = f"server.api_key=${{oc.env:{KEY_VARIABLE}}}"
    server = Supervised([*settings, key, f"server.port={port}"], folder, f"http://127.0.0.1:{port}")
    try:
        server.wait_until_healthy(300.0)
        yield server
    finally:
        server.end()
