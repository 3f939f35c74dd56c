"""The learner's loop: read traces, learn within the budget, try to publish, follow what serving does with the drafts.

    tick:  drain ring → follow versions → step, if the budget allows → trial → save → report

What is left out: the optimiser step (learn/online/learner.py), batches (learn/data/feed.py), the verdict (learn/online/gate.py), and how
a process comes to run this (learn/online/process.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from aurora_lit.drafts.versions import DraftStore, version_number
from aurora_lit.errors import CheckpointError, TraceError
from aurora_lit.ipc.learner_status import LearnerBlock
from aurora_lit.learn.data.admission import Admission
from aurora_lit.learn.data.feed import Feed
from aurora_lit.learn.data.labelled_trace import crop, first_taught, fits
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import Budget, Load
from aurora_lit.learn.online.domain_drafts import DomainDrafts
from aurora_lit.learn.online.gate import MIN_REQUESTS, HeldOut, Verdict, compare
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.settings import LearnSettings
from aurora_lit.traces.record import from_bytes

_LONGEST_PAUSE_S = 0.2
"""The ring is looked at, and the page written, at least so often between steps."""
_READ_AT_ONCE = 32
"""Most traces read between two steps."""


class TraceSource(Protocol):
    """A ring's reading end."""

    def pop(self) -> bytes | None:
        """The next record; None when there is none now."""

    @property
    def lag_records(self) -> int:
        """Records that wait."""

    @property
    def lag_bytes(self) -> int:
        """Bytes that wait."""


@dataclass(kw_only=True)
class LearnerEnvironment:
    """What the loop meets of the world beyond its own process."""

    traces: TraceSource
    store: DraftStore
    page: LearnerBlock
    load: Callable[[], Load]
    """What the server has to do."""
    served_draft: Callable[[str | None], Draft]
    """A version's draft, checked; None: the one that serving started with. Raises CheckpointError."""
    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class OnlineLoop:
    """Runs until `stop` is called; `tick` does one turn."""

    def __init__(
        self,
        outside: LearnerEnvironment,
        *,
        config: LearnSettings,
        learner: Learner,
        champion: DraftModule,
        ends: TargetHead,
        feed: Feed,
        held_out: HeldOut,
        budget: Budget,
        domain_drafts: DomainDrafts | None = None,
    ) -> None:
        """`champion`: a module of the learner's kind to hold the served draft; its weights are loaded here."""
        self._outside, self._config, self._threads = outside, config, config.threads * config.devices
        self.learner, self._champion, self._ends = learner, champion, ends
        self.feed, self.held_out, self._budget = feed, held_out, budget
        self._domain_drafts = domain_drafts
        # The page outlives a learner: counters go on where the last one, of the same server, was.
        before = outside.page.read()
        self.records, self.skipped, self.feed.num_stale = before.records, before.skipped, before.stale
        self.published, self.refused_by_gate = before.published, before.gate_refused
        self.warm_starts = before.warm_starts
        self.tokens_entered, self._coverage = before.tokens_entered, before.vocabulary_coverage
        self.admission = Admission(max_repeated_share=config.max_repeated_share)
        self.admission.num_looping, self.feed.num_over_share = before.looping, before.over_client_share
        learner.steering.num_labels_dropped = before.labels_dropped
        self.verdict: Verdict | None = None
        self.last_turn_s = outside.monotonic_s()
        """When the last turn began: a heartbeat may be given while it is recent."""
        self._stopped = False
        self._served: str | None = None
        self._activity = "starting"
        self._last_trial_s = self._last_save_s = outside.monotonic_s()
        self._last_trial_steps = self._last_saved_steps = learner.steps
        self._load_champion(outside.store.current())

    def stop(self) -> None:
        """Let the turn in hand be the last; safe in a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Turn until stopped, then save."""
        while not self._stopped:
            self.tick()
        self._save()

    def tick(self) -> None:
        """One turn, of at most one optimiser step or one trial."""
        self.last_turn_s = self._outside.monotonic_s()
        load = self._outside.load()
        wait_s = self._budget.wait_s(load)
        if load is Load.SPARE or not wait_s:  # else traces wait in the ring, which keeps the newest
            with self._outside.page.computing(self._threads):
                self._drain()
                self._follow_versions()
        if wait_s:
            self._rest(wait_s, load)
            return
        self._warm_start()
        self.feed.replay_share = self.learner.steering.signal.replay_share
        with self._outside.page.computing(self._threads):
            if trial_is_due := self._trial_is_due():
                self._try_to_publish()
            found_work = trial_is_due or self._step()
            self._save_when_due()
        self._report()
        if not found_work:
            self._outside.sleep(_LONGEST_PAUSE_S)

    def _step(self) -> bool:
        """One optimiser step; False when there is nothing to learn from."""
        batch = self.feed.next_batch(oldest_fresh=self._served_number - self._config.max_staleness)
        self._activity = "waiting for traces" if batch is None else "learning"
        if batch is not None:
            self.learner.update(batch)
        return batch is not None

    # -- traces ----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Read what waits in the ring: held-out requests for the gate, all others to learn from."""
        for _ in range(_READ_AT_ONCE):
            payload = self._outside.traces.pop()
            if payload is None:
                return
            self.records += 1
            try:
                trace = from_bytes(payload)
            except TraceError:
                self.skipped += 1
                continue
            if not fits(trace, self._ends):
                self.skipped += 1
                continue
            if not self.admission.admits(trace):
                continue
            trace = self.learner.steering.place(trace)
            if not self.held_out.takes(trace.request_id):
                self.feed.add(trace)
            elif first_taught(trace) < len(trace.token_ids_T):
                self.held_out.add(crop(trace, self._config.batch_positions))

    # -- budget ----------------------------------------------------------------------------------------------------

    def _rest(self, wait_s: float, load: Load) -> None:
        """Sleep until the budget allows work, or a little, so that the ring is looked at again."""
        self._activity = "resting: its share is used up" if load is Load.SPARE else "yielding to requests"
        self._report()
        self._outside.sleep(min(wait_s, _LONGEST_PAUSE_S))

    # -- versions --------------------------------------------------------------------------------------------------

    @property
    def _served_number(self) -> int:
        return version_number(self._served or "")

    def _follow_versions(self) -> None:
        """Notice that another draft is to be served; if ours was taken back, go on from the one it went back to."""
        try:
            current = self._outside.store.current()
            if current == self._served:
                return
            self._load_champion(current)
        except CheckpointError:  # pruned or garbled in this moment; the next turn looks again
            return
        if version_number(self.learner.version) > self._served_number:
            self.learner.restart_from(self._champion.draft, version=current or STARTING_VERSION)
            self._last_trial_steps = self.learner.steps

    def _load_champion(self, version: str | None) -> None:
        self._champion.draft.load_state_dict(self._outside.served_draft(version).state_dict())
        self._ends.fit_head(self._champion)
        self._served = version
        self.held_out.forget_scores()

    # -- trial -----------------------------------------------------------------------------------------------------

    def _trial_is_due(self) -> bool:
        return (
            self._outside.monotonic_s() - self._last_trial_s >= self._config.publish_every_s
            and self.learner.steps - self._last_trial_steps >= self._config.min_steps
            and len(self.held_out.newest) >= MIN_REQUESTS
        )

    def _try_to_publish(self) -> None:
        """Compare the learner's draft with the one that serves; publish it if it passes."""
        self._activity = "comparing drafts"
        self._last_trial_s, self._last_trial_steps = self._outside.monotonic_s(), self.learner.steps
        self.tokens_entered += self.learner.adapt_vocabulary()
        if (use := self.learner.vocabulary_use) is not None:
            self._coverage = use.coverage(self.learner.draft.draft_token_ids)
        with self.learner.averaged() as challenger, self.learner.fabric.autocast():
            verdict = compare(
                self.held_out,
                champion=self._champion,
                challenger=challenger,
                batch_positions=self._config.batch_positions,
            )
            if verdict is not None and self._domain_drafts is not None:
                self._domain_drafts.offer(challenger, self.held_out)
        if verdict is None:
            return
        self.verdict = verdict
        if verdict.passed:
            record = {"steps": self.learner.steps, "positions": self.learner.positions, "reason": verdict.reason}
            try:
                with self.learner.averaged() as better:
                    self.learner.version = self._outside.store.publish(better.draft, record=record | verdict.record)
                self.published += 1
            except OSError as error:  # a full disk: learning goes on, and the next trial tries again
                self._outside.page.write(error=f"a draft could not be published: {error}")
        else:
            self.refused_by_gate += 1
        self.learner.judged(
            passed=verdict.passed, champion=self._champion.draft, version=self._served or STARTING_VERSION
        )
        self.learner.log(
            {
                "gate_champion": verdict.champion,
                "gate_challenger": verdict.challenger,
                "gate_passed": float(verdict.passed),
            }
        )

    def _warm_start(self) -> None:
        """When a domain comes back whose kept draft is better there, go on from that, and hold a trial at once."""
        if self._domain_drafts is not None and self._domain_drafts.warm_start(self.learner, self.held_out):
            self.warm_starts += 1
            self._last_trial_s, self._last_trial_steps = -math.inf, self.learner.steps - self._config.min_steps

    # -- what is left behind ---------------------------------------------------------------------------------------

    def _save_when_due(self) -> None:
        due = self._outside.monotonic_s() - self._last_save_s >= self._config.save_every_s
        if due and self.learner.steps != self._last_saved_steps:
            self._save()

    def _save(self) -> None:
        self._last_save_s, self._last_saved_steps = self._outside.monotonic_s(), self.learner.steps
        try:
            self.learner.save()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self._outside.page.write(error=f"the learner's state could not be saved: {error}")

    def _report(self) -> None:
        learner, verdict, steering = self.learner, self.verdict, self.learner.steering
        signal, shift = steering.signal, steering.last_shift
        self._outside.page.write(
            steps=learner.steps,
            positions=learner.positions,
            records=self.records,
            skipped=self.skipped + learner.poisoned,
            stale=self.feed.num_stale,
            looping=self.admission.num_looping,
            over_client_share=self.feed.num_over_share,
            labels_dropped=steering.num_labels_dropped,
            warm_starts=self.warm_starts,
            tokens_entered=self.tokens_entered,
            vocabulary_coverage=self._coverage,
            lag_records=self._outside.traces.lag_records,
            lag_bytes=self._outside.traces.lag_bytes,
            published=self.published,
            gate_refused=self.refused_by_gate,
            compute_share=self._budget.measured_share,
            loss=learner.mean("loss"),
            champion_score=verdict.champion if verdict else 0.0,
            challenger_score=verdict.challenger if verdict else 0.0,
            version=learner.version,
            activity=self._activity,
            num_shifts=steering.num_shifts,
            last_shift=f"{shift.cause}: {shift.domain or 'unknown'} (novelty {shift.novelty:.2f})" if shift else "",
            domains=steering.describe(),
            rate_factor=steering.factor,
            **vars(signal),
        )
