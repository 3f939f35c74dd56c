"""What a vLLM engine does, on the status page that `aurora-lit status` and the learner read; trials of new drafts.

Written by the rank that has the hidden states. A vLLM worker does not see the queue, so `waiting` is 0, and
1 once nothing is seen any more.

    status = LiveStatus(page, capture)
    status.observe(step, outcomes)          # after each step
    status.swapped("draft-000003", trusted=False)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from aurora_lit.drafts.live_watch import LiveWatch, TrafficKind
from aurora_lit.drafts.versions import version_number
from aurora_lit.ipc.engine_status import EngineCounters, EngineStatusPage
from aurora_lit.settings import MAX_PROPOSAL_LENGTH
from aurora_lit.vllm.capture import Capture, RoundOutcome, Step

_WRITE_EVERY_S = 0.25
_BEAT_EVERY_S = 0.5
_log = logging.getLogger("vllm.aurora_lit")


class LiveStatus:
    """Counters of one engine; see the file's example."""

    def __init__(self, page: EngineStatusPage, capture: Capture) -> None:
        """Starts a thread that writes heartbeats, since an idle engine takes no steps."""
        self._page, self._capture = page, capture
        self._watch = LiveWatch()
        self._version = ""
        self._counters = EngineCounters()
        self._swaps = self._rollbacks = 0
        self._next_write_s = 0.0
        capture.on_finish = self._finished
        threading.Thread(target=self._beat, name="aurora-lit-heartbeat", daemon=True).start()

    def observe(self, step: Step, outcomes: Sequence[RoundOutcome]) -> None:
        """Count a step, and judge the draft by its accepted proposals."""
        counters = self._counters
        counters.generated_tokens += sum(step.num_sampled)
        if any(step.num_sampled):
            counters.count_round("chain" if outcomes else "plain")
        for outcome in outcomes:
            counters.drafts += 1
            counters.proposed += outcome.proposed
            counters.accepted += outcome.accepted
            for position in range(min(outcome.accepted, MAX_PROPOSAL_LENGTH)):
                counters.accepted_by_position[position] += 1
            self._judge(outcome)
        if time.monotonic() >= self._next_write_s:
            self._next_write_s = time.monotonic() + _WRITE_EVERY_S
            self.write()

    def write(self) -> None:
        """Write all counters."""
        self._counters.prompt_tokens = self._capture.num_prompt_tokens
        self._counters.cached_tokens = self._capture.num_cached_tokens
        self._page.write(
            **vars(self._counters),
            running=self._capture.num_running,
            opted_out=self._capture.num_opted_out,
            unrecorded=self._capture.num_unrecorded,
            swaps=self._swaps,
            rollbacks=self._rollbacks,
        )

    def failed(self, message: str, *, is_off: bool) -> None:
        """Show what went wrong in capture. is_off: nothing more is seen of the load, so the learner hardly learns."""
        self._page.write(error=message, waiting=int(is_off))
        self.write()

    def swapped(self, version: str, *, trusted: bool) -> None:
        """Another draft proposes from now on; unless it was served before, its trial begins."""
        self._swaps += 1
        self._version = version
        self._watch.swapped(trusted=trusted)
        self._page.write(draft_version=version, swaps=self._swaps)

    def _judge(self, outcome: RoundOutcome) -> None:
        if outcome.version != version_number(self._version):
            return
        self._react(
            self._watch.observe(
                request=outcome.request_id,
                traffic=outcome.traffic,
                proposed=outcome.proposed,
                accepted=outcome.accepted,
            )
        )

    def _finished(self, request_id: str, traffic: TrafficKind) -> None:
        self._react(self._watch.observe(request=request_id, traffic=traffic, proposed=0, accepted=0, is_last=True))

    def _react(self, verdict: str | None) -> None:
        if verdict is not None:
            _log.warning("aurora-lit: draft %s is rolled back: %s", self._version, verdict)
            self._rollbacks += 1
            # The follower, in another process, reads it from the page.
            self._page.write(rolled_back_version=self._version, rolled_back_reason=verdict, rollbacks=self._rollbacks)

    def _beat(self) -> None:
        while True:
            self._page.beat()
            time.sleep(_BEAT_EVERY_S)
