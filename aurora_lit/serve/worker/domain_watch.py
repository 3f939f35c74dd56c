"""Keeps the engine's domains equal to those that the learner has published.

The thread that loads drafts (drafts/hot_reload.py) calls `check`, which takes one `stat` while nothing is new.
The thread that runs rounds calls `poll`. A file that is refused leaves the domains as they are. Leaves out the file
(drafts/centroid_file.py) and assigning (modules/domains/centroids.py).

    watch = DomainWatch(store.folder / CENTROIDS_NAME, load)
    watch.check()                                       # True: there is something new to report
    assigner = watch.poll()
    if assigner is not None: engine.assigner = assigner
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_lit.errors import AuroraError

if TYPE_CHECKING:
    from aurora_lit.modules.domains.centroids import DomainAssigner

_log = logging.getLogger(__name__)


class DomainWatch:
    """One thread calls `check`, another one `poll`; see the file's docstring."""

    def __init__(self, path: Path, load: Callable[[Path], DomainAssigner]) -> None:
        """load: reads the file; any exception refuses it."""
        self._path, self._load = path, load
        self._seen: tuple[int, int] | None = None
        """Inode and modification time of the last file that was read; a new file replaces it, so both change."""
        self._ready: deque[DomainAssigner] = deque(maxlen=1)  # a newer one replaces one that was not polled
        self.version = 0
        """Number of the last publication that was read; 0: none."""
        self.refused = ""
        """Why the newest file was refused; "" if it was read, or there is none."""

    def check(self) -> bool:
        """Read the file if it is new. True if there are new domains, or the file was refused."""
        try:
            status = os.stat(self._path)
        except OSError:  # there is none yet, or it was deleted: the present domains stay
            return False
        seen = (status.st_ino, status.st_mtime_ns)
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            assigner = self._load(self._path)
        except Exception as error:  # whatever is wrong with it, the present domains stay
            self.refused = str(error) if isinstance(error, AuroraError) else f"{type(error).__name__}: {error}"
            _log.warning("published domains are not used: %s", self.refused)
            return True
        self.version, self.refused = assigner.version, ""
        self._ready.append(assigner)
        return True

    def poll(self) -> DomainAssigner | None:
        """Domains to swap in now; each publication is returned once."""
        return self._ready.pop() if self._ready else None
