"""The folder of one running server: private, in memory where there is such a file system, gone with the server.

A server that was killed cannot clean up, so the next one does: a folder that nobody locks has no server any more.
Leaves out what lies inside: the pages (ipc/engine_status.py, ipc/learner_status.py), the ring (ipc/ring.py), the settings.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

RING_NAME = "traces-0.ring"
"""The engine worker's trace ring."""
CONFIG_NAME = "config.yaml"
"""The server's settings as a learner needs them: paths absolute, no API key."""
_PREFIX = "aurora-lit-run-"


@contextlib.contextmanager
def run_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder of mode 0700, removed at the end; those of dead servers are removed first.

    parent: None takes /dev/shm, or the folder for temporary files where there is no /dev/shm.
    """
    parent = parent or _usual_parent()
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):  # OSError: it lives, it is another user's, or it just went
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def live_folders(parent: Path | None = None) -> list[Path]:
    """Folders of this user's running servers, newest first."""
    found: list[tuple[float, Path]] = []
    for folder in (parent or _usual_parent()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.stat()
            if status.st_uid == os.getuid() and _is_locked(folder):
                found.append((status.st_ctime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _usual_parent() -> Path:
    shared_memory = Path("/dev/shm")
    usable = shared_memory.is_dir() and os.access(shared_memory, os.W_OK)
    return shared_memory if usable else Path(tempfile.gettempdir())


def _is_locked(folder: Path) -> bool:
    try:
        with _locked(folder):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; OSError when another process holds it. The kernel lets go when the last holder ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
