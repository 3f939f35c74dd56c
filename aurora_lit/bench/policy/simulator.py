"""Replays recorded answers with any policy: rounds of so many clients, each of which has its next request at once.

A round proposes, takes the seconds that bench/policy/world.py says, and accepts what equals the answer, as serving does
(serve/sequences/round_plan.py). The planner's policy is serving's own code with a recorded draft and a simulated clock.
The traffic memory is the real one: it holds the answers that have ended in this replay. Left out: prompts are read in
no time, and the draft is never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from aurora_lit.bench.policy.recording import RecordedAnswer, Recording
from aurora_lit.bench.policy.world import World
from aurora_lit.bench.prompts import params_for
from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.modules.sampling.tree import depths
from aurora_lit.request import Request
from aurora_lit.serve.sequences.round_plan import NO_PROPOSAL, Proposal, Verdict, judge
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.costs import Costs, DraftShape
from aurora_lit.serve.speculation.drafter import DraftInputs
from aurora_lit.serve.speculation.floor import RoundKind, SpeculationFloor
from aurora_lit.serve.speculation.planner import SpeculationPlanner, extends_chain
from aurora_lit.serve.speculation.proposer import Proposer
from aurora_lit.serve.speculation.traffic_memory import TrafficMemory, make_memory

_END = -1
"""No token: what follows an answer."""


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.factor = 1.0
        """Noise of this round."""

    def __call__(self) -> float:
        """Seconds so far."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let an operation take its time."""
        self.now += seconds * self.factor


class RecordedDrafter:
    """Proposes what the recorded draft did, in the time that it would take. Stands in for `Drafter`."""

    def __init__(self, recording: Recording, world: World, clock: Clock) -> None:
        self._recording, self._world, self._clock = recording, world, clock
        self._num_cached: dict[int, int] = {}
        self.answers: dict[int, RecordedAnswer] = {}
        """By slot."""

    def begin(self, slot: int, answer: RecordedAnswer) -> None:
        """Another request is in the slot."""
        self.answers[slot], self._num_cached[slot] = answer, 0

    def position(self, slot: int, length: int) -> int:
        """Which of the recording's positions comes after so many tokens."""
        return self.answers[slot].first + length - len(self.answers[slot].prompt_ids)

    def num_uncached(self, slot: int, length: int) -> int:
        """As in `Drafter`."""
        return length - 1 - self._num_cached[slot]

    def catch_up(self, slot: int, length: int, *, most: int) -> int:
        """As in `Drafter`."""
        count = max(0, min(most, self.num_uncached(slot, length) - 1))
        self._num_cached[slot] += count
        self._clock.advance(count * self._world.position_s)
        return count

    def take_time(self, slots: Sequence[int], lengths: Sequence[int], shape: DraftShape) -> None:
        """Draft a shape for some sequences."""
        uncached = sum(map(self.num_uncached, slots, lengths))
        self._clock.advance(self._world.draft_s(len(slots), shape, uncached))
        self._num_cached |= {slot: length - 1 for slot, length in zip(slots, lengths, strict=True)}

    def propose(self, inputs: DraftInputs, *, num_steps: int, min_gains: Sequence[float] | None, **_: Any) -> Drafted:
        """As in `Drafter`."""
        slots, at = self._at(inputs)
        outcomes = self._recording.chain_outcome_NJ[at].T.tolist()
        survival, levels = [1.0] * len(at), 1
        while levels < num_steps and (
            min_gains is None or extends_chain(outcomes[levels - 1], survival, min_gains[levels - 1])
        ):
            levels += 1
        self.take_time(slots, inputs.lengths, DraftShape(levels))
        return Drafted(self._recording.chain_NJ[at, :levels].tolist(), None, outcomes[:levels])

    def propose_tree(
        self,
        inputs: DraftInputs,
        *,
        num_steps: int,
        num_nodes: int,
        min_gains: Sequence[float] | None,
        level_rates: Sequence[float],
        **_: Any,
    ) -> Drafted:
        """As in `Drafter`; when another level is drafted: `promises_more` in kernels/csrc/drafting.hpp."""
        (slots, at), size = self._at(inputs), self._recording.tree_sizes.index(num_nodes)
        outcome_JB = self._recording.tree_outcome_NGJ[at, size].T
        gain_J = (outcome_JB * torch.tensor(level_rates)).sum(1).tolist()
        levels = 1
        while levels < num_steps and (min_gains is None or gain_J[levels - 1] > min_gains[levels - 1]):
            levels += 1
        self.take_time(slots, inputs.lengths, DraftShape(levels, num_nodes))
        token_BK = self._recording.tree_NGJK[at, size, levels - 1]
        count = int((token_BK[0] >= 0).sum())
        parent_BK = self._recording.parent_NGJK[at, size, levels - 1, :count]
        return Drafted(token_BK[:, :count].tolist(), parent_BK.tolist(), outcome_JB[:levels].tolist())

    def _at(self, inputs: DraftInputs) -> tuple[list[int], list[int]]:
        slots = inputs.slots
        return slots, [self.position(slot, length) for slot, length in zip(slots, inputs.lengths, strict=True)]


class Table:
    """What is on the table in a replay: the recording, the costs, and the state of the slots."""

    def __init__(self, recording: Recording, world: World, *, memory_bytes: int, max_catch_up_s: float) -> None:
        longest = max(len(answer.prompt_ids) + len(answer.token_ids) for answer in recording.answers)
        self.recording, self.world, self.clock = recording, world, Clock()
        self.max_catch_up_s = max_catch_up_s
        self.drafter = RecordedDrafter(recording, world, self.clock)
        self.tokens_SL = torch.zeros(world.batch_size, longest + 1, dtype=torch.int64)
        self.memory: TrafficMemory | None = make_memory(memory_bytes, scope="domain", device=self.tokens_SL.device)

    def begin(self, slot: int, answer: RecordedAnswer) -> RunningSequence:
        """A request whose prompt has been read."""
        length = len(answer.prompt_ids)
        self.tokens_SL[slot, :length] = torch.tensor(answer.prompt_ids)
        self.drafter.begin(slot, answer)
        params = params_for(self.recording.temperature, max_tokens=self.recording.max_tokens)
        request = Request(request_id=str(answer.first), prompt_ids=(), params=params, noise_key=answer.noise_key)
        sequence = RunningSequence(request=request, slot=slot, prompt_length=length, length=length)
        if self.memory is not None:
            self.memory.open(sequence)
        return sequence

    def rest_of(self, sequence: RunningSequence) -> list[int]:
        """The tokens that the target is going to choose for it."""
        return self.drafter.answers[sequence.slot].token_ids[sequence.length - sequence.prompt_length :]


def verdict_of(proposal: Proposal, rest: Sequence[int]) -> Verdict:
    """What serving would make of it, if the target's own tokens are `rest`; at other columns it is never asked."""
    if not proposal.tokens:
        return Verdict([rest[0]], [0])
    level = range(len(proposal.tokens) + 1) if proposal.parents is None else depths(proposal.parents)
    verdict = judge(proposal, [rest[depth] if depth < len(rest) else _END for depth in level])
    return Verdict(verdict.tokens[: len(rest)], verdict.columns)


class Policy(Protocol):
    """Decides what rounds propose."""

    def propose(self, sequences: Sequence[RunningSequence]) -> list[Proposal]:
        """For each sequence; advances the table's clock by what that takes."""

    def observe(self, sequence: RunningSequence, proposal: Proposal, *, path: Sequence[int], finished: bool) -> None:
        """What came of one."""

    def end_round(self, sequences: Sequence[RunningSequence], *, columns: int, tokens: int, seconds: float) -> None:
        """What the round took."""


class PlainPolicy:
    """Proposes nothing."""

    def propose(self, sequences: Sequence[RunningSequence]) -> list[Proposal]:
        """Nothing."""
        return [NO_PROPOSAL] * len(sequences)

    def observe(self, *_: Any, **__: Any) -> None:
        """Learns nothing."""

    def end_round(self, *_: Any, **__: Any) -> None:
        """Learns nothing."""


class _TimedProposer(Proposer):
    """Serving's proposer; what it takes by itself, look-ups included, passes on the simulated clock."""

    def __init__(self, table: Table, planner: SpeculationPlanner) -> None:
        self._world, self._simulated = table.world, table.clock
        super().__init__(
            table.drafter,  # type: ignore[arg-type]
            planner,
            tokens_SL=table.tokens_SL,
            memory=table.memory,
            max_catch_up_s=table.max_catch_up_s,
            clock=table.clock,
        )

    def _look_up(self, sequences: Sequence[RunningSequence], candidates: Sequence[int]) -> dict[int, Copies]:
        # All of it: the recording does not tell looking from deciding, which takes far less.
        self._simulated.advance(self._world.proposing_s)
        return super()._look_up(sequences, candidates)


class _StudiedPlanner(SpeculationPlanner):
    """Serving's planner; for the arguments see `PlannerPolicy`."""

    def __init__(self, table: Table, costs: Costs, *, tries: bool, known_rate_N: Sequence[float] | None) -> None:
        super().__init__(table.recording.limits, costs)
        self._position, self._tries, self._known_rate_N = table.drafter.position, tries, known_rate_N

    def rate_of(self, sequence: RunningSequence) -> float:
        if self._known_rate_N is None:
            return super().rate_of(sequence)
        return float(self._known_rate_N[self._position(sequence.slot, sequence.length)])

    def _other_shape(self, speeds: Mapping[DraftShape, float]) -> DraftShape:
        return super()._other_shape(speeds) if self._tries else self._last


class PlannerPolicy:
    """Serving's own planner, proposer and floor; `Engine._may_speculate` and `Engine._account` connect them."""

    def __init__(
        self,
        table: Table,
        *,
        floor: bool = True,
        tries: bool = True,
        known_costs: bool = False,
        known_rate_N: Sequence[float] | None = None,
    ) -> None:
        """What each part of the planner costs or lacks: `floor` False, rounds speculate whenever it says so; `tries`
        False, no other shape is drafted to measure it. `known_costs`: those of the world, exactly; `known_rate_N`: the
        acceptance rate at each position, instead of a running mean.
        """
        costs = table.world.known_costs(table.recording.limits) if known_costs else table.world.costs()
        self.planner = _StudiedPlanner(table, costs, tries=tries, known_rate_N=known_rate_N)
        self.planner.updates_costs = not known_costs
        self.proposer = _TimedProposer(table, self.planner)
        self.floor = SpeculationFloor() if floor else None
        self._speculated = False

    def propose(self, sequences: Sequence[RunningSequence]) -> list[Proposal]:
        """As serving would."""
        kind = RoundKind.of(sequences)
        copies = self.floor is None or self.floor.allows(kind)
        drafts = self.floor is None or self.floor.allows(kind, drafts=True)
        proposals = self.proposer.propose(sequences, copies=copies, drafts=drafts)
        self._speculated = self.proposer.draft_seconds > 0 or any(proposal.tokens for proposal in proposals)
        return proposals

    def observe(self, sequence: RunningSequence, proposal: Proposal, *, path: Sequence[int], finished: bool) -> None:
        """As in serving."""
        self.proposer.observe(sequence, proposal, path=path, finished=finished)

    def end_round(self, sequences: Sequence[RunningSequence], *, columns: int, tokens: int, seconds: float) -> None:
        """As in serving."""
        draft_s = self.proposer.draft_seconds
        self.planner.observe_round(len(sequences), columns, seconds - draft_s)
        if self.floor is not None:
            self.floor.observe(
                RoundKind.of(sequences),
                seconds=seconds,
                tokens=tokens,
                speculated=self._speculated,
                drafted=draft_s > 0,
                proposing_s=self.proposer.seconds,
                looking_s=self.proposer.looking_seconds,
                catch_up_s=self.proposer.catch_up_seconds,
            )


@dataclass(kw_only=True)
class Replay:
    """What a policy came to, in rounds of all clients; the last ones, when requests have run out, do not count."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    columns: int = 0
    by_domain: dict[str, list[float]] = field(default_factory=dict)
    """Tokens and seconds, with one client."""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def replay(table: Table, policy: Policy, *, on_round: Callable[..., None] = lambda *_: None) -> Replay:
    """Answer all requests, in the recording's order. `on_round`: called before what was proposed is committed."""
    world, clock, found = table.world, table.clock, Replay()
    waiting = list(table.recording.answers)
    running = [table.begin(slot, waiting.pop(0)) for slot in range(world.batch_size)]
    while running:
        started, clock.factor = clock.now, world.noise()
        proposals = policy.propose(running)
        columns = len(running) + sum(len(proposal.tokens) for proposal in proposals)
        clock.advance(world.pass_s(columns))
        seconds, tokens, ended = clock.now - started, 0, []
        on_round(running, proposals, seconds)
        for sequence, proposal in zip(running, proposals, strict=True):
            rest = table.rest_of(sequence)
            verdict = verdict_of(proposal, rest)
            end = sequence.length + len(verdict.tokens)
            table.tokens_SL[sequence.slot, sequence.length : end] = torch.tensor(verdict.tokens)
            sequence.length, tokens = end, tokens + len(verdict.tokens)
            finished = len(verdict.tokens) == len(rest)
            policy.observe(sequence, proposal, path=verdict.columns, finished=finished)
            if finished:
                ended.append(sequence)
        policy.end_round(running, columns=columns, tokens=tokens, seconds=seconds)
        if len(running) == world.batch_size:
            found.tokens, found.seconds = found.tokens + tokens, found.seconds + seconds
            found.rounds, found.columns = found.rounds + 1, found.columns + columns
            if len(running) == 1:
                account = found.by_domain.setdefault(table.drafter.answers[0].domain, [0.0, 0.0])
                account[0], account[1] = account[0] + tokens, account[1] + seconds
        for sequence in ended:
            if table.memory is not None:
                table.memory.remember(sequence, table.tokens_SL[sequence.slot])
            if waiting:
                running[running.index(sequence)] = table.begin(sequence.slot, waiting.pop(0))
            else:
                running.remove(sequence)
    return found
