"""What a learner's loop is connected to: the server's traces and status pages, the drafts, the clock.

Leaves out what the loop does with them (learn/online/loop.py), and opening them (learn/online/build.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from aurora_lit.drafts.store import DraftStore
from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.learn.online.budget import ServerLoad
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


class TraceSource(Protocol):
    """The reading end of a ring of traces."""

    def pop(self) -> bytes | None:
        """The next record; None if there is none now."""

    def pass_over(self, most: float) -> None:
        """Leave out the oldest records until the others fill at most this part of the ring."""

    @property
    def lag_records(self) -> int:
        """Records that wait to be read."""

    @property
    def lag_bytes(self) -> int:
        """Bytes that wait to be read."""


@dataclass(kw_only=True)
class LearnerEnvironment:
    """The loop's connections to the server, the disk and the clock; a test replaces them."""

    traces: TraceSource
    store: DraftStore
    page: LearnerStatusPage
    server_load: Callable[[], ServerLoad]
    """How busy the server is."""
    served_draft: Callable[[str | None], Eagle3Draft]
    """A version's draft; for None, the draft that serving started with. Raises CheckpointError."""
    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
