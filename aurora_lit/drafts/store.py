"""Changes the published versions: publishes, prunes, rolls back and promotes them, one process at a time.

Learner, server and command line use the folder at the same time. At whatever moment a process is killed, CURRENT names
a complete version: a version is written under another name, flushed to disk and then renamed, and so is CURRENT.

Leaves out the files' meaning and reading them (drafts/versions.py), and the decisions what to publish
(learn/online/trial.py) and what to roll back (drafts/live_watch.py).

    store = DraftStore(folder)
    store.publish(draft, record={"score": 2.1})             # "draft-000001", now current
    store.roll_back(bad="draft-000001", reason="slower")    # None: the starting draft
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_lit.drafts.versions import (
    CURRENT_NAME,
    HISTORY_NAME,
    RECORD_NAME,
    RETIRED_NAME,
    DraftVersion,
    PublishedVersions,
    version_name,
    version_number,
)
from aurora_lit.durable import sync
from aurora_lit.errors import CheckpointError

if TYPE_CHECKING:
    from aurora_lit.modules.draft.eagle3 import Eagle3Draft

KEPT_VERSIONS = 5
"""Older ones are deleted, but never the served one nor the one to roll back to."""
_LOCK_NAME = ".lock"
_TEMPORARY = ".new."
_log = logging.getLogger(__name__)


def lock(descriptor: int, folder: Path, *, wait: bool = True) -> None:
    """Lock an open file of a folder of versions, until it is closed.

    Raises BlockingIOError if another process holds the lock and `wait` is false, and CheckpointError if the folder's
    file system has no locks, as NFS and Lustre may not.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        remedy = "set checkpoint.dir to a folder on a local disk"
        raise CheckpointError(f"{folder}: its file system has no locks ({error.strerror}); {remedy}") from error


class DraftStore(PublishedVersions):
    """The versions in one folder; safe for several processes and threads. The first change creates the folder."""

    def __init__(self, folder: Path, *, keep: int = KEPT_VERSIONS) -> None:
        """keep: number of newest versions that pruning spares, as it does the current one and the one before it."""
        super().__init__(folder)
        self._keep = keep

    # -- publishing ------------------------------------------------------------------------------------------------

    def publish(self, draft: Eagle3Draft, *, record: dict[str, Any]) -> str:
        """Write a draft as the next version, make it current, and return its name. `record` must be JSON."""
        from aurora_lit.drafts.checkpoint import write_draft  # imports torch, which readers of versions do not need

        with self._locked() as files:
            name = version_name(1 + self._highest_number())
            with contextlib.suppress(CheckpointError):
                record = {"before": self.current(), **record}
            with files.new_version(name) as temporary:
                write_draft(draft, temporary)
                files.write(temporary / RECORD_NAME, json.dumps({"time": time.time(), **record}, indent=2) + "\n")
            files.point_to(name)
            self.log_event("published", version=name, **record)
            self._prune(files)
        return name

    def prune(self) -> None:
        """Delete the oldest versions beyond `keep`, but never the current one or the one to roll back to."""
        with self._locked() as files:
            self._prune(files)

    def _prune(self, files: _Files) -> None:
        current = self.current()
        spared = {current, self.version_before(current) if current is not None else None}
        for name in self.names()[: -self._keep]:
            if name not in spared:
                # Renamed first, so that a half-deleted version does not look like a complete one.
                deleted = files.unused(f"gone.{name}")
                try:
                    os.replace(self.folder / name, deleted)
                    self.log_event("pruned", version=name)
                    shutil.rmtree(deleted)
                except OSError as error:
                    left = deleted if deleted.exists() else self.folder / name
                    _log.warning("%s cannot be deleted (%s); delete it by hand", left, error.strerror)

    def _highest_number(self) -> int:
        """The highest number used, counting a deleted version that CURRENT still names: numbers are never reused."""
        current = ""
        with contextlib.suppress(CheckpointError):  # invalid: it is about to be overwritten
            current = self.current() or ""
        return max(map(version_number, [current, *self.names()]))

    # -- retiring and promoting ------------------------------------------------------------------------------------

    def roll_back(self, *, bad: str, reason: str, wait: bool = True) -> str | None:
        """Retire a version; if it is current, make the newest older one that is not retired current.

        Returns the current version; None: the starting draft. A newer version published in the meantime stays current.
        wait: false raises BlockingIOError if another process is changing the versions.
        """
        with self._locked(wait=wait) as files:
            current = self.current()
            if current == bad:
                current = self.version_before(bad)
                files.point_to(current)
            files.retire(bad, reason)
            self.log_event("rolled_back", version=bad, to=current, reason=reason)
        return current

    def roll_back_to(self, name: str | None, *, reason: str) -> None:
        """Make an older version (None: the starting draft) current and retire all newer ones."""
        with self._locked() as files:
            number = 0 if name is None else self._existing(name).number
            for version in self.versions():
                if version.number > number and version.retired is None:
                    files.retire(version.name, reason)
                    self.log_event("retired", version=version.name, reason=reason)
            files.reinstate(name)
            files.point_to(name)
            self.log_event("promoted", version=name or "", reason=reason)

    def promote(self, name: str) -> None:
        """Make a version current, whatever its scores, and no longer retired. CheckpointError if it does not exist."""
        with self._locked() as files:
            self._existing(name)
            files.reinstate(name)
            files.point_to(name)
            self.log_event("promoted", version=name)

    def _existing(self, name: str) -> DraftVersion:
        for version in self.versions():
            if version.name == name:
                return version
        existing = ", ".join(self.names()) or "none"
        raise CheckpointError(f"there is no version {name} in {self.folder}; existing versions: {existing}")

    def log_event(self, event: str, *, version: str, **details: Any) -> None:
        """Append an event to the history; if the disk is full, the line is lost, but no error raised."""
        line = json.dumps({"time": time.time(), "event": event, "version": version, **details})
        with contextlib.suppress(OSError), (self.folder / HISTORY_NAME).open("ab+") as history:
            end = history.seek(0, os.SEEK_END)
            history.seek(max(0, end - 1))
            cut_short = history.read() not in (b"", b"\n")  # by a crash: end that line first
            history.write(b"\n" * cut_short + line.encode() + b"\n")

    @contextlib.contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[_Files]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, self.folder, wait=wait)
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):  # of a killed process: any other would hold the lock
                # What is another user's, or in use over NFS, may have to stay.
                with contextlib.suppress(OSError):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield _Files(self.folder)
        finally:
            os.close(descriptor)


class _Files:
    """Changes single files of the folder, each at once and durably; its lock is held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def new_version(self, name: str) -> Iterator[Path]:
        """A temporary folder to fill, which is the version's at the end of the block. Raises OSError."""
        temporary = self.unused(name)
        try:
            temporary.mkdir()
            yield temporary
        except OSError:  # a full disk, which what was written would keep full
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        os.replace(temporary, self._folder / name)
        sync(self._folder)

    def point_to(self, name: str | None) -> None:
        """Make a version (None: the starting draft) current."""
        if name is None:
            (self._folder / CURRENT_NAME).unlink(missing_ok=True)
            sync(self._folder)
        else:
            self.write(self._folder / CURRENT_NAME, name + "\n")

    def retire(self, name: str, reason: str) -> None:
        """Mark a version, if it exists."""
        if version_number(name) and (self._folder / name).is_dir():
            self.write(self._folder / name / RETIRED_NAME, " ".join(reason.split()) + "\n")

    def reinstate(self, name: str | None) -> None:
        """Take the mark away."""
        if name is not None:
            (self._folder / name / RETIRED_NAME).unlink(missing_ok=True)

    def write(self, path: Path, content: str) -> None:
        """Write a small file atomically and flush it to disk."""
        temporary = self._folder / f"{_TEMPORARY}{path.name}"
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    def unused(self, name: str) -> Path:
        """A temporary name; with a number if one is left from an earlier process and cannot be deleted."""
        unused, number = self._folder / f"{_TEMPORARY}{name}", 1
        while unused.exists():
            number += 1
            unused = self._folder / f"{_TEMPORARY}{name}.{number}"
        return unused
