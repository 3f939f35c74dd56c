"""New drafts while serving: CURRENT is watched, what it names is loaded, checked and made ready by a thread of its own.

The engine's thread only asks between rounds whether one is ready, which costs it an attribute. Whatever cannot be
served is refused with its reason, and what serves goes on serving. Leaves out where versions lie (publishing.py), how a
draft is checked (checkpoints.py, serve/speculation/drafter.py), what a swap is (serve/engine/engine.py) and when to go back
(serve/worker/rollback.py).

Lifecycle: `first` before serving, then `start`; every round `poll`; `close` at the end.

    reloader = HotReloader(store, load)
    ready = reloader.first()                           # the version to begin with; None: the starting draft
    reloader.start(on_change=wake_the_loop)
    ready = reloader.poll()
    if ready is not None: engine.swap_draft(ready.draft, version=ready.version)
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_lit.drafts.versions import CURRENT_NAME, DraftStore
from aurora_lit.errors import AuroraError

WATCH_S = 0.1
"""How often the thread looks; a look is one `stat`."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadyDraft:
    """A draft that can be swapped in."""

    draft: Any
    """As `load` returned it."""
    version: str | None
    """None: the starting draft."""
    trusted: bool
    """It was served before: its acceptance is not held against that of the version that it replaces."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A version that could not be served."""

    version: str
    reason: str


class HotReloader:
    """Keeps what is served equal to what CURRENT names. One thread loads; `poll` and `roll_back` are for another."""

    def __init__(self, store: DraftStore, load: Callable[[Path | None], Any]) -> None:
        """load: reads, checks and fits the draft in a folder (None: the starting draft); any exception refuses it."""
        self._store, self._load = store, load
        self._current_path = store.folder / CURRENT_NAME
        self._seen: tuple[int, int] | None = None
        """Inode and time of the CURRENT that was acted on; it is replaced whole, so both change."""
        self._served: str | None = None
        self._was_served: set[str | None] = {None}
        self._ready: deque[ReadyDraft] = deque(maxlen=1)  # a newer one takes the place of one not yet asked for
        self._on_change: Callable[[], None] = lambda: None
        self._orders: list[tuple[str, str]] = []
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._watch, name="draft-loader", daemon=True)
        self.refused: Refusal | None = None
        """The last one."""
        self.num_refused = 0

    def first(self) -> ReadyDraft | None:
        """The version to begin with: the current one, or, when that is refused, the newest older one that is not."""
        self._seen = self._stat()
        self._serve(self._current(), or_older=True)
        return self.poll()

    def start(self, *, on_change: Callable[[], None]) -> None:
        """Begin to watch; `on_change` runs in the loader's thread when a draft is ready or has been refused."""
        self._on_change = on_change
        self._thread.start()

    def poll(self) -> ReadyDraft | None:
        """A draft to swap in now, handed out once."""
        return self._ready.pop() if self._ready else None

    def roll_back(self, *, bad: str, reason: str) -> None:
        """Have a version retired, and what CURRENT then names made ready; does not wait."""
        self._orders.append((bad, reason))
        self._wake.set()

    def close(self) -> None:
        """End the thread, after what it is loading."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- the loader's thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ending:
            try:
                self._look()
            except Exception:  # a full or vanished disk: what serves goes on serving, and the next look may succeed
                _log.exception("looking for a new draft failed")
            self._wake.wait(WATCH_S)
            self._wake.clear()

    def _look(self) -> None:
        while self._orders:
            bad, reason = self._orders.pop(0)
            try:
                self._store.roll_back(bad=bad, reason=reason)
            except OSError as error:  # a disk that cannot be written keeps nobody on a bad draft
                _log.warning("the rollback of %s cannot be written down: %s", bad, error)
            if self._served == bad:
                self._seen = self._stat()
                current = self._current()
                self._serve(self._store.before(bad) if current == bad else current, or_older=True)
        seen = self._stat()
        if seen != self._seen:
            self._seen = seen
            self._serve(self._current(), or_older=False)

    def _serve(self, name: str | None, *, or_older: bool) -> None:
        """Make a version ready; when it is refused, stay with what serves, or take the newest older one that fits."""
        while name != self._served:
            ready = self._make_ready(name)
            if ready is not None:
                self._served = name
                self._was_served.add(name)
                self._ready.append(ready)
                self._store.note("served", version=name or "")
                self._on_change()
                return
            if name is None or not or_older:
                return
            name = self._store.before(name)

    def _stat(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._current_path)
        except FileNotFoundError:
            return None
        except OSError:
            return self._seen
        return status.st_ino, status.st_mtime_ns

    def _current(self) -> str | None:
        try:
            return self._store.current()
        except AuroraError as error:
            self._refuse(CURRENT_NAME, str(error))
            return self._served

    def _make_ready(self, name: str | None) -> ReadyDraft | None:
        try:
            draft = self._load(None if name is None else self._store.folder / name)
        except Exception as error:  # whatever is wrong with a new draft, the old one serves on
            reason = str(error) if isinstance(error, AuroraError) else f"{type(error).__name__}: {error}"
            self._refuse(name or "the starting draft", reason)
            return None
        return ReadyDraft(draft=draft, version=name, trusted=name in self._was_served)

    def _refuse(self, version: str, reason: str) -> None:
        _log.warning("draft %s is not served: %s", version, reason)
        self.refused = Refusal(version=version, reason=reason)
        self.num_refused += 1
        self._store.note("refused", version=version, reason=reason)
        self._on_change()
