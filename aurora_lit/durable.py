"""Makes files survive a crash of the machine: flushing to disk, replacing a file, exchanging two names at once.

Also locks folders that one process may write to, and keeps how a folder of results was begun, for work that is
continued after a crash.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux's renameat2


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, *pieces: bytes | memoryview, mode: int = 0o666) -> None:
    """Write a file under another name, flush it, and move it to `path`: at any moment, the old or the new one is there.

    `pieces`: its content, joined; `mode`: its permissions, less what umask takes away. One process may do this with a
    path at a time. Raises OSError; the old file is intact then.
    """
    temporary = _unfinished(path)
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.writelines(pieces)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def discard_unfinished(path: Path) -> None:
    """Delete what a process left that was killed while it replaced a file."""
    _unfinished(path).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def lock_file(path: Path) -> int:
    """A descriptor that holds a file's lock until it is closed; the file is made for its owner only.

    Raises BlockingIOError if another process holds it, and another OSError where the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        reason = "another process writes there" if isinstance(error, BlockingIOError) else error.strerror
        raise type(error)(error.errno, reason, str(path.parent)) from error
    return descriptor


def changed_at(path: Path) -> float:
    """A file's time of change; that of a file that another process has just renamed or deleted is now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def is_as_begun(path: Path, how: Mapping[str, Any]) -> bool:
    """Keep how a folder of results is begun; if it was begun before, whether that was in the same way."""
    text = json.dumps(how, indent=2) + "\n"
    if path.exists():
        return bool(json.loads(path.read_text(encoding="utf-8")) == json.loads(text))
    replace_file(path, text.encode())
    return True


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders atomically; False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    status = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(status == 0)
