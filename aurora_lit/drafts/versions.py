"""The published versions of a deployment's draft: numbered folders, and a file that names the current one.

    FOLDER/draft-000001/   draft-000002/ …   checkpoints (drafts/checkpoint.py), each with record.json: scores, time
    FOLDER/draft-000002/RETIRED              marks a version that was rolled back; contains the reason
    FOLDER/CURRENT                           name of the version to serve; without it, the starting draft is served
    FOLDER/history.jsonl                     one line for each event; for people, no code decides by it
    FOLDER/.lock                             held during every change

Learner, server and command line use the folder at the same time. At whatever moment a process is killed, CURRENT names
a complete version: a version is written under another name, flushed to disk and then renamed, and so is CURRENT.

Leaves out loading and validating a draft (drafts/checkpoint.py), and the decisions what to publish
(learn/online/gate.py) and what to roll back (drafts/rollback.py).

    store = DraftStore(folder, keep=5)
    store.publish(draft, record={"score": 2.1})             # "draft-000001", now current
    store.roll_back(bad="draft-000001", reason="slower")    # None: the starting draft
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_lit.config import AuroraConfig, versions_folder
from aurora_lit.durable import sync
from aurora_lit.errors import CheckpointError

if TYPE_CHECKING:
    from aurora_lit.drafts.checkpoint import TargetShape
    from aurora_lit.modules.draft.eagle3 import Eagle3Draft

CURRENT_NAME, HISTORY_NAME, RECORD_NAME, RETIRED_NAME = "CURRENT", "history.jsonl", "record.json", "RETIRED"
_LOCK_NAME = ".lock"
_NAME = re.compile(r"draft-(\d{6,})")
_TEMPORARY = ".new."
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DraftVersion:
    """One published version."""

    name: str
    number: int
    record: dict[str, Any]
    """Scores, steps and `time` (seconds since 1970), as of publishing."""
    retired: str | None
    """Why it was rolled back; None if it was not."""


def version_number(name: str) -> int:
    """42 for "draft-000042"; 0 for any other name, which is the starting draft's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def version_name(number: int) -> str:
    """ "draft-000042" for 42."""
    return f"draft-{number:06d}"


def settings_to_serve(folder: Path, config: AuroraConfig) -> str:
    """The settings with which a server begins with the draft in `folder` and its weights.

    A published version would be served instead, and a server that learns from scratch publishes one as it starts.
    """
    is_published = DraftStore(versions_folder(config), keep=config.checkpoint.keep).has_current
    settings = [f"draft.checkpoint={folder}"]
    settings += ["learn.from_scratch=false"] if config.learn.from_scratch else []
    settings += ["checkpoint.run=NEW"] if config.learn.from_scratch or is_published else []
    return " ".join(settings)


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


class DraftStore:
    """The versions in one folder; safe for several processes and threads. The first change creates the folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """keep: number of newest versions that pruning spares, as it does the current one and the one before it."""
        self.folder, self._keep = folder, keep

    def publish(self, draft: Eagle3Draft, *, record: dict[str, Any]) -> str:
        """Write a draft as the next version, make it current, and return its name. `record` must be JSON."""
        from aurora_lit.drafts.checkpoint import write_draft  # imports torch, which readers of versions do not need

        with self._locked():
            name = version_name(1 + self._highest_number())
            temporary = _unused(self.folder / f"{_TEMPORARY}{name}")
            with contextlib.suppress(CheckpointError):
                record = {"before": self.current(), **record}
            try:
                temporary.mkdir()
                write_draft(draft, temporary)
                self._write(temporary / RECORD_NAME, json.dumps({"time": time.time(), **record}, indent=2) + "\n")
            except OSError:  # a full disk, which what was written would keep full
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            os.replace(temporary, self.folder / name)
            sync(self.folder)
            self._point_to(name)
            self.log_event("published", version=name, **record)
            self._prune()
        return name

    def current(self) -> str | None:
        """The version to serve; None: the starting draft. Raises CheckpointError if CURRENT is invalid."""
        try:
            name = (self.folder / CURRENT_NAME).read_text(encoding="utf-8").removesuffix("\n")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.folder / CURRENT_NAME} cannot be read: {error}") from error
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{self.folder / CURRENT_NAME} holds {name[:80]!r}, which is not a version")
        return name

    def versions(self) -> list[DraftVersion]:
        """All versions on disk, oldest first."""
        found = []
        for name in self._names():
            folder = self.folder / name
            try:
                record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # pruned in the meantime, or copied here by hand
                record = {}
            try:
                retired = (folder / RETIRED_NAME).read_text(encoding="utf-8").strip()
            except OSError:
                retired = None
            found.append(DraftVersion(name=name, number=version_number(name), record=record, retired=retired))
        return found

    def version_before(self, name: str) -> str | None:
        """The version that was current when `name` was published; if that one is retired or gone, the newest older one
        that is not. None: the starting draft."""
        number, versions = version_number(name), self.versions()
        older = [version.name for version in versions if version.number < number and version.retired is None]
        record = next((version.record for version in versions if version.name == name), {})
        if "before" in record and (record["before"] is None or record["before"] in older):
            before: str | None = record["before"]
            return before
        return older[-1] if older else None

    @property
    def has_current(self) -> bool:
        """False if the starting draft is to be served."""
        return (self.folder / CURRENT_NAME).exists()

    def predates(self, checkpoint: Path) -> bool:
        """True if there is a current version, and the weights of this checkpoint were written after it."""
        try:
            return (self.folder / CURRENT_NAME).stat().st_mtime < (checkpoint / "model.safetensors").stat().st_mtime
        except OSError:
            return False

    def check_target(self, target: TargetShape) -> None:
        """Raise CheckpointError if a version is of a target of other sizes: publishing would soon delete it."""
        from aurora_lit.drafts.checkpoint import check_fits, read_config  # imports torch, as in `publish`

        for name in self._names():
            try:
                config = read_config(self.folder / name)
            except CheckpointError:  # damaged
                continue
            try:
                check_fits(self.folder / name, config, target)
            except CheckpointError as error:
                raise CheckpointError(
                    f"checkpoint.run={self.folder.name}: {self.folder} has drafts of another target, such as {name}; "
                    "set checkpoint.run=NAME, so that those of this one have a folder of their own"
                ) from error

    def roll_back(self, *, bad: str, reason: str, wait: bool = True) -> str | None:
        """Retire a version; if it is current, make the newest older one that is not retired current.

        Returns the current version; None: the starting draft. A newer version published in the meantime stays current.
        wait: false raises BlockingIOError if another process is changing the versions.
        """
        with self._locked(wait=wait):
            current = self.current()
            if current == bad:
                current = self.version_before(bad)
                self._point_to(current)
            self._retire(bad, reason)
            self.log_event("rolled_back", version=bad, to=current, reason=reason)
        return current

    def roll_back_to(self, name: str | None, *, reason: str) -> None:
        """Make an older version (None: the starting draft) current and retire all newer ones."""
        with self._locked():
            number = 0 if name is None else self._existing(name).number
            for version in self.versions():
                if version.number > number and version.retired is None:
                    self._retire(version.name, reason)
                    self.log_event("retired", version=version.name, reason=reason)
            self._reinstate(name)
            self._point_to(name)
            self.log_event("promoted", version=name or "", reason=reason)

    def promote(self, name: str) -> None:
        """Make a version current, whatever its scores, and no longer retired. CheckpointError if it does not exist."""
        with self._locked():
            self._existing(name)
            self._reinstate(name)
            self._point_to(name)
            self.log_event("promoted", version=name)

    def prune(self) -> None:
        """Delete the oldest versions beyond `keep`, but never the current one or the one to roll back to."""
        with self._locked():
            self._prune()

    def log_event(self, event: str, *, version: str, **details: Any) -> None:
        """Append an event to the history; if the disk is full, the line is lost, but no error raised."""
        line = json.dumps({"time": time.time(), "event": event, "version": version, **details})
        with contextlib.suppress(OSError), (self.folder / HISTORY_NAME).open("ab+") as history:
            end = history.seek(0, os.SEEK_END)
            history.seek(max(0, end - 1))
            cut_short = history.read() not in (b"", b"\n")  # by a crash: end that line first
            history.write(b"\n" * cut_short + line.encode() + b"\n")

    def history(self) -> list[dict[str, Any]]:
        """The events so far, oldest first, without lines that a crash cut short."""
        events = []
        with contextlib.suppress(OSError):
            for line in (self.folder / HISTORY_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    events.append(json.loads(line))
        return events

    # -- with the lock held ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, self.folder, wait=wait)
            for leftover in self.folder.glob(f"{_TEMPORARY}*"):  # of a killed process: any other would hold the lock
                # What is another user's, or in use over NFS, may have to stay.
                with contextlib.suppress(OSError):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield
        finally:
            os.close(descriptor)

    def _names(self) -> list[str]:
        """Names of all versions, by number."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if _NAME.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}; set checkpoint.dir to a folder") from error
        return sorted(names, key=version_number)

    def _highest_number(self) -> int:
        """The highest number used, counting a deleted version that CURRENT still names: numbers are never reused."""
        current = ""
        with contextlib.suppress(CheckpointError):  # invalid: it is about to be overwritten
            current = self.current() or ""
        return max(map(version_number, [current, *self._names()]))

    def _existing(self, name: str) -> DraftVersion:
        for version in self.versions():
            if version.name == name:
                return version
        existing = ", ".join(self._names()) or "none"
        raise CheckpointError(f"there is no version {name} in {self.folder}; existing versions: {existing}")

    def _point_to(self, name: str | None) -> None:
        if name is None:
            (self.folder / CURRENT_NAME).unlink(missing_ok=True)
            sync(self.folder)
        else:
            self._write(self.folder / CURRENT_NAME, name + "\n")

    def _retire(self, name: str, reason: str) -> None:
        if _NAME.fullmatch(name) and (self.folder / name).is_dir():
            self._write(self.folder / name / RETIRED_NAME, " ".join(reason.split()) + "\n")

    def _reinstate(self, name: str | None) -> None:
        if name is not None:
            (self.folder / name / RETIRED_NAME).unlink(missing_ok=True)

    def _write(self, path: Path, content: str) -> None:
        """Write a small file atomically and flush it to disk."""
        temporary = self.folder / f"{_TEMPORARY}{path.name}"
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    def _prune(self) -> None:
        current = self.current()
        spared = {current, self.version_before(current) if current is not None else None}
        for name in self._names()[: -self._keep]:
            if name not in spared:
                # Renamed first, so that a half-deleted version does not look like a complete one.
                deleted = _unused(self.folder / f"{_TEMPORARY}gone.{name}")
                try:
                    os.replace(self.folder / name, deleted)
                    self.log_event("pruned", version=name)
                    shutil.rmtree(deleted)
                except OSError as error:
                    left = deleted if deleted.exists() else self.folder / name
                    _log.warning("%s cannot be deleted (%s); delete it by hand", left, error.strerror)


def _unused(path: Path) -> Path:
    """`path`; if that is left from an earlier process and cannot be deleted, the same with a number."""
    unused, number = path, 1
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}.{number}")
    return unused
