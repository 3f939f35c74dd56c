"""The time that speculation has saved against plain decoding: today, and since the deployment's first start.

The engine compares rounds with plain ones (serve/speculation/floor.py); docs/metrics.md has the formula. Its total
begins at 0 with each start, so what it grows by is added up here, and kept in a file beside the draft versions: once a
minute, and when the server ends. After a kill, up to a minute is missing. A file that cannot be read or written is said
once in the log; then the sum begins, or ends, with this server. One server at a time keeps a file.

    savings = Savings(folder / NAME, saved_s=lambda: page.read().saved_s, price_per_hour=2.5)
    async with savings.kept():
        savings.report()
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aurora_lit.durable import replace_file

NAME = "savings.json"
_KEEP_EVERY_S = 60.0
_log = logging.getLogger(__name__)


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
        self._counted_s = 0.0
        """Of the engine's total, what has been added."""
        self._since = self._day = today().isoformat()
        self._total_s = self._today_s = self._kept_s = 0.0
        self._keeping = threading.Lock()
        self._has_failed = False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            since, day = (datetime.date.fromisoformat(kept[name]).isoformat() for name in ("since", "day"))
            seconds, seconds_today = float(kept["seconds"]), float(kept["seconds_today"])
            if not math.isfinite(seconds + seconds_today):
                raise ValueError("a sum is no number")
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._say(f"cannot be read ({error}); time saved is counted from today")
            return
        self._since, self._day = since, day
        self._total_s = self._kept_s = seconds
        self._today_s = seconds_today

    def report(self) -> dict[str, Any]:
        """For GET /v1/aurora/status: seconds saved, and their worth; None where no price is known."""
        self._count()
        per_second = self._price / 3600
        return {
            "since": self._since,
            "seconds": round(self._total_s, 3),
            "seconds_today": round(self._today_s, 3),
            "price_per_hour": self._price or None,
            "worth": self._total_s * per_second if self._price else None,
            "worth_today": self._today_s * per_second if self._price else None,
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
        """Write the file, if anything was saved since."""
        with self._keeping:
            total_s = self._total_s
            if total_s == self._kept_s:
                return
            kept = {"since": self._since, "seconds": total_s, "day": self._day, "seconds_today": self._today_s}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._path, (json.dumps(kept) + "\n").encode())
            except OSError as error:
                self._say(f"cannot be written ({error}); time saved is forgotten when the server ends")
            else:
                self._kept_s = total_s

    def _count(self) -> None:
        """Add what the engine's total has grown by, to the present day."""
        saved_s, day = self._saved_s(), self._today().isoformat()
        if day != self._day:
            self._day, self._today_s = day, 0.0
        self._total_s += saved_s - self._counted_s
        self._today_s += saved_s - self._counted_s
        self._counted_s = saved_s

    def _say(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.warning("%s %s", self._path, what)
