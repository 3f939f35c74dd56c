"""The online learner's loop: read traces, take optimiser steps within the budget, publish better drafts.

    tick:  read traces → publish domains → follow the served version → within the budget: trial or step → save → report

A trial compares the learner's draft with the served one and publishes it if the gate passes it. Leaves out the
optimiser step (learn/online/learner.py), batches (learn/data/online_batcher.py), the gate's decision
(learn/online/trial.py), when domains are published (learn/online/centroid_publisher.py), and the process that runs the
loop (learn/online/process.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aurora_lit.drafts.centroid_file import CENTROIDS_NAME, published_names
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_number
from aurora_lit.errors import AuroraError, CheckpointError, TraceError
from aurora_lit.learn.data.online_batcher import OnlineBatcher
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import is_compatible
from aurora_lit.learn.online.budget import Budget, ServerLoad, ShareLimit
from aurora_lit.learn.online.centroid_publisher import CentroidPublisher
from aurora_lit.learn.online.environment import LearnerEnvironment
from aurora_lit.learn.online.intake import TraceIntake
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.learn.online.trial import MIN_REQUESTS, GateDecision, Trial
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.settings import LearnSettings
from aurora_lit.traces.record import from_bytes

_PAUSE_S = 0.2
"""Sleep between two turns without work: so often the ring is looked at."""
_REPORT_EVERY_S = 1.0
"""Between two reports on the status page while nothing is done, which take most of an idle turn's time."""
_SHORT_PAUSE_S = 0.02
"""The same in the middle of a step."""
_RETRY_S = 60.0
"""Until a version that could not be loaded is tried again, which costs as much as a tenth of a step."""
_HAS_FREE_SLOTS = (ServerLoad.IDLE, ServerLoad.SPARE)
SAVE_EVERY_S = 300.0
"""Between two saves of the learner's state, which write seven times a draft's bytes."""
_SAVING_SHARE = 0.03
"""Largest share of the process's own processor time that saving its state may take."""
_TRIAL_SHARE = 0.12
"""The same for trials."""
_READING_SHARE = 0.08
"""The same for reading traces, of which a step beside many clients takes one in twenty; the ring drops the rest."""
_MAX_TRACES_PER_TURN = 32
"""Traces that are read between two steps at most."""
_MOST_UNREAD = 0.25
"""Part of the ring that unread traces may fill while there are requests; older ones are passed over. Of a full ring
each trace would be read when it is about to be overwritten, a minute after its request."""
_MOST_REASONS = 8
"""Reasons for not learning from a trace that are told."""
_log = logging.getLogger(__name__)


class _TrialEnded(Exception):
    """The loop was stopped in the middle of a trial."""


def newest_usable(store: DraftStore, load: Callable[[str], Eagle3Draft]) -> tuple[str | None, Eagle3Draft | None]:
    """The version to begin with, as the server chooses it, and its draft: the current one or, if that cannot be loaded,
    the newest older one that can. None: the starting draft."""
    try:
        version = store.current()
    except CheckpointError as error:
        _log.warning("%s; learning begins from the starting draft", error)
        return None, None
    while version is not None:
        try:
            return version, load(version)
        except CheckpointError as error:
            _log.warning("learning begins from an older draft: %s", error)
        try:
            version = store.version_before(version)
        except CheckpointError as error:
            _log.warning("learning begins from the starting draft: %s", error)
            break
    return None, None


class OnlineLoop:
    """Runs until `stop` is called; `tick` is one turn."""

    def __init__(
        self,
        environment: LearnerEnvironment,
        *,
        config: LearnSettings,
        learner: Learner,
        champion: DraftModule,
        target_head: TargetHead,
        batcher: OnlineBatcher,
        trial: Trial,
        budget: Budget,
    ) -> None:
        """`champion`: a module like the learner's, into which the served draft's weights are loaded."""
        self._environment, self._config, self._threads = environment, config, config.threads * config.devices
        self.learner, self._champion, self._target_head = learner, champion, target_head
        self.batcher, self.trial, self._budget = batcher, trial, budget
        self._centroid_publisher = CentroidPublisher(
            environment.store.folder / CENTROIDS_NAME, target_head, monotonic_s=environment.monotonic_s
        )
        if (detector := learner.controller.detector) is not None:
            # A learner that was killed may have founded more domains than it had saved: their numbers stay theirs.
            published = published_names(environment.store.folder / CENTROIDS_NAME)
            detector.reserve_names([*published, *batcher.reservoir.domains])
        # The status page outlives a learner: counters continue where the server's last learner stopped.
        before = environment.page.read()
        self._lost_steps = max(0, before.steps - learner.steps)
        self._lost_positions = max(0, before.positions - learner.positions)
        """Of a learner that was killed: what it had not saved."""
        if not before.rate_factor:  # no learner of this server has told its counts
            steps, positions = learner.steps, learner.positions
            environment.page.write(steps=steps, positions=positions, steps_before=steps, positions_before=positions)
        self._failures: dict[str, str] = {}
        """What fails at present, told on the status page, by operation."""
        self._skip_reasons: set[str] = set()
        self.records, self.skipped = before.records, before.skipped
        self.published, self.refused_by_gate = before.published, before.gate_refused
        self._intake = TraceIntake(learner.controller, batcher, trial)
        self._intake.num_looping, self.batcher.num_over_share = before.looping, before.over_client_share
        learner.controller.num_labels_dropped = before.labels_dropped
        self.decision: GateDecision | None = None
        self.last_turn_s = environment.monotonic_s()
        """When the last turn began, or last waited in its middle; the heartbeat stops when it was too long ago."""
        self._stopped = self._is_interruptible = False
        learner.between_pieces(self._give_way)
        self._current_version: str | None = None
        self._refused: tuple[str | None, float] | None = None
        """The version that CURRENT names, if it cannot be loaded, and when it is tried again."""
        self._passed_version: str | None = None
        """The version of the last trial's challenger, if it was published and no trial was held since."""
        self._activity = self._told_activity = "starting"
        self._last_trial_s = self._last_save_s = self._last_report_s = environment.monotonic_s()
        self._last_trial_steps = self._last_saved_steps = learner.steps
        self._trial_limit, self._saving_limit = ShareLimit(_TRIAL_SHARE), ShareLimit(_SAVING_SHARE)
        self._reading_limit = ShareLimit(_READING_SHARE)
        self._load_champion(newest_usable(environment.store, environment.served_draft)[0])
        if learner.lineage and learner.lineage["champion"] == self._current_version:
            trial.evidence.load_state_dict(learner.lineage["evidence"])

    def stop(self) -> None:
        """Stop after the current turn, or in the middle of a trial; safe in a signal handler."""
        self._stopped = True

    @property
    def is_stopped(self) -> bool:
        """True as soon as `stop` was called."""
        return self._stopped

    def run(self) -> None:
        """Run turns until stopped, then save."""
        self._environment.page.write(busy_threads=0)  # loading has ended: rounds may have all cores again
        while not self._stopped:
            self.tick()
        self._save()

    def tick(self) -> None:
        """One turn, of at most one optimiser step or one trial."""
        self.last_turn_s = self._environment.monotonic_s()
        load = self._environment.server_load()
        # Of several processes the others would wait for this one within a collective call, which has a time limit.
        self._is_interruptible = load is ServerLoad.IDLE and self._config.devices == 1
        wait_s = self._budget.wait_s(load)
        # Else traces stay in the ring, which overwrites the oldest.
        needs_traces = not self.batcher.num_waiting or self.batcher.holds_back()
        reads = self._reading_limit.is_due or (needs_traces and not wait_s)
        if not wait_s or (load in _HAS_FREE_SLOTS and reads):
            with self._environment.page.computing(self._threads):
                if reads:
                    with self._reading_limit.measured():
                        self._read_traces(load)
                self._publish_domains()
                self._follow_versions()
        if wait_s:
            self._sleep(load)
            return
        with self._environment.page.computing(self._threads):
            if trial_is_due := self._trial_is_due():
                with self._trial_limit.measured():
                    self._try_to_publish()
            found_work = trial_is_due or self._step()
        self._save_when_due()  # mostly waits for the disk
        if found_work:
            self._report()
        else:
            self._report_when_due()
            self._environment.sleep(_PAUSE_S)

    def _step(self) -> bool:
        """Take one optimiser step; False if there is nothing to train on."""
        batch = None if self.batcher.holds_back() else self.batcher.next_batch()
        self._activity = "waiting for traces" if batch is None else "learning"
        if batch is not None:
            self.learner.update(batch)
        return batch is not None

    # -- traces ----------------------------------------------------------------------------------------------------

    def _read_traces(self, load: ServerLoad) -> None:
        """Read the traces that wait in the ring, at most _MAX_TRACES_PER_TURN."""
        if load is not ServerLoad.IDLE:  # else there is time for all of them
            self._environment.traces.pass_over(_MOST_UNREAD)
        for _ in range(_MAX_TRACES_PER_TURN):
            payload = self._environment.traces.pop()
            if payload is None:
                return
            self.records += 1
            try:
                trace = from_bytes(payload)
            except TraceError as error:
                self._skip(str(error))
                continue
            if not is_compatible(trace, self._target_head):
                self._skip("it is of another target")
                continue
            self._intake.add(trace)

    def _skip(self, reason: str) -> None:
        """Count a trace that cannot be learned from; the first ones are told, since traces of our own are valid."""
        self.skipped += 1
        if reason not in self._skip_reasons and len(self._skip_reasons) < _MOST_REASONS:
            self._skip_reasons.add(reason)
            _log.warning("a trace is not learned from: %s; others for this reason are only counted", reason)

    def _publish_domains(self) -> None:
        """Publish the domains when it is time; without a detector there are only clients' labels."""
        if (detector := self.learner.controller.detector) is None:
            return
        try:
            if self._centroid_publisher.publish_when_due(detector):
                self._tell("publishing domains", "")
        except OSError as error:  # a full disk: learning continues, and requests are assigned by the file before
            self._tell("publishing domains", f"the domains could not be published: {error}")

    # -- budget ----------------------------------------------------------------------------------------------------

    def _sleep(self, load: ServerLoad) -> None:
        """Sleep for a pause, however small the debt is: paying off only what a turn costs would never end."""
        self._activity = "resting: its share is used up" if load in _HAS_FREE_SLOTS else "yielding to requests"
        self._report_when_due()
        self._environment.sleep(_PAUSE_S)

    def _give_way(self) -> None:
        """Wait in the middle of a step or trial that began while the server had no request, until its share allows it
        to go on or the requests are answered: what is idle is given more time than may be taken from requests."""
        has_waited = False
        while self._is_interruptible and not self._stopped:
            load = self._environment.server_load()
            if load is ServerLoad.IDLE or not self._budget.wait_s(load):
                break
            has_waited, self.last_turn_s = True, self._environment.monotonic_s()
            self._environment.page.write(busy_threads=0)
            self._environment.sleep(_SHORT_PAUSE_S)
        if has_waited:
            self._environment.page.write(busy_threads=self._threads)

    # -- versions --------------------------------------------------------------------------------------------------

    @property
    def _current_number(self) -> int:
        return version_number(self._current_version or "")

    def _follow_versions(self) -> None:
        """Load the served version if it changed; after a rollback of the learner's version, continue from it."""
        current, now_s = self._current_version, self._environment.monotonic_s()
        try:
            current = self._environment.store.current()
            if current == self._current_version:
                self._tell("loading a version", "")
                if self._learns_from_later():  # published, and rolled back before this loop has looked
                    self.trial.evidence.clear()
                    self._passed_version = None
                    self._restart_from_champion()
                return
            if self._refused is not None and self._refused[0] == current and now_s < self._refused[1]:
                return
            self._load_champion(current)
        except CheckpointError as error:  # damaged, or deleted in this moment
            self._refused = (current, now_s + _RETRY_S)
            self._tell("loading a version", f"learning goes on beside the draft before: {error}")
            return
        self._tell("loading a version", "")
        if self._learns_from_later():
            self._restart_from_champion()

    def _learns_from_later(self) -> bool:
        """True if the learner continues from a version later than the served one, so from one that was rolled back."""
        return version_number(self.learner.version) > self._current_number

    def _restart_from_champion(self) -> None:
        self.learner.restart_from(self._champion.draft, version=self._current_version or STARTING_VERSION)
        self._last_trial_steps = self.learner.steps

    def _load_champion(self, version: str | None) -> None:
        state, own = self._environment.served_draft(version).state_dict(), self._champion.draft.state_dict()
        if {name: each.shape for name, each in state.items()} != {name: each.shape for name, each in own.items()}:
            raise AuroraError(
                f"{version or 'the starting draft'} is of another shape than the draft that learns; start the learner "
                "again, which then goes on from it, or return to a version of this shape"
            )
        self._champion.draft.load_state_dict(state)
        self._target_head.install_head(self._champion)
        self._current_version = version
        if version is not None and version == self._passed_version:
            self.trial.crown_challenger()
        else:
            self.trial.clear_champion_scores()

    # -- trial -----------------------------------------------------------------------------------------------------

    def _trial_is_due(self) -> bool:
        return (
            self._environment.monotonic_s() - self._last_trial_s >= self._config.publish_every_s
            and self.learner.steps - self._last_trial_steps >= self._config.publish_every_steps
            and self._trial_limit.is_due
            and len(self.trial.untried) >= MIN_REQUESTS
        )

    def _end_if_stopped(self) -> None:
        """End the trial if the loop was stopped: it takes seconds, which a server that ends may not have."""
        self._give_way()
        if self._stopped:
            raise _TrialEnded

    def _try_to_publish(self) -> None:
        """Hold a trial: compare the learner's draft with the served one, and publish it if it passes."""
        self._activity, self._passed_version = "comparing drafts", None
        self._last_trial_s, self._last_trial_steps = self._environment.monotonic_s(), self.learner.steps
        try:
            with self.learner.averaged() as challenger, self.learner.fabric.autocast():
                decision = self.trial.hold(
                    champion=self._champion,
                    challenger=challenger,
                    heat=self.learner.controller.heat,
                    between_batches=self._end_if_stopped,
                )
        except _TrialEnded:
            return
        if decision is None:
            return
        self.decision = decision
        if decision.passed:
            record = {"steps": self.learner.steps, "positions": self.learner.positions, "reason": decision.reason}
            self._environment.page.write(busy_threads=0)  # publishing mostly waits for the disk
            try:
                with self.learner.averaged() as module:
                    self.learner.version = self._environment.store.publish(
                        module.draft, record=record | decision.record
                    )
                self.published, self._passed_version = self.published + 1, self.learner.version
                self._tell("publishing a draft", "")
            except (OSError, CheckpointError) as error:  # a full disk: learning continues; the next trial tries again
                self._tell("publishing a draft", f"a draft could not be published: {error}")
        else:  # the draft that could not be published is not tried again
            self._tell("publishing a draft", "")
        self.refused_by_gate += decision.refused
        version = self._current_version or STARTING_VERSION
        self.trial.conclude(decision, self.learner, champion=self._champion.draft, version=version)
        self.learner.log(
            {
                "gate_champion": decision.champion,
                "gate_challenger": decision.challenger,
                "gate_passed": float(decision.passed),
                "gate_evidence": decision.evidence,
            }
        )

    # -- state and status page -------------------------------------------------------------------------------------

    def _save_when_due(self) -> None:
        due = self._environment.monotonic_s() - self._last_save_s >= SAVE_EVERY_S
        if due and self._saving_limit.is_due and self.learner.steps != self._last_saved_steps:
            self._save()

    def _save(self) -> None:
        self._last_save_s = self._environment.monotonic_s()
        self.learner.lineage = {"champion": self._current_version, "evidence": self.trial.evidence.state_dict()}
        try:
            with self._saving_limit.measured():
                self.learner.save()
            self._last_saved_steps = self.learner.steps
            self._tell("saving", "")
        except OSError as error:
            self._tell("saving", f"the learner's state could not be saved: {error}")

    def _tell(self, operation: str, failure: str) -> None:
        """Tell why an operation failed, until it succeeds: "" then."""
        if failure != self._failures.get(operation, ""):
            self._failures[operation] = failure
            self._environment.page.write(error="; ".join(filter(None, self._failures.values())))

    def _report_when_due(self) -> None:
        """While nothing is done: what changes is told at once."""
        if (
            self._activity != self._told_activity
            or self._environment.monotonic_s() - self._last_report_s >= _REPORT_EVERY_S
        ):
            self._report()

    def _report(self) -> None:
        self._last_report_s, self._told_activity = self._environment.monotonic_s(), self._activity
        if error := self.learner.take_logging_error():
            self._tell("logging", error)
        learner, decision, controller = self.learner, self.decision, self.learner.controller
        shift = controller.last_shift
        self._environment.page.write(
            steps=self._lost_steps + learner.steps,
            positions=self._lost_positions + learner.positions,
            records=self.records,
            skipped=self.skipped + learner.num_nonfinite,
            looping=self._intake.num_looping,
            over_client_share=self.batcher.num_over_share,
            labels_dropped=controller.num_labels_dropped,
            lag_records=self._environment.traces.lag_records,
            lag_bytes=self._environment.traces.lag_bytes,
            published=self.published,
            gate_refused=self.refused_by_gate,
            compute_share=self._budget.measured_share,
            loss=learner.mean("loss"),
            champion_score=decision.champion if decision else 0.0,
            challenger_score=decision.challenger if decision else 0.0,
            version=learner.version,
            activity=self._activity,
            num_shifts=controller.num_shifts,
            last_shift=f"{shift.cause}: {shift.domain or 'unknown'} (novelty {shift.novelty:.2f})" if shift else "",
            domains=controller.describe(),
            rate_factor=controller.factor,
        )
