"""Which draft serves: a new one is swapped in between rounds, tried on live traffic, and taken back when it is bad.

Joins loading (serve/worker/hot_reload.py), the trial (serve/worker/rollback.py) and the engine; belongs to the thread that runs
rounds. Leaves out all three.

    live = LiveDraft(engine, reloader)       # an engine that begins with the version CURRENT names
    live.before_round()
    outputs = engine.round()
    live.after_round(outputs, domain_of=…)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from aurora_lit.request import Output
from aurora_lit.serve.worker.hot_reload import HotReloader, ReadyDraft, Refusal
from aurora_lit.serve.worker.rollback import RollbackWatch

_log = logging.getLogger(__name__)


class SwappingEngine(Protocol):
    """What is needed of an engine."""

    draft_version: str

    def swap_draft(self, draft: Any, *, version: str, recompute: bool = False) -> None:
        """Propose with another draft from the next round on; `recompute` keeps nothing that the last one computed."""


class LiveDraft:
    """The draft of one engine; see the file's example."""

    def __init__(self, engine: SwappingEngine, reloader: HotReloader) -> None:
        """Swap in the version to begin with; the engine comes with the starting draft."""
        self._engine, self._reloader = engine, reloader
        self._starting_version = engine.draft_version
        self._watch = RollbackWatch()
        self.num_swaps = 0
        """Since serving began."""
        self.num_rollbacks = 0
        self.rolled_back: Refusal | None = None
        """The last version that was taken back."""
        first = reloader.first()
        if first is not None:
            self._swap(first)

    def start(self, *, on_change: Callable[[], None]) -> None:
        """Begin to watch for new versions; `on_change` runs, in another thread, when there is something new."""
        self._reloader.start(on_change=on_change)

    def close(self) -> None:
        """Stop watching."""
        self._reloader.close()

    @property
    def num_refused(self) -> int:
        """Versions that could not be served."""
        return self._reloader.num_refused

    @property
    def refused(self) -> Refusal | None:
        """The last version that could not be served."""
        return self._reloader.refused

    def before_round(self) -> None:
        """Swap in a draft that is ready."""
        ready = self._reloader.poll()
        if ready is not None:
            self._swap(ready)
            self.num_swaps += 1

    def after_round(self, outputs: Iterable[Output], *, domain_of: Callable[[str], str]) -> None:
        """Judge the draft by what its proposals came to; `domain_of` gives a request's label."""
        for output in outputs:
            if not output.num_proposed or output.looked_up or output.explored:
                continue
            verdict = self._watch.observe(
                domain=domain_of(output.request_id), proposed=output.chain_proposed, accepted=output.chain_accepted
            )
            if verdict is not None:
                version = self._engine.draft_version
                _log.warning("draft %s is taken back: %s", version, verdict)
                self.num_rollbacks += 1
                self.rolled_back = Refusal(version=version, reason=verdict)
                self._reloader.roll_back(bad=version, reason=verdict)
                return

    def _swap(self, ready: ReadyDraft) -> None:
        # What a bad draft left in the cache would hold the good one back until the last request of its time has ended.
        version = ready.version or self._starting_version
        self._engine.swap_draft(ready.draft, version=version, recompute=ready.trusted)
        self._watch.swapped(trusted=ready.trusted)
