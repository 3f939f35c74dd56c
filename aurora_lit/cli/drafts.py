"""`aurora-lit drafts`: lists a deployment's draft versions with their scores, rolls back, promotes.

A running server loads the new current version within seconds. Leaves out what a version is (drafts/versions.py).
"""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aurora_lit.config import AuroraConfig, versions_folder
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_name
from aurora_lit.errors import CheckpointError

_NOT_SCORES = {"time", "before"}


def show(config: AuroraConfig, *, as_json: bool) -> None:
    """Print all versions, oldest first."""
    store = _store(config)
    current, versions = _current(store), store.versions()
    if as_json:
        rows = [
            {"name": each.name, "current": each.name == current, "retired": each.retired, "record": each.record}
            for each in versions
        ]
        print(json.dumps({"folder": str(store.folder), "current": current, "versions": rows}, indent=2))
        return
    console = Console(highlight=False)
    if not versions:
        print(f"{store.folder} has no version yet: the starting draft is served.")
        return
    table = Table("", "version", "published", "scores", "retired")
    for each in versions:
        published = each.record.get("time")
        table.add_row(
            "▶" if each.name == current else "",
            each.name,
            "-" if published is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(published)),
            escape(
                ", ".join(f"{name} {_short(value)}" for name, value in each.record.items() if name not in _NOT_SCORES)
            ),
            escape(each.retired or ""),
        )
    console.print(table)
    if current is None:
        console.print("No version is current: the starting draft is served.")


def roll_back(config: AuroraConfig, number: int) -> None:
    """Return to version `number` (0: the starting draft) and retire all newer ones. Raises CheckpointError."""
    _published(config).roll_back_to(version_name(number) if number else None, reason="rolled back by hand")
    print(f"{version_name(number) if number else 'the starting draft'} is current; newer versions are retired")


def promote(config: AuroraConfig, number: int) -> None:
    """Make version `number` current, whatever its scores. Raises CheckpointError."""
    _published(config).promote(version_name(number))
    print(f"{version_name(number)} is current")


def _store(config: AuroraConfig) -> DraftStore:
    return DraftStore(versions_folder(config))


def _published(config: AuroraConfig) -> DraftStore:
    """The store, if its folder exists: a mistyped folder must not be created."""
    store = _store(config)
    if not store.folder.is_dir():
        raise CheckpointError(f"there is no {store.folder}; name the folder with checkpoint.dir and checkpoint.run")
    return store


def _current(store: DraftStore) -> str | None:
    try:
        return store.current()
    except CheckpointError:  # an invalid CURRENT; the next change overwrites it
        return None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    return str(value)
