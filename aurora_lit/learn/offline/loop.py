"""Learning from recorded traces offline: what a live server and its learner would have done, faster than real time.

    a block of traces:  score the served draft → replace the recorded rounds by the served draft's own
                        → learn from each trace → trial: is the learner's draft better?

Each trace is scored before it is learned from (test-then-train), with the starting draft too, and with both also as if
copies were proposed beside the draft: from earlier in the request and from the answers of earlier traces, which are
remembered after their score (learn/offline/ngram_paths.py). Steps, gate and published versions are those of online
learning; time is counted in traces, so a replay is repeatable. Leaves out how a trace is scored
(learn/offline/scoring.py), the command and its report (cli/replay.py), and comparisons of several settings
(benchmarks/ablation.py).

Several processes may replay together, as online learners do (learn/online/data_parallel.py). All read the same traces
and divide what is scored. The first one alone makes rounds, batches and decisions: the others take its steps with it,
each with its part of the batch, and serve what it serves. So nothing that goes wrong in one of them, such as a full
disk, makes them differ.

What it does not share with the online loop (learn/online/loop.py): that one follows a store of versions that others
write too, works within a budget and reports faults, while a replay decides by counts alone.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from aurora_lit.config import AuroraConfig
from aurora_lit.drafts.store import DraftStore
from aurora_lit.drafts.versions import version_name, version_number
from aurora_lit.errors import AuroraError, TraceError
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.trace_parts import is_compatible
from aurora_lit.learn.offline.ngram_paths import ngram_paths_of
from aurora_lit.learn.offline.on_policy import RoundSimulator
from aurora_lit.learn.offline.scoring import RoundScorer, RoundTotals, RoundWalk
from aurora_lit.learn.online.build import STATE_NAME, controller_for, make_batcher, make_trial, online_module
from aurora_lit.learn.online.data_parallel import Follower, Leader, broadcast_plain
from aurora_lit.learn.online.intake import TraceIntake
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.learn.online.trial import GateDecision
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.objective import BaseLoss
from aurora_lit.traces.log import read_index, read_shard
from aurora_lit.traces.record import Trace, check

_SCORING_POSITIONS = 4096
"""Positions of one scoring pass, padding included."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoredTrace:
    """A trace's score before it was learned from."""

    domain: str
    """The client's label, else the detector's."""
    version: str
    """The served version."""
    static: RoundTotals
    """Rounds of the starting draft."""
    memory: RoundTotals
    """The same with copies beside it."""
    learning: RoundTotals
    """Rounds of the served draft."""
    both: RoundTotals
    """The same with copies beside it."""


ARMS = ("static", "memory", "learning", "both")
"""What is scored; the first two have the starting draft, the others the served one."""


class OfflineLoop:
    """A learner, the draft it serves, and the scores of the starting and the served draft along the stream.

    >>> replay = OfflineLoop(config, target_head=head, starting=draft, folder=out, scratch=scratch, steps_per_trace=0.5)
    >>> for block in blocks(traces, 32):
    ...     replay.process_block(block)
    >>> replay.scored, replay.served
    """

    def __init__(
        self,
        config: AuroraConfig,
        *,
        target_head: TargetHead,
        starting: Eagle3Draft,
        folder: Path,
        scratch: Path,
        steps_per_trace: float,
        fabric: Fabric | None = None,
        gated: bool = True,
        base_loss: BaseLoss = "lk",
        seed: int = 0,
        keep_versions: bool = True,
    ) -> None:
        """Start with the `starting` draft as the served one.

        folder: for published versions. scratch: for remembered traces, of which only the first process has any.
        fabric: for several processes that replay together; all create one. gated: false serves the learner's draft
        without a trial after each learn.publish_every_steps steps. base_loss: another one is for comparison. seed: of
        what is remembered and held out. keep_versions: false writes no version to disk.
        """
        learn = config.learn
        module = online_module(config, copy.deepcopy(starting), target_head, base_loss=base_loss)
        processes, first = (1, True) if fabric is None else (fabric.world_size, fabric.is_global_zero)
        self._leader = Leader(fabric) if first and processes > 1 else None
        self._follower = None if first else Follower(fabric)
        self.learner = Learner(
            module,
            controller_for(config),
            folder / STATE_NAME,
            target_head=target_head,
            version=STARTING_VERSION,
            ema_decay=learn.ema_decay,
            fabric=fabric,
            before_step=self._leader.broadcast_step if self._leader else None,
        )
        self.fabric = self.learner.fabric
        device = self.fabric.device
        self._target_head = target_head
        self.served = copy.deepcopy(starting).to(device)
        self._champion = online_module(config, self.served, target_head).to(device)
        self.ngrams = ngram_paths_of(config)
        """What is copied; None: nothing, and arms with copies score as those without."""
        proposed = config.engine.max_draft_tokens
        reach = proposed if self.ngrams is None else max(proposed, self.ngrams.most)
        self._scorers = [self._scorer(config, draft, reach) for draft in (copy.deepcopy(starting), self.served)]
        self._walks = {arm: RoundWalk(reach=reach) for arm in ARMS}
        self._batcher = make_batcher(config, scratch, seed=seed)
        self._trial = make_trial(config, seed=seed, gated=gated)
        self._intake = TraceIntake(self.learner.controller, self._batcher, self._trial)
        self.simulator = RoundSimulator(module=self._scorers[1].module)
        self._store = DraftStore(folder) if keep_versions else None
        self._gated = gated
        self.published = 0
        """Drafts of the learner that were served."""
        self._learn, self._steps_per_trace = learn, steps_per_trace
        self._steps_due = 0.0
        self._last_trial_steps = 0
        self.version = STARTING_VERSION
        """The served version."""
        self.scored: list[ScoredTrace] = []
        self.skipped = 0
        """Damaged traces, and traces of another target."""
        self.trials: list[GateDecision] = []

    def process_block(self, block: Sequence[Trace]) -> None:
        """Score a block of traces with the served draft, learn from each, then hold a trial.

        Raises AuroraError if the processes have different blocks.
        """
        valid = [trace for trace in block if self._is_valid(trace)]
        self.skipped += len(block) - len(valid)
        self.check_same_traces(valid, num_read=len(block))
        rounds_of = self._score(valid)
        for domain, rounds in zip(self._learn_from_block(valid), rounds_of, strict=True):
            self.scored.append(ScoredTrace(domain=domain, version=self.version, **rounds))
        self.hold_trial()

    def check_same_traces(self, traces: Sequence[Trace], *, num_read: int = 0) -> None:
        """Raise AuroraError, in every process, unless all have these traces next, of `num_read` traces; 0: no more."""
        if self.fabric.world_size == 1:
            return
        segments = [(t.request_id, t.first_position, t.answer_start, len(t.token_ids_T)) for t in traces]
        digest = zlib.crc32(repr((num_read, segments)).encode())
        largest, smallest = self.fabric.all_reduce(torch.tensor([digest, -digest]), reduce_op="max")
        if largest != -smallest:
            raise AuroraError(
                "the processes read different traces: give all of them the same files, none of which is damaged on one "
                "machine only"
            )

    def skip(self, count: int) -> None:
        """Count traces that cannot be read."""
        self.skipped += count

    def simulate_rounds(self, traces: Sequence[Trace], copied: Sequence[Sequence[int]] | None = None) -> list[Trace]:
        """The traces with the rounds of the served draft; copied: as `RoundSimulator.simulate_rounds` takes it."""
        return self.simulator.simulate_rounds(traces, version=version_number(self.version), copied=copied)

    def _is_valid(self, trace: Trace) -> bool:
        try:
            check(trace)
        except TraceError:
            return False
        return is_compatible(trace, self._target_head)

    def _scorer(self, config: AuroraConfig, draft: Eagle3Draft, reach: int) -> RoundScorer:
        module: DraftModule = online_module(config, draft, self._target_head).to(self.fabric.device)
        module.num_steps = config.engine.max_draft_tokens
        return RoundScorer(module, self._target_head, batch_positions=_SCORING_POSITIONS, reach=reach)

    def _score(self, traces: Sequence[Trace]) -> list[dict[str, RoundTotals]]:
        """For each trace, the rounds of each arm; the processes divide the requests, but each remembers all answers."""
        processes, mine = self.fabric.world_size, self.fabric.global_rank
        indices = [i for i, t in enumerate(traces) if zlib.crc32(t.request_id.encode()) % processes == mine]
        own = [traces[i] for i in indices]
        static, served = (dict(zip(indices, each.accept_probabilities(own), strict=True)) for each in self._scorers)
        found = torch.zeros(len(traces), len(ARMS), 2, dtype=torch.float64)
        along = [None] * len(traces) if self.ngrams is None else [c.accepted_T for c in self.ngrams.along(traces)]
        for index in indices:
            copied_T = along[index]
            rows = ((static, None), (static, copied_T), (served, None), (served, copied_T))  # as ARMS
            for arm, (walk, (accept_KT, copied)) in enumerate(zip(self._walks.values(), rows, strict=True)):
                rounds = walk.walk(traces[index], accept_KT[index], copied)
                found[index, arm] = torch.tensor([rounds.count, rounds.tokens])
        table = torch.as_tensor(self.fabric.all_reduce(found, reduce_op="sum")).tolist()
        return [
            {arm: RoundTotals(count=count, tokens=tokens) for arm, (count, tokens) in zip(ARMS, row, strict=True)}
            for row in table
        ]

    def _learn_from_block(self, traces: Sequence[Trace]) -> list[str]:
        """Learn from each trace; followers take the leader's steps. Returns the domain of each: its label, or found."""
        domains = None
        if self._follower is not None:
            self._follower.follow(self.learner)
        else:
            placed = map(self.learn_from, self.simulate_rounds(traces))
            domains = [trace.domain or each.domain for trace, each in zip(traces, placed, strict=True)]
        if self._leader is not None:
            self._leader.end_turn()
        of_all: list[str] = broadcast_plain(self.fabric, domains)
        return of_all

    def learn_from(self, trace: Trace) -> Trace:
        """Take in a trace as the online learner does, and the steps that are due. Returns the trace with its domain.

        Steps for which no trace is left are made up for later, but no more than there are between two trials.

        A trace with a looping answer is returned as it is.
        """
        placed = self._intake.add(trace)
        if placed is None:
            return trace
        self._steps_due += self._steps_per_trace
        while self._steps_due >= 1:
            batch = self._batcher.next_batch()
            if batch is None:  # all traces wait for a trial, or were learned from as often as they may be
                self._steps_due = min(self._steps_due, float(self._learn.publish_every_steps))
                break
            self._steps_due -= 1
            self.learner.update(batch)
        return placed

    def hold_trial(self) -> None:
        """Publish and serve the learner's draft if it passes the gate; nothing until enough steps were taken."""
        if self.learner.steps - self._last_trial_steps < self._learn.publish_every_steps:
            return
        self._last_trial_steps = self.learner.steps
        with self.learner.averaged() as challenger:
            if not self._gated:
                self._serve({"reason": "no gate"})
                return
            decision = self._decide(challenger)
            if decision is None:
                return
            self.trials.append(decision)
            if decision.passed:
                self._serve({"reason": decision.reason} | decision.record)
        # Followers get the schedules, and weights that change, before the next step.
        if self._follower is None:
            self._trial.conclude(decision, self.learner, champion=self.served, version=self.version)

    def _decide(self, challenger: DraftModule) -> GateDecision | None:
        """The first process's decision, in all of them; None if too few requests wait for a trial."""
        decision = None
        if self._follower is None:
            with self.fabric.autocast():
                decision = self._trial.hold(
                    champion=self._champion, challenger=challenger, heat=self.learner.controller.heat
                )
        fields = broadcast_plain(self.fabric, None if decision is None else vars(decision))
        return None if fields is None else GateDecision(**fields)

    def _serve(self, record: dict[str, Any]) -> None:
        """Serve the learner's draft, which has its averaged weights now, rounded as in a checkpoint."""
        self.published += 1
        name = version_name(self.published)
        if self._store is not None and self.fabric.is_global_zero:
            record = {"steps": self.learner.steps, "positions": self.learner.positions} | record
            name = self._store.publish(self.learner.draft, record=record)
        stored = {
            key: each.bfloat16() if each.is_floating_point() else each
            for key, each in self.learner.draft.state_dict().items()
        }
        # Not read from the store, which other machines do not have.
        name, stored = broadcast_plain(self.fabric, [name, stored])
        self.served.load_state_dict(stored)
        for module in (self._champion, *(scorer.module for scorer in self._scorers)):
            self._target_head.install_head(module)
        self.version = self.learner.version = name
        self._trial.clear_champion_scores()


def shard_names(folder: Path) -> list[str]:
    """The files of a log in the order in which they were recorded."""
    return [shard.name for shard in read_index(folder)]


def read_traces(
    folder: Path, names: Sequence[str] | None = None, *, on_damaged: Callable[[int], None] = lambda count: None
) -> Iterator[Trace]:
    """Yield all traces of a log in the order in which they were recorded. names: of its files; None: all.

    A damaged file is skipped with a warning; `on_damaged` is told how many traces it should hold. Raises AuroraError if
    a server deletes a file meanwhile, since it has recorded trace.record_mb.
    """
    counts = {shard.name: shard.num_sequences for shard in read_index(folder)}
    for name in counts if names is None else names:
        try:
            traces = list(read_shard(folder / name))
        except FileNotFoundError as error:
            raise AuroraError(
                f"{folder / name} was deleted by the server that records there; replay a copy of the folder"
            ) from error
        except (OSError, MemoryError):  # not the file's fault, and other processes may have read it
            raise
        except Exception as error:  # whatever is wrong with one file, the others can be read
            _log.warning("%s cannot be read, and its traces are skipped: %r", folder / name, error)
            on_damaged(counts.get(name, 0))
            continue
        yield from traces


def count_traces(folder: Path) -> int:
    """Number of traces of a log. Raises AuroraError if there are none."""
    count = sum(shard.num_sequences for shard in read_index(folder))
    if not count:
        raise AuroraError(f"{folder} holds no traces; a server records them with trace.record={folder}")
    return count


def blocks(traces: Iterator[Trace], size: int) -> Iterator[list[Trace]]:
    """Yield lists of `size` consecutive traces; the last one may be shorter."""
    block: list[Trace] = []
    for trace in traces:
        block.append(trace)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
