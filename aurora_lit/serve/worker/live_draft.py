"""The draft that serves: swaps a new one in between rounds, tries it on live traffic, and rolls a bad one back.

Domains that the learner has published are swapped in here too. Connects loading (drafts/hot_reload.py,
serve/worker/domain_watch.py), the trial (drafts/live_watch.py) and the engine, and leaves out all of these. Used by
the thread that runs rounds.

    live_draft = LiveDraft(engine, reloader)       # swaps in the version that CURRENT names
    live_draft.before_round()
    outputs = engine.round()
    live_draft.after_round(outputs, kinds)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from aurora_lit.drafts.hot_reload import HotReloader, ReadyDraft, Refusal
from aurora_lit.drafts.live_watch import LiveWatch, TrafficKind
from aurora_lit.request import Output
from aurora_lit.serve.worker.domain_watch import DomainWatch
from aurora_lit.serve.worker.parts import EngineInterface
from aurora_lit.serve.worker.swap_gain import SwapGain

_log = logging.getLogger(__name__)


class LiveDraft:
    """The draft of one engine; see the file's example."""

    def __init__(self, engine: EngineInterface, reloader: HotReloader, domain_watch: DomainWatch | None = None) -> None:
        """Swap in the version to begin with; until then the engine has the starting draft.

        domain_watch: the domains that are published, which the reloader's thread checks; None: there are none.
        """
        self._engine, self._reloader, self.domain_watch = engine, reloader, domain_watch
        self._starting_version = engine.draft_version
        self._watch = LiveWatch()
        self.gain = SwapGain()
        """What the last swap brought."""
        self.num_swaps = 0
        """Swaps since serving began; the first version does not count."""
        self.num_rollbacks = 0
        self.rolled_back: Refusal | None = None
        """The last version that was rolled back."""
        self.num_alarms = 0
        self.alarm: Refusal | None = None
        """The last version that was worse for one client alone."""
        first = reloader.first()
        if first is not None:
            self._swap(first)
        if domain_watch is not None:
            domain_watch.check()
            self._swap_domains()

    def start(self, *, on_change: Callable[[], None]) -> None:
        """Begin to watch for what is published. `on_change` runs in another thread when some is ready or refused."""
        self._reloader.start(on_change=on_change)

    def close(self) -> None:
        """Stop watching."""
        self._reloader.close()

    @property
    def num_refused(self) -> int:
        """Number of versions that could not be served."""
        return self._reloader.num_refused

    @property
    def refused(self) -> Refusal | None:
        """The last version that could not be served."""
        return self._reloader.refused

    def before_round(self) -> None:
        """Swap in a draft and domains that are ready."""
        ready = self._reloader.poll()
        if ready is not None:
            self._swap(ready)
            self.num_swaps += 1
        self._swap_domains()

    def after_round(self, outputs: Sequence[Output], kinds: Sequence[TrafficKind | None]) -> None:
        """Judge the draft by its accepted proposals since the last call; none of them may be from before a swap.

        kinds: of each output's request; None: unknown, so it does not count.
        """
        if self.gain.observe(outputs):
            _log.info("%s", self.gain.line)
        for output, kind in zip(outputs, kinds, strict=True):
            if kind is None:
                continue
            proposed, accepted, is_last = *_judged_choices(output), output.finish_reason is not None
            if not proposed and not is_last:
                continue
            verdict = self._watch.observe(
                request=output.request_id, traffic=kind, proposed=proposed, accepted=accepted, is_last=is_last
            )
            version = self._engine.draft_version
            if self._watch.alarm and (alarm := Refusal(version=version, reason=self._watch.alarm)) != self.alarm:
                _log.warning("draft %s: %s", version, alarm.reason)
                self.alarm = alarm
                self.num_alarms += 1
            if verdict is not None:
                _log.warning("draft %s is rolled back: %s", version, verdict)
                self.num_rollbacks += 1
                self.rolled_back = Refusal(version=version, reason=verdict)
                self._reloader.roll_back(bad=version, reason=verdict)
                return

    def _swap_domains(self) -> None:
        """For requests whose prompts are read from now on; the others keep the domain they have."""
        if self.domain_watch is not None and (assigner := self.domain_watch.poll()) is not None:
            self._engine.assigner = assigner

    def _swap(self, ready: ReadyDraft) -> None:
        version = ready.version or self._starting_version
        # Back from a bad draft, recompute: the keys and values that it left in the cache would cost acceptance until
        # every request of its time has ended.
        self._engine.swap_draft(ready.draft, version=version, recompute=ready.trusted)
        self._watch.swapped(trusted=ready.trusted)
        if line := self.gain.swapped(version):
            _log.info("%s", line)


def _judged_choices(output: Output) -> tuple[int, int]:
    """First choices that the answer tells about if all before them are right, and how many were right."""
    if output.tested_choices is not None:
        # How much of a weighed chain is proposed says how sure the draft is, not how good.
        return output.tested_choices
    if not output.num_proposed or output.only_copied:
        return 0, 0
    proposed, accepted = output.chain_proposed, output.chain_accepted
    if output.finish_reason is not None and len(output.token_ids) <= accepted:
        # No token of the target's own follows: the request ended there, and the rest was not verified.
        proposed = accepted
    return proposed, accepted
