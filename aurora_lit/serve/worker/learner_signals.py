"""What the engine takes over from the learner's status page between rounds: exploration, and the cores it computes on.

Leaves out exploring itself (serve/speculation/sources/draft.py), what rounds do with other cores taken
(serve/engine/thread_budget.py), and how the learner chooses what to ask for (modules/domains/controller.py).

    exploration = ExplorationFollower(engine.proposer.draft, page)
    exploration.follow()                # between rounds
    LearnerCores(page)()                # 1: a learner computes on one core
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aurora_lit.ipc.learner_status import STALLED_AFTER_S, LearnerStatusPage
from aurora_lit.serve.speculation.sources.draft import DraftSource

_CHECK_EVERY_S = 0.5
"""How often the whole page is read; a single field is read every round."""


class ExplorationFollower:
    """Sets how often the draft explores as a running learner asks for, otherwise as configured."""

    def __init__(
        self, source: DraftSource, page: LearnerStatusPage, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        """The source's present settings count as the configured ones."""
        self._source, self._page, self._monotonic_s = source, page, monotonic_s
        self._configured = source.explore_share
        self._next_check_s = 0.0

    def follow(self) -> None:
        """Take over what the page says now; reads it twice a second at most."""
        now_s = self._monotonic_s()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_EVERY_S
        learner = self._page.read()
        # The factor is 0 until a learner has written its first report.
        is_asked = learner.pid and learner.heartbeat_age_s <= STALLED_AFTER_S and learner.rate_factor > 0
        self._source.explore_share = learner.explore_share if is_asked else self._configured


class LearnerCores:
    """On how many cores a running learner computes now."""

    def __init__(self, page: LearnerStatusPage, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._page, self._monotonic_s = page, monotonic_s
        self._next_check_s = 0.0
        self._is_running = False

    def __call__(self) -> int:
        """0 if none does."""
        busy = self._page.peek("busy_threads")
        if busy and self._monotonic_s() >= self._next_check_s:
            self._next_check_s = self._monotonic_s() + _CHECK_EVERY_S
            # A learner that was killed while it computed leaves its threads marked as busy.
            self._is_running = self._page.read().state == "running"
        return busy if self._is_running else 0
