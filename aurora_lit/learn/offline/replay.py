"""Learning from recorded traces, offline: what a live server and its learner would have done, faster than real time.

    a block of traces:  score with the draft that serves → its own rounds in the place of the recorded ones
                        → learn from each → trial: is the learner's draft better?

Each trace is scored before anything is learned from it (prequential evaluation), by the starting draft too. What
teaches the policy are the rounds that the draft which serves in the replay would have had (learn/offline/on_policy.py), not
those of the draft that was recorded. Steps, gate and publishing are those of live learning; time is counted in traces,
so a replay can be repeated. Several processes may
replay together: all read the same traces and take each step together, each with its part of the batch.
What is left out: how a score comes about (learn/offline/scoring.py), the command and what it prints (replay.py), arms to
compare (bench/ablation/run.py).
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from aurora_lit.config import AuroraConfig
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.drafts.versions import DraftStore, version_name, version_number
from aurora_lit.errors import AuroraError, ConfigError, TraceError
from aurora_lit.learn.data.admission import Admission
from aurora_lit.learn.data.feed import Feed
from aurora_lit.learn.data.labelled_trace import crop, first_taught, fits, for_gate
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.vocabulary import VocabularyUse
from aurora_lit.learn.offline.on_policy import Reproposer
from aurora_lit.learn.offline.scoring import Rounds, RoundScorer
from aurora_lit.learn.online.build import online_module, steering_of
from aurora_lit.learn.online.gate import HeldOut, Verdict, compare
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.traces.log import read_index, read_shard
from aurora_lit.traces.record import Trace, check

_SCORED_POSITIONS = 4096
"""Of one pass that scores."""
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One trace before it was learned from."""

    domain: str
    """The client's label, else the detector's."""
    version: str
    """Draft that served."""
    static: Rounds
    """With the starting draft."""
    learning: Rounds
    """With the draft that served."""


class Replay:
    """A learner, the draft that serves, and what both drafts were worth along the stream.

    >>> replay = Replay(config, ends=ends, starting=draft, folder=out, scratch=scratch, steps_per_trace=0.5)
    >>> for block in blocks(traces, 32):
    ...     replay.take(block)
    >>> replay.scored, replay.served
    """

    def __init__(
        self,
        config: AuroraConfig,
        *,
        ends: TargetHead,
        starting: Draft,
        folder: Path,
        scratch: Path,
        steps_per_trace: float,
        fabric: Fabric | None = None,
        gated: bool = True,
        keep_versions: bool = True,
    ) -> None:
        """`folder`: for the published versions; `scratch`: for what is remembered of the traces, for this process.

        gated: false lets every draft serve that has learned for learn.min_steps more steps. keep_versions: false writes
        no version to disk.
        """
        if config.engine.max_draft_tokens == 0:
            raise ConfigError("engine.max_draft_tokens=0: nothing would be proposed; use 1 to 8")
        learn = config.learn
        module = online_module(config, copy.deepcopy(starting), ends)
        self.learner = Learner(
            module,
            steering_of(config),
            folder / "learner.ckpt",
            ends=ends,
            version=STARTING_VERSION,
            vocabulary_use=VocabularyUse(ends) if learn.adapt_vocabulary else None,
            ema_decay=learn.ema_decay,
            fabric=fabric,
        )
        self.fabric = self.learner.fabric
        device = self.fabric.device
        self._ends = ends.to(device)
        self.served = copy.deepcopy(starting).to(device)
        self._champion = online_module(config, self.served, ends).to(device)
        self._scorers = [self._scorer(config, draft) for draft in (copy.deepcopy(starting), self.served)]
        self._feed = Feed(
            ends,
            Reservoir(scratch / "reservoir", limit_bytes=learn.reservoir_mb * _MIB, seed=learn.seed),
            batch_positions=learn.batch_positions,
            replay_share=learn.replay_share,
            live_bytes=learn.reservoir_mb * _MIB // 8,
            max_client_share=learn.max_client_share,
            choice=learn.choice,
            seed=learn.seed,
            vocabulary_use=self.learner.vocabulary_use,
        )
        self._admission = Admission(max_repeated_share=learn.max_repeated_share)
        self._held_out = HeldOut(num_newest=learn.gate_requests, seed=learn.seed, read=partial(for_gate, ends=ends))
        self.reproposer = Reproposer(module=self._scorers[1].module, seed=learn.seed)
        self._store = DraftStore(folder, keep=config.checkpoint.keep) if keep_versions else None
        self._gated = gated
        self.published = 0
        """Drafts that came to serve."""
        self._learn, self._steps_per_trace = learn, steps_per_trace
        self._steps_due = 0.0
        self._last_trial_steps = 0
        self._newest_version = 0
        self.version = STARTING_VERSION
        """Of the draft that serves."""
        self.scored: list[Scored] = []
        self.skipped = 0
        """Traces of another target, or damaged."""
        self.trials: list[Verdict] = []

    def take(self, block: Sequence[Trace]) -> None:
        """Score a block of traces, learn from each, then hold a trial; the same draft serves all along the block."""
        sound = [trace for trace in block if self._is_sound(trace)]
        self.skipped += len(block) - len(sound)
        proposed = self.repropose(sound)
        for trace, own, (static, learning) in zip(sound, proposed, self._score(sound), strict=True):
            placed = self.learn_from(own)
            label = trace.domain or placed.domain
            self.scored.append(Scored(domain=label, version=self.version, static=static, learning=learning))
        self.hold_trial()

    def repropose(self, traces: Sequence[Trace]) -> list[Trace]:
        """With the rounds of the draft that serves now, exploring as the learner asks now."""
        signal = self.learner.steering.signal
        self.reproposer.explore_share = signal.explore_share
        self.reproposer.explore_temperature = signal.explore_temperature
        return self.reproposer.repropose(traces, version=version_number(self.version))

    def _is_sound(self, trace: Trace) -> bool:
        try:
            check(trace)
        except TraceError:
            return False
        return fits(trace, self._ends)

    def _scorer(self, config: AuroraConfig, draft: Draft) -> RoundScorer:
        module: DraftModule = online_module(config, draft, self._ends).to(self.fabric.device)
        module.num_steps = config.engine.max_draft_tokens
        return RoundScorer(module, self._ends, batch_positions=_SCORED_POSITIONS)

    def _score(self, traces: Sequence[Trace]) -> list[list[Rounds]]:
        """For each trace, with the starting draft and with the one that serves; the processes share the requests."""
        processes, mine = self.fabric.world_size, self.fabric.global_rank
        places = [i for i, t in enumerate(traces) if zlib.crc32(t.request_id.encode()) % processes == mine]
        found = torch.zeros(len(traces), 2, 2, dtype=torch.float64)
        for arm, scorer in enumerate(self._scorers):
            for place, rounds in zip(places, scorer.score([traces[i] for i in places]), strict=True):
                found[place, arm] = torch.tensor([rounds.count, rounds.tokens])
        table = torch.as_tensor(self.fabric.all_reduce(found, reduce_op="sum")).tolist()
        return [[Rounds(count=count, tokens=tokens) for count, tokens in row] for row in table]

    def learn_from(self, trace: Trace) -> Trace:
        """As live: every so many requests are kept for the gate, all others taught. Returns it with its domain.

        One that may not teach is returned as it is.
        """
        if not self._admission.admits(trace):
            return trace
        trace = self.learner.steering.place(trace)
        self._newest_version = max([self._newest_version, *trace.round_version_R.tolist()])
        if not self._held_out.takes(trace.request_id):
            self._feed.add(trace)
        elif first_taught(trace) < len(trace.token_ids_T):
            self._held_out.add(crop(trace, self._learn.batch_positions))
        self._steps_due += self._steps_per_trace
        while self._steps_due >= 1:
            self._steps_due -= 1
            self._feed.replay_share = self.learner.steering.signal.replay_share
            batch = self._feed.next_batch(oldest_fresh=self._newest_version - self._learn.max_staleness)
            if batch is not None:
                self.learner.update(batch)
        return trace

    def hold_trial(self) -> None:
        """Publish the learner's draft, and serve it, if the gate lets it pass."""
        if self.learner.steps - self._last_trial_steps < self._learn.min_steps:
            return
        self._last_trial_steps = self.learner.steps
        self.learner.adapt_vocabulary()
        with self.learner.averaged() as challenger:
            if not self._gated:
                self._serve({"reason": "no gate"})
                return
            with self.fabric.autocast():
                verdict = compare(
                    self._held_out,
                    champion=self._champion,
                    challenger=challenger,
                    batch_positions=self._learn.batch_positions,
                )
            verdict = self.fabric.broadcast(verdict)  # so that all agree, whatever their rounding
            if verdict is None:
                return
            self.trials.append(verdict)
            if verdict.passed:
                self._serve({"reason": verdict.reason} | verdict.record)
        self.learner.judged(passed=verdict.passed, champion=self.served, version=self.version)

    def _serve(self, record: dict[str, Any]) -> None:
        """Let the learner's draft, which is averaged now, serve as a checkpoint would hold it."""
        self.published += 1
        name = version_name(self.published)
        if self._store is None:
            stored = {
                key: each.bfloat16() if each.is_floating_point() else each
                for key, each in self.learner.draft.state_dict().items()
            }
            self.served.load_state_dict(stored)
        else:
            if self.fabric.is_global_zero:
                record = {"steps": self.learner.steps, "positions": self.learner.positions} | record
                name = self._store.publish(self.learner.draft, record=record)
            name = self.fabric.broadcast(name)
            self.served.load_state_dict(load_draft(self._store.folder / name, self._ends).state_dict())
        for module in (self._champion, *(scorer.module for scorer in self._scorers)):
            self._ends.fit_head(module)
        self.version = self.learner.version = name
        self._held_out.forget_scores()


def recorded(folder: Path) -> Iterator[Trace]:
    """All traces of a log, in the order in which they were recorded."""
    for shard in read_index(folder):
        yield from read_shard(folder / shard.name)


def num_recorded(folder: Path) -> int:
    """How many they are. Raises AuroraError when there is none."""
    count = sum(shard.num_sequences for shard in read_index(folder))
    if not count:
        raise AuroraError(f"{folder} holds no traces; a server records them with trace.record={folder}")
    return count


def blocks(traces: Iterator[Trace], size: int) -> Iterator[list[Trace]]:
    """Neighbouring traces together, the last ones fewer."""
    block: list[Trace] = []
    for trace in traces:
        block.append(trace)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
