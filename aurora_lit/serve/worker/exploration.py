"""How much rounds explore: what the learner asks for on its page while it lives, else what is configured.

Leaves out exploring itself (serve/speculation/proposer.py) and what the learner's wish depends on (modules/domains/lr_schedule.py).

    wish = ExplorationFollower(engine.proposer, page)
    wish.follow()                           # between rounds; looks at the page twice a second
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aurora_lit.ipc.learner_status import STALLED_AFTER_S, LearnerBlock
from aurora_lit.serve.speculation.proposer import Proposer

_EVERY_S = 0.5


class ExplorationFollower:
    """See the file's docstring."""

    def __init__(
        self, proposer: Proposer, page: LearnerBlock, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        """What the proposer explores now is what is configured."""
        self._proposer, self._page, self._monotonic_s = proposer, page, monotonic_s
        self._configured = proposer.explore_share, proposer.explore_temperature
        self._next_s = 0.0

    def follow(self) -> None:
        """Explore as the page says by now."""
        now_s = self._monotonic_s()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _EVERY_S
        page = self._page.read()
        # The temperature is 0 until a learner has written its first report.
        asked = page.pid and page.heartbeat_age_s <= STALLED_AFTER_S and page.explore_temperature > 0
        wish = (page.explore_share, page.explore_temperature) if asked else self._configured
        self._proposer.explore_share, self._proposer.explore_temperature = wish
