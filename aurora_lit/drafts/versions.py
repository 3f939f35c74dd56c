"""The published versions of a deployment's draft, as every process reads them: numbered folders, and which is current.

    FOLDER/draft-000001/   draft-000002/ …   checkpoints (drafts/checkpoint.py), each with record.json: scores, time
    FOLDER/draft-000002/RETIRED              marks a version that was rolled back; contains the reason
    FOLDER/CURRENT                           name of the version to serve; without it, the starting draft is served
    FOLDER/history.jsonl                     one line for each event; for people, no code decides by it
    FOLDER/.lock                             held during every change

Leaves out changing them (drafts/store.py), and loading and validating a draft (drafts/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_lit.config import AuroraConfig, versions_folder
from aurora_lit.errors import CheckpointError

if TYPE_CHECKING:
    from aurora_lit.drafts.checkpoint import TargetShape

CURRENT_NAME, HISTORY_NAME, RECORD_NAME, RETIRED_NAME = "CURRENT", "history.jsonl", "record.json", "RETIRED"
_NAME = re.compile(r"draft-(\d{6,})")


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


class PublishedVersions:
    """Reads the versions in one folder, which need not exist; safe for several processes and threads."""

    def __init__(self, folder: Path) -> None:
        """folder: of a deployment, or of one that has published nothing yet."""
        self.folder = folder

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

    @property
    def has_current(self) -> bool:
        """False if the starting draft is to be served."""
        return (self.folder / CURRENT_NAME).exists()

    def names(self) -> list[str]:
        """The names of all versions on disk, by number. Raises CheckpointError if the folder cannot be read."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if _NAME.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}; set checkpoint.dir to a folder") from error
        return sorted(names, key=version_number)

    def versions(self) -> list[DraftVersion]:
        """All versions on disk, oldest first."""
        found = []
        for name in self.names():
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

    def predates(self, checkpoint: Path) -> bool:
        """True if there is a current version, and the weights of this checkpoint were written after it."""
        try:
            return (self.folder / CURRENT_NAME).stat().st_mtime < (checkpoint / "model.safetensors").stat().st_mtime
        except OSError:
            return False

    def check_target(self, target: TargetShape) -> None:
        """Raise CheckpointError if a version is of a target of other sizes: publishing would soon delete it."""
        from aurora_lit.drafts.checkpoint import check_fits, read_config  # imports torch, which other readers need not

        for name in self.names():
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

    def history(self) -> list[dict[str, Any]]:
        """The events so far, oldest first, without lines that a crash cut short."""
        events = []
        with contextlib.suppress(OSError):
            for line in (self.folder / HISTORY_NAME).read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    events.append(json.loads(line))
        return events


def settings_to_serve(folder: Path, config: AuroraConfig) -> str:
    """The settings with which a server begins with the draft in `folder` and its weights.

    A published version would be served instead, and a server that learns from scratch publishes one as it starts.
    """
    is_published = PublishedVersions(versions_folder(config)).has_current
    settings = [f"draft.checkpoint={folder}"]
    settings += ["learn.from_scratch=false"] if config.learn.from_scratch else []
    settings += ["checkpoint.run=NEW"] if config.learn.from_scratch or is_published else []
    return " ".join(settings)
