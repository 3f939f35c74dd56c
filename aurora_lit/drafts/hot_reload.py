"""Loads new drafts while serving: a thread watches CURRENT, and loads, checks and prepares the version that it names.

The engine's thread only polls between rounds whether a draft is ready, which costs it reading an attribute. A version
that cannot be served is refused with a reason, and the present draft continues to serve; while CURRENT names it, it is
tried again, less and less often. The thread also looks for new domains (serve/worker/domain_watch.py). Leaves out where
versions are stored (drafts/store.py), how a draft is checked (drafts/checkpoint.py and, for serving,
serve/speculation/sources/runtime_draft.py), what a swap does (serve/engine/engine.py), when to roll back
(live_watch.py).

Lifecycle: `first` before serving, then `start`; `poll` every round; `close` at the end.

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
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import CURRENT_NAME
from aurora_lit.errors import AuroraError
from aurora_lit.kernels import native

WATCH_S = 0.1
"""How often the thread checks CURRENT, which takes one `stat`."""
RECORD_EVERY_S = 10.0
"""Until a rollback that could not be recorded is tried again."""
RETRY_S, MOST_RETRY_S = 60.0, 3600.0
"""Until a refused CURRENT is tried again, since memory may have been short or a read may have failed; twice as long
after each further refusal, since loading takes time from requests."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadyDraft:
    """A draft that can be swapped in."""

    draft: Any
    """As returned by `load`."""
    version: str | None
    """None: the starting draft."""
    trusted: bool
    """It was served before, so its acceptance is not compared with that of the version it replaces."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A version that is not served, and why."""

    version: str
    reason: str


class HotReloader:
    """Keeps the served version equal to CURRENT. One thread loads; another one calls `poll` and `roll_back`."""

    def __init__(
        self,
        store: DraftStore,
        load: Callable[[Path | None], Any],
        *,
        also_check: Callable[[], bool] = lambda: False,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """load: loads and prepares the draft of a folder (None: the starting draft); any exception refuses it.

        also_check: looks for something else that is published; True if it has found something to report.
        """
        self._store, self._load, self._also_check, self._monotonic_s = store, load, also_check, monotonic_s
        self._current_path = store.folder / CURRENT_NAME
        self._seen: tuple[int, int] | None = None
        """Inode and modification time of the last CURRENT that was read; a new file replaces it, so both change."""
        self._served: str | None = None
        self._was_served: set[str | None] = {None}
        self._ready: deque[ReadyDraft] = deque(maxlen=1)  # a newer one replaces one that was not polled
        self._on_change: Callable[[], None] = lambda: None
        self._rollbacks: list[tuple[str, str]] = []
        self._unrecorded: dict[str, str] = {}
        """Versions rolled back in memory only, each with the reason: the folder was in use, or the disk failed."""
        self._record_again_s = 0.0
        self._retry_again_s: float | None = None
        """When CURRENT is tried again; None: it was not refused."""
        self._retry_s = RETRY_S
        self._told: Refusal | None = None
        """The last refusal since CURRENT changed, which is told once however often it is tried again."""
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._watch, name="draft-loader", daemon=True)
        self.refused: Refusal | None = None
        """The last version refused."""
        self.num_refused = 0

    def first(self) -> ReadyDraft | None:
        """The version to begin with: the current one or, if that is refused, the newest older one that is not."""
        self._seen = self._stat_current()
        self._prepare(self._current(), or_older=True)
        return self.poll()

    def start(self, *, on_change: Callable[[], None]) -> None:
        """Begin to watch. `on_change` runs in the loader's thread when something is ready or has been refused."""
        self._on_change = on_change
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """True if `poll` would return a draft."""
        return bool(self._ready)

    def poll(self) -> ReadyDraft | None:
        """A draft to swap in now; each is returned once."""
        if not self._ready:
            return None
        ready = self._ready.pop()
        self._was_served.add(ready.version)
        return ready

    def roll_back(self, *, bad: str, reason: str) -> None:
        """Retire a version, then prepare the one that CURRENT names; both happen in the loader's thread."""
        self._rollbacks.append((bad, reason))
        self._wake.set()

    def close(self) -> None:
        """End the thread, after it has finished loading."""
        self._ending = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- the loader's thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        native.compute_alone()
        while not self._ending:
            try:
                self._check()
                if self._also_check():
                    self._on_change()
            except Exception:  # such as a full disk; the next check may succeed
                _log.exception("checking for a new draft failed")
            self._wake.wait(WATCH_S)
            self._wake.clear()
        for bad, reason in list(self._unrecorded.items()):
            self._record_rollback(bad, reason)

    def _check(self) -> None:
        while self._rollbacks:
            bad, reason = self._rollbacks.pop(0)
            self._record_rollback(bad, reason)
            if self._served == bad:
                self._seen = self._stat_current()
                current = self._current()
                while current is not None and (current == bad or current in self._unrecorded):
                    current = self._version_before(current)
                self._prepare(current, or_older=True)
        seen, now_s = self._stat_current(), self._monotonic_s()
        if seen != self._seen:
            self._seen, self._retry_s, self._retry_again_s, self._told = seen, RETRY_S, None, None
            current = self._current()
            self._unrecorded.pop(current or "", None)  # promoted again
            self._prepare(current, or_older=False)
        elif self._retry_again_s is not None and now_s >= self._retry_again_s:
            self._retry_s, self._retry_again_s = min(2 * self._retry_s, MOST_RETRY_S), None
            current = self._current()
            if current not in self._unrecorded:
                self._prepare(current, or_older=False)
        if self._unrecorded and now_s >= self._record_again_s:
            for bad, reason in list(self._unrecorded.items()):
                self._record_rollback(bad, reason)

    def _record_rollback(self, bad: str, reason: str) -> None:
        """Retire a version on disk; if that fails, the rollback holds in memory, and is recorded later.

        It does not wait for a learner that is publishing: the bad version would be served meanwhile.
        """
        try:
            self._store.roll_back(bad=bad, reason=reason, wait=False)
        except (OSError, AuroraError) as error:
            if bad not in self._unrecorded:
                _log.warning("the rollback of %s cannot be recorded, which is tried again: %s", bad, error)
            self._unrecorded[bad] = reason
            in_use = isinstance(error, BlockingIOError)  # by a learner that publishes: over at one of the next looks
            self._record_again_s = self._monotonic_s() + (0.0 if in_use else RECORD_EVERY_S)
        else:
            self._unrecorded.pop(bad, None)

    def _prepare(self, name: str | None, *, or_older: bool) -> None:
        """Prepare a version. If it is refused, keep the present one or, with `or_older`, take the newest older one."""
        while name != self._served:
            ready = self._load_version(name)
            if ready is not None:
                self._served = name
                self._ready.append(ready)
                self._store.log_event("served", version=name or "")
                self._on_change()
                return
            if name is None or not or_older:
                return
            name = self._version_before(name)

    def _stat_current(self) -> tuple[int, int] | None:
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

    def _version_before(self, name: str) -> str | None:
        """The version to serve instead; the starting draft, which lies elsewhere, if the folder cannot be read."""
        try:
            return self._store.version_before(name)
        except AuroraError as error:
            _log.warning("the starting draft is served instead of %s: %s", name, error)
            return None

    def _load_version(self, name: str | None) -> ReadyDraft | None:
        try:
            draft = self._load(None if name is None else self._store.folder / name)
        except Exception as error:  # whatever is wrong with a new draft, the present one continues to serve
            reason = str(error) if isinstance(error, AuroraError) else f"{type(error).__name__}: {error}"
            self._refuse(name or "the starting draft", reason)
            return None
        return ReadyDraft(draft=draft, version=name, trusted=name in self._was_served)

    def _refuse(self, version: str, reason: str) -> None:
        self._retry_again_s = self._monotonic_s() + self._retry_s
        refusal = Refusal(version=version, reason=reason)
        if refusal == self._told:
            return
        _log.warning("draft %s is not served: %s", version, reason)
        self.refused = self._told = refusal
        self.num_refused += 1
        self._store.log_event("refused", version=version, reason=reason)
        self._on_change()
