"""How busy the server is, by its worker's status page. Leaves out what a learner may use then (learn/online/budget.py).

look = LoadWatch(EngineStatusPage.open(run_folder / STATUS_NAME))
look()                              # ServerLoad.IDLE
"""

from __future__ import annotations

from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.learn.online.budget import ServerLoad

_FULL_LOAD = 0.75
"""Share of taken slots from which the server counts as fully loaded: between two requests a slot is briefly free."""


class LoadWatch:
    """See the file's docstring."""

    def __init__(self, status: EngineStatusPage) -> None:
        self._status = status
        self._served: tuple[int, int] | None = None
        """Tokens that had been served at the last look."""

    def __call__(self) -> ServerLoad:
        """Look."""
        now = self._status.read()
        served = (now.generated_tokens, now.prompt_tokens)
        is_quiet, self._served = served == self._served, served
        if now.waiting:
            return ServerLoad.QUEUEING
        if now.running > _FULL_LOAD * now.num_slots:
            return ServerLoad.FULL
        return ServerLoad.IDLE if is_quiet and not now.running else ServerLoad.SPARE
