"""The server's own learner: a child process that may end, hang or never come up while serving goes on.

Serving knows of learning only this command line. A learner that ends by a fault is started again, later each time; one
that leaves in order (exit code 0) is let go. Leaves out what a learner does, and learners that others attach.

    child = LearnerChild(learner_command(run_folder), page)
    child.start()          # returns at once; a thread watches from here on
    child.end()            # SIGTERM, a moment to save its state, SIGKILL
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from aurora_lit.ipc.learner_status import LearnerBlock

RESTART_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before it is started again; after as many faults in a row it stays dead."""
_SETTLED_S = 300.0
"""A learner that has run for so long starts with a clean slate."""
_GRACE_S = 5.0
_log = logging.getLogger(__name__)


def learner_command(run_folder: Path) -> list[str]:
    """`aurora-lit learn` on this run folder, which ends with this process."""
    return [sys.executable, "-m", "aurora_lit", "learn", "--run-folder", str(run_folder), "--parent", str(os.getpid())]


class LearnerChild:
    """Starts the learner and keeps it up; see the file's example."""

    def __init__(self, command: Sequence[str], page: LearnerBlock) -> None:
        """page: writable; written to only while the child is dead."""
        self._command, self._page = command, page
        self._ending = threading.Event()
        # The kernel ends the child with the thread that started it, so this one lives as long as the server.
        self._thread = threading.Thread(target=self._keep_up, name="learner", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """End the child and wait for it."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep_up(self) -> None:
        faults = 0
        while not self._ending.is_set():
            began = time.monotonic()
            code = self._run()
            if self._ending.is_set() or code == 0:
                return
            faults = 1 if time.monotonic() - began > _SETTLED_S else faults + 1
            if faults > len(RESTART_AFTER_S):
                _log.error("the learner ended again (%s) and stays so; serving goes on", _cause(code))
                return
            wait_s = RESTART_AFTER_S[faults - 1]
            _log.warning("the learner ended (%s); it starts again in %.0f s, serving goes on", _cause(code), wait_s)
            now = self._page.read()
            self._page.write(restarts=now.restarts + 1, error=now.error or _cause(code))
            self._ending.wait(wait_s)

    def _run(self) -> int:
        """One life of the child; its exit code, negative for a signal."""
        try:
            # A session of its own: Ctrl-C in the terminal is for the server, which ends it.
            process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            _log.error("the learner cannot be started: %s", error)
            return 1
        while process.poll() is None and not self._ending.wait(0.2):
            pass
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()


def _cause(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
