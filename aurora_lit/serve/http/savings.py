"""The time that speculation has saved against plain decoding: today, and since the deployment's first start.

The engine compares rounds with plain ones (serve/speculation/floor.py); docs/metrics.md has the formula. Its total
begins at 0 with each start, so what it grows by is added to the sums in a file beside the draft versions: once a
minute, and when the server ends. After a kill, up to a minute is missing. Servers on one folder add to the same sums,
and each reports what the others had added a minute before. A file that cannot be read or written is said once in the
log; then the sum begins, or ends, with this server.

    savings = Savings(folder / NAME, saved_s=lambda: page.read().saved_s, price_per_hour=2.5)
    async with savings.kept():
        savings.report()
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aurora_lit.durable import replace_file

NAME = "savings.json"
_KEEP_EVERY_S = 60.0
_LOCK_TRIES, _LOCK_EVERY_S = 100, 0.01
_log = logging.getLogger(__name__)


class _Sums(NamedTuple):
    """Seconds saved in all, and on one day."""

    day: str
    seconds: float = 0.0
    seconds_today: float = 0.0

    def on(self, day: str) -> _Sums:
        """On that day, which has begun with 0 if it is another."""
        return self if day == self.day else _Sums(day, self.seconds)


class Savings:
    """Adds up and keeps what is saved; see the file's example."""

    def __init__(
        self,
        path: Path,
        *,
        saved_s: Callable[[], float],
        price_per_hour: float = 0.0,
        today: Callable[[], datetime.date] = datetime.date.today,
    ) -> None:
        """saved_s: the engine's total since its start, in seconds. price_per_hour: of the machine; 0: unknown."""
        self._path, self._saved_s, self._price, self._today = path, saved_s, price_per_hour, today
        self._has_failed = False
        self._own = _Sums(today().isoformat())
        """Of this server. Only the event loop changes it."""
        self._since = self._own.day
        self._kept = (self._read() or self._own, self._own)
        """The file's sums when it was last read or written, and this server's part that they have. Only `keep` changes
        it."""
        self._keeping = threading.Lock()

    def report(self) -> dict[str, Any]:
        """For GET /v1/aurora/status: seconds saved, and their worth; None where no price is known."""
        self._count()
        sums = self._sum(self._own)
        per_second = self._price / 3600
        return {
            "since": self._since,
            "seconds": round(sums.seconds, 3),
            "seconds_today": round(sums.seconds_today, 3),
            "price_per_hour": self._price or None,
            "worth": sums.seconds * per_second if self._price else None,
            "worth_today": sums.seconds_today * per_second if self._price else None,
        }

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Inside the context, and at its end, the sums are kept."""

        async def keep_for_ever() -> None:
            while True:
                await asyncio.sleep(_KEEP_EVERY_S)
                self._count()  # here, so that each day gets its own
                await asyncio.to_thread(self.keep)

        task = asyncio.create_task(keep_for_ever())
        try:
            yield
        finally:
            task.cancel()
            self._count()
            self.keep()

    def keep(self) -> None:
        """Add to the file what this server has saved since, if anything, and learn what others have added."""
        with self._keeping:
            (in_file, own_part), own = self._kept, self._own
            if own.seconds == own_part.seconds:
                self._kept = (self._read() or in_file, own_part)
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._locked():
                    self._kept = (self._read() or in_file, own_part)
                    sums = self._sum(own)
                    kept = {"since": self._since, "seconds": sums.seconds, "day": sums.day}
                    kept["seconds_today"] = sums.seconds_today
                    replace_file(self._path, (json.dumps(kept) + "\n").encode())
            except OSError as error:
                self._say(f"cannot be written ({error}); time saved is forgotten when the server ends")
            else:
                self._kept = (sums, own)

    def _count(self) -> None:
        """Add what the engine's total has grown by, to the present day."""
        own, saved_s = self._own.on(self._today().isoformat()), self._saved_s()
        self._own = _Sums(own.day, saved_s, own.seconds_today + saved_s - own.seconds)

    def _sum(self, own: _Sums) -> _Sums:
        """The file's sums, with what this server has saved since."""
        in_file, own_part = (sums.on(own.day) for sums in self._kept)
        return _Sums(
            own.day,
            in_file.seconds + own.seconds - own_part.seconds,
            in_file.seconds_today + own.seconds_today - own_part.seconds_today,
        )

    def _read(self) -> _Sums | None:
        """The file's sums; None if there is none, or none that can be read."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            since, day = (datetime.date.fromisoformat(kept[name]).isoformat() for name in ("since", "day"))
            sums = _Sums(day, float(kept["seconds"]), float(kept["seconds_today"]))
            if not math.isfinite(sums.seconds + sums.seconds_today):
                raise ValueError("a sum is no number")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._say(f"cannot be read ({error}); time saved is counted from this server's start")
            return None
        self._since = since
        return sums

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the file's folder. Raises BlockingIOError if others hold it for a second."""
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for left in reversed(range(_LOCK_TRIES)):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not left:
                        raise
                    time.sleep(_LOCK_EVERY_S)
            yield
        finally:
            os.close(descriptor)

    def _say(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.warning("%s %s", self._path, what)
