"""How far long work is, on stderr: a bar in a terminal, and a line every 30 seconds where there is none.

    with Progress("answering", len(prompts), "prompts") as progress:
        for prompt in prompts:
            ...
            progress.advance()          # answering: 120 of 600 prompts (20 %), 3 min left

Work that waits for another process calls `advance(0)` about every second: a line that is due is printed then.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Progress of one piece of work; see the top of this file.

    what: the work, such as "recording text". total: its units in all; None if that is not known. unit: what is counted,
    in the plural. done: units that an earlier run has done. shown: False prints nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        every_s: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._note = ""
        self._begun_with, self._every_s, self._clock = done, every_s, clock
        self._stream = stream or sys.stderr
        self._shown = shown
        self._bar: Bar | None = None
        if shown and self._stream.isatty():
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"))
            console = Console(file=self._stream)
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done, count=self._count())
        self._began = self._printed = clock()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed != self._began:
            self._print(f"{self._count()} in {_duration(self._clock() - self._began)}")

    def advance(self, count: int = 1, *, note: str | None = None) -> None:
        """Count units that were done. note: what else to say of the work so far, until another one is given."""
        self.done += count
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, count=self._count())
        elif (now := self._clock()) - self._printed >= self._every_s:
            self._printed = now
            self._print(f"{self._count()}{self._left(now)}")

    def _count(self) -> str:
        note = f", {self._note}" if self._note else ""
        if not self.total:
            return f"{self.done:,} {self.unit}{note}"
        percent = 100 * self.done / self.total
        return f"{self.done:,} of {self.total:,} {self.unit} ({percent:.0f} %){note}"

    def _left(self, now: float) -> str:
        done_now = self.done - self._begun_with
        if not self.total or not done_now or self.done >= self.total:
            return ""
        return f", {_duration((now - self._began) * (self.total - self.done) / done_now)} left"

    def _print(self, text: str) -> None:
        if self._shown:
            print(f"{self.what}: {text}", file=self._stream, flush=True)


@contextmanager
def waiting(what: str, *, every_s: float = 30.0) -> Iterator[None]:
    """For work that a library does in one call: without a terminal, a line says every `every_s` how long it has taken.

    In a terminal the library shows its own progress.
    """
    ended, began = threading.Event(), time.monotonic()
    progress = Progress(what, None, "seconds", every_s=every_s, shown=not sys.stderr.isatty())

    def tell() -> None:
        while not ended.wait(min(1.0, every_s)):
            progress.advance(int(time.monotonic() - began) - progress.done)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
