"""The server's own learner: a child process that may end, hang or fail to start while serving continues.

Serving knows of learning only its command line. A learner that ends by a fault is restarted, with a longer wait each
time, and hourly at last; one that ends with exit code 0 is not. Leaves out what a learner does, and learners started by
others.

    child = LearnerChild(learner_command(run_folder), page)
    child.start()          # returns at once; a thread watches the child
    child.end()            # SIGTERM, some seconds to save its state, SIGKILL
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.ipc.process_lifetime import end_first_without_memory, module_command

RESTART_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before each restart; after each further fault in a row it is RARELY_S."""
RARELY_S = 3600.0
_SETTLED_S = 300.0
"""After running for this long, earlier faults no longer count."""
_GRACE_S = 12.0
"""From SIGTERM to SIGKILL: for a step, and for saving the state on a slow disk. With server.drain_s and what the engine
worker may take before, it is less than the 30 s that service managers usually wait."""
_log = logging.getLogger(__name__)


def learner_command(run_folder: Path) -> list[str]:
    """`aurora-lit learn` on this run folder; it ends with this process."""
    return [*module_command("aurora_lit"), "learn", "--run-folder", str(run_folder), "--parent", str(os.getpid())]


class LearnerChild:
    """Starts the learner and restarts it after faults; see the file's example."""

    def __init__(
        self, command: Sequence[str], page: LearnerStatusPage, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """page: writable; written to only while the child does not run. environment: beside this process's."""
        self._command, self._page, self._environment = command, page, dict(environment or {})
        self._is_ending = threading.Event()
        # The kernel kills the child when the thread that started it ends, so this thread lives as long as the server.
        self._thread = threading.Thread(target=self._run_with_restarts, name="learner", daemon=True)

    def start(self) -> None:
        """Start the learner."""
        self._thread.start()

    def end(self) -> None:
        """End the child and wait for it."""
        self._is_ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run_with_restarts(self) -> None:
        faults = 0
        while not self._is_ending.is_set():
            began = time.monotonic()
            self._page.write(error="")  # of the learner before; the next one may end before it attaches
            code = self._run_once()
            if self._is_ending.is_set():
                return
            if code == 0:
                _log.warning("the learner has left (exit code 0) and starts again only with the engine")
                return
            faults = 1 if time.monotonic() - began > _SETTLED_S else faults + 1
            status = self._page.read()
            error = _with_cause(status.error, code)
            is_rare = faults > len(RESTART_AFTER_S)
            wait_s = RARELY_S if is_rare else RESTART_AFTER_S[faults - 1]
            level = logging.ERROR if is_rare else logging.WARNING
            _log.log(level, "the learner ended (%s); it restarts in %.0f s, serving continues", _cause(code), wait_s)
            if is_rare:
                error = f"not started again for {RARELY_S / 60:.0f} minutes: {error}"
            self._page.write(restarts=status.restarts + 1, error=error)
            self._is_ending.wait(wait_s)

    def _run_once(self) -> int:
        """Run the child until it ends; its exit code, negative for a signal."""
        try:
            # In a session of its own: Ctrl-C in the terminal is meant for the server, which ends the learner.
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            _log.error("the learner cannot be started: %s", error)
            return 1
        end_first_without_memory(process.pid)
        while process.poll() is None and not self._is_ending.wait(0.2):
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


def _with_cause(error: str, code: int) -> str:
    """What the learner told, and why it ended: it tells faults, but not what killed it."""
    if not error:
        return _cause(code)
    return error if code >= 0 else f"{_cause(code)}; {error}"
