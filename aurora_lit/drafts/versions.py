"""The versions of a deployment's draft: published whole, numbered, pointed at, taken back, pruned.

    FOLDER/draft-000001/   draft-000002/ …   checkpoints (checkpoints.py), each with record.json: scores, time
    FOLDER/draft-000002/RETIRED              this version was taken back, and why
    FOLDER/CURRENT                           name of the version that is to be served; no such file: the starting draft
    FOLDER/history.jsonl                     what happened, a line an event; nothing is decided by it
    FOLDER/.lock                             held while any of this changes

Learner, server and command line use one folder at the same time. Whatever is killed at whatever moment, CURRENT names
a whole version: a version is written to a folder of another name, made safe on disk, and renamed; CURRENT likewise.
Leaves out loading and judging a draft (checkpoints.py), who wants which version, and why.

    store = DraftStore(folder, keep=5)
    store.publish(draft, record={"score": 2.1})             # "draft-000001", now current
    store.roll_back(bad="draft-000001", reason="slower")    # None: the starting draft
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_lit.durable import sync
from aurora_lit.errors import CheckpointError

if TYPE_CHECKING:
    from aurora_lit.modules.draft.eagle3 import Draft

CURRENT_NAME, HISTORY_NAME, RECORD_NAME, RETIRED_NAME = "CURRENT", "history.jsonl", "record.json", "RETIRED"
_LOCK_NAME = ".lock"
_NAME = re.compile(r"draft-(\d{6,})")
_TEMPORARY = ".new."


@dataclass(frozen=True, kw_only=True)
class DraftVersion:
    """One published version."""

    name: str
    number: int
    record: dict[str, Any]
    """What was known when it was published: scores, steps, `time` (seconds since 1970)."""
    retired: str | None
    """Why it was taken back; None: it was not."""


def version_number(name: str) -> int:
    """42 for "draft-000042"; 0 for any other name: what a deployment started with."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def version_name(number: int) -> str:
    """ "draft-000042" for 42."""
    return f"draft-{number:06d}"


class DraftStore:
    """The versions in one folder; safe for several processes and threads. The folder is made by the first change."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """keep: versions left by pruning, besides the current one and the one to roll back to."""
        self.folder, self._keep = folder, keep

    def publish(self, draft: Draft, *, record: dict[str, Any]) -> str:
        """Write a draft as the next version and make it current; its name. `record` must be JSON."""
        from aurora_lit.drafts.checkpoint import write_draft  # with torch, which who only reads versions does without

        with self._locked():
            name = version_name(1 + self._highest_number())
            temporary = self.folder / f"{_TEMPORARY}{name}"
            temporary.mkdir()
            write_draft(draft, temporary)
            self._write(temporary / RECORD_NAME, json.dumps({"time": time.time(), **record}, indent=2) + "\n")
            os.replace(temporary, self.folder / name)
            sync(self.folder)
            self._point_to(name)
            self.note("published", version=name, **record)
            self._prune()
        return name

    def current(self) -> str | None:
        """The version that is to be served; None: the starting draft. Raises CheckpointError on a garbled CURRENT."""
        try:
            name = (self.folder / CURRENT_NAME).read_text(encoding="utf-8").removesuffix("\n")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.folder / CURRENT_NAME} cannot be read: {error}") from error
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{self.folder / CURRENT_NAME} holds {name[:80]!r}, which is no version")
        return name

    def versions(self) -> list[DraftVersion]:
        """All versions on disk, oldest first."""
        found = []
        for name in self._names():
            folder = self.folder / name
            try:
                record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # pruned in between, or copied here by hand
                record = {}
            try:
                retired = (folder / RETIRED_NAME).read_text(encoding="utf-8").strip()
            except OSError:
                retired = None
            found.append(DraftVersion(name=name, number=version_number(name), record=record, retired=retired))
        return found

    def before(self, name: str) -> str | None:
        """The newest version older than `name` that is not retired."""
        number = version_number(name)
        older = [version.name for version in self.versions() if version.number < number and version.retired is None]
        return older[-1] if older else None

    def roll_back(self, *, bad: str, reason: str) -> str | None:
        """Retire a version and, where it is current, go back to the newest older one that is not retired.

        Returns what is current then; None: the starting draft. A newer version published meanwhile stays current.
        """
        with self._locked():
            current = self.current()
            if current == bad:
                current = self.before(bad)
                self._point_to(current)
            self._retire(bad, reason)
            self.note("rolled_back", version=bad, to=current, reason=reason)
        return current

    def return_to(self, name: str | None, *, reason: str) -> None:
        """Make an older version (None: the starting draft) current and retire all newer ones."""
        with self._locked():
            number = 0 if name is None else self._existing(name).number
            for version in self.versions():
                if version.number > number and version.retired is None:
                    self._retire(version.name, reason)
                    self.note("retired", version=version.name, reason=reason)
            self._reinstate(name)
            self._point_to(name)
            self.note("promoted", version=name or "", reason=reason)

    def promote(self, name: str) -> None:
        """Make a version current whatever its scores; it is no longer retired. CheckpointError when it is gone."""
        with self._locked():
            self._existing(name)
            self._reinstate(name)
            self._point_to(name)
            self.note("promoted", version=name)

    def prune(self) -> None:
        """Delete the oldest versions beyond `keep`; never the current one, nor the one to roll back to."""
        with self._locked():
            self._prune()

    def note(self, event: str, *, version: str, **details: Any) -> None:
        """Add a line to the history; a full disk loses the line, not the change."""
        line = json.dumps({"time": time.time(), "event": event, "version": version, **details})
        with contextlib.suppress(OSError), (self.folder / HISTORY_NAME).open("ab+") as history:
            end = history.seek(0, os.SEEK_END)
            history.seek(max(0, end - 1))
            cut_short = history.read() not in (b"", b"\n")  # by a crash: must not spoil this line too
            history.write(b"\n" * cut_short + line.encode() + b"\n")

    def history(self) -> list[dict[str, Any]]:
        """The events so far, oldest first; a line cut short by a crash is left out."""
        events = []
        with contextlib.suppress(OSError):
            for line in (self.folder / HISTORY_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    events.append(json.loads(line))
        return events

    # -- with the lock held ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for left in self.folder.glob(f"{_TEMPORARY}*"):  # by someone who was killed: whoever writes has the lock
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
        finally:
            os.close(descriptor)

    def _names(self) -> list[str]:
        """Folders of versions, by number."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if _NAME.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        return sorted(names, key=version_number)

    def _highest_number(self) -> int:
        """Of all versions, one that CURRENT names and somebody deleted included: a number is never used again."""
        named = ""
        with contextlib.suppress(CheckpointError):  # garbled: about to be written anew
            named = self.current() or ""
        return max(map(version_number, [named, *self._names()]))

    def _existing(self, name: str) -> DraftVersion:
        for version in self.versions():
            if version.name == name:
                return version
        there = ", ".join(self._names()) or "none"
        raise CheckpointError(f"there is no version {name} in {self.folder}; there are: {there}")

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
        """A small file, old or new as a whole, safe on disk."""
        temporary = self.folder / f"{_TEMPORARY}{path.name}"
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)

    def _prune(self) -> None:
        current = self.current()
        spared = {current, self.before(current) if current is not None else None}
        for name in self._names()[: -self._keep]:
            if name not in spared:
                # Renamed first: a version that is half deleted must not look like one.
                gone = self.folder / f"{_TEMPORARY}gone.{name}"
                os.replace(self.folder / name, gone)
                shutil.rmtree(gone)
                self.note("pruned", version=name)
