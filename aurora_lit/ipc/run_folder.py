"""The private folder of one running server: in memory if the system has such a file system, removed at the end.

A running server holds a lock on its folder. A killed server cannot clean up, so the next one to start removes folders
without a lock. Leaves out the contents: status pages (ipc/engine_status.py, ipc/learner_status.py), the trace ring
(ipc/ring.py), settings.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

RING_NAME, RINGS = "traces-0.ring", "traces-*.ring"
"""The engine worker's trace ring; those of several engines."""
CONFIG_NAME = "config.yaml"
"""The server's settings for a learner: absolute paths, no API key."""
FOLDER_VARIABLE = "AURORA_LIT_LEARNER_RUN_FOLDER"
"""Environment variable with which a learner's followers, copies of its command, find its run folder."""
_PREFIX = "aurora-lit-run-"


@contextlib.contextmanager
def run_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder of mode 0700, removed at the end. Folders of servers that no longer run are removed first.

    parent: None means `default_parent`.
    """
    parent = parent or default_parent()
    for abandoned in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(abandoned):  # OSError: in use, another user's, or just removed
            shutil.rmtree(abandoned, ignore_errors=True)
    # Under another name until it is locked, or a server that starts now would take it for an abandoned one.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    folder = unlocked.with_name(unlocked.name[1:])
    with _locked(unlocked):
        os.rename(unlocked, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def live_folders(parent: Path | None = None) -> list[Path]:
    """Folders of this user's running servers, newest first."""
    found: list[tuple[float, Path]] = []
    for folder in (parent or default_parent()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.stat()
            if status.st_uid == os.getuid() and _is_locked(folder):
                found.append((status.st_ctime, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def default_parent() -> Path:
    """Where servers make their run folders: /dev/shm; without it the folder for temporary files, and on a Mac
    ~/.cache/aurora-lit/run, which is made.
    """
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
        return shared_memory
    if sys.platform == "darwin":  # it deletes temporary files that nobody has read for three days
        folder = Path("~/.cache/aurora-lit/run").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    return Path(tempfile.gettempdir())


def _is_locked(folder: Path) -> bool:
    try:
        with _locked(folder):
            return False
    except BlockingIOError:
        return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the kernel frees when its process ends. Raises BlockingIOError if it is held."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe of that name would keep us waiting
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
