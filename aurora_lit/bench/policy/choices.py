"""What a round could propose, and the best of it, given how many accepted tokens each shape promises.

A round that gets `tokens` in `seconds` is worth tokens − speed · seconds, where `speed` is the policy's own tokens per
second so far: of independent rounds, those of most worth have the most tokens per second together. The draft runs in
one shape a round, as in serving, for some of the sequences; each of the others proposes copies or nothing. The best
choice over all of them together is found exactly, by dynamic programming over sequences, drafting ones and columns.

*Promises* are exact for the oracle, which knows the answer: a bound that nobody can reach, since nobody knows which of
two equal-looking positions will accept. The *informed* policies have the expectations of bench/policy/predictor.py.

Shapes: N positions, S shapes of the draft (NO_DRAFT left out).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aurora_lit.bench.policy.record import shapes_of
from aurora_lit.bench.policy.recording import Recording
from aurora_lit.bench.policy.simulator import PlainPolicy, Table, verdict_of
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import NO_COPIES, Copies, LookUp
from aurora_lit.serve.sequences.round_plan import NO_PROPOSAL, Proposal
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.candidate_tree import copied, with_copies
from aurora_lit.serve.speculation.copy_planner import LEAST_SURVIVAL
from aurora_lit.serve.speculation.costs import DraftShape
from aurora_lit.serve.speculation.planner import MAX_REMAINING_TOKENS, MAX_TREE_COLUMNS, NO_DRAFT
from aurora_lit.serve.speculation.traffic_memory import look_up_copies
from aurora_lit.traces.record import SOURCE_DRAFT

_THRESHOLDS = (0.75, 0.5, 0.35, 0.25, 0.15, LEAST_SURVIVAL)
"""Of copies: smallest survivals to choose from."""
_MERGED = 0.2
"""The same for copies beside what the draft proposes."""
_SMALL_DEBT = 32
"""Positions that the draft may lack without being asked whether reading them pays."""
_FIRST_TOKENS = 300
"""Tokens after which a policy's speed so far is used; that of plain rounds before."""


def draft_shapes(recording: Recording) -> list[DraftShape]:
    """The S shapes."""
    return shapes_of(recording.limits)[1:]


def accepted_by_shape(recording: Recording) -> np.ndarray:
    """Tokens that each shape gets accepted at each position, [N, S]."""
    shapes = draft_shapes(recording)
    accepted_NS = np.zeros((len(recording.chain_NJ), len(shapes)), dtype=np.float32)
    for answer in recording.answers:
        for i in range(len(answer.token_ids)):
            rest, at = answer.token_ids[i:], answer.first + i
            proposals = (_drafted(recording, at, shape) for shape in shapes)
            accepted_NS[at] = [len(verdict_of(proposal, rest).columns) - 1 for proposal in proposals]
    return accepted_NS


def _drafted(recording: Recording, position: int, shape: DraftShape) -> Proposal:
    tokens, parents = recording.drafted(position, shape)
    return Proposal(tokens=tokens, parents=parents, source=SOURCE_DRAFT, num_drafted=len(tokens))


class Option(NamedTuple):
    """What one sequence could propose."""

    proposal: Proposal
    gain: float
    """Promised tokens beside the target's own."""

    @property
    def columns(self) -> int:
        """Columns that it adds."""
        return len(self.proposal.tokens)


class Chosen(NamedTuple):
    """A round's proposals."""

    worth: float
    """In tokens, less what the round's time would have given otherwise."""
    shape: DraftShape
    options: list[Option]


class ChoosingPolicy(PlainPolicy):
    """Chooses what promises the most worth. Look-ups and reliabilities are serving's."""

    def __init__(self, table: Table, promise_NS: np.ndarray, *, knows_answer: bool, copies: bool = True) -> None:
        """`promise_NS`: accepted tokens by shape, in the order of `draft_shapes`. `knows_answer`: so do copies."""
        self.table, self.world, self._promise_NS, self._knows = table, table.world, promise_NS, knows_answer
        self.shapes = draft_shapes(table.recording)
        self.reliability = CopyReliability()
        self._copies = copies
        self.speed = self.world.batch_size / self.world.pass_s(self.world.batch_size)
        self._tokens = self._seconds = 0.0
        self._debt_worth_N: np.ndarray | None = None
        most = self.world.batch_size * (2 + max(table.recording.copied_tokens, *table.recording.tree_sizes, 1) * 2)
        self._pass_s = np.array([self.world.pass_s(columns) for columns in range(most)])
        """By columns."""

    # -- a round -------------------------------------------------------------------------------------------------------

    def propose(self, sequences: Sequence[RunningSequence]) -> list[Proposal]:
        """The best choice."""
        chosen = self.best(sequences)
        drafting = [i for i, option in enumerate(chosen.options) if option.proposal.num_drafted]
        if not self._knows or any(option.columns for option in chosen.options):
            self.table.clock.advance(self.world.proposing_s)
        if drafting:
            slots, lengths = [sequences[i].slot for i in drafting], [sequences[i].length for i in drafting]
            self.table.drafter.take_time(slots, lengths, chosen.shape)
        return [option.proposal for option in chosen.options]

    def observe(self, sequence: RunningSequence, proposal: Proposal, *, path: Sequence[int], finished: bool) -> None:
        """Copies' reliabilities, as `Proposer.observe`."""
        for node in proposal.copies if not finished else ():
            if node.parent in path:
                self.reliability.observe(node.table, node.cell, accepted=node.column in path)

    def end_round(self, sequences: Sequence[RunningSequence], *, columns: int, tokens: int, seconds: float) -> None:
        """The speed so far."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if self._tokens >= _FIRST_TOKENS:
            self.speed = self._tokens / self._seconds

    # -- what there is -------------------------------------------------------------------------------------------------

    def look_up(self, sequences: Sequence[RunningSequence]) -> list[Copies]:
        """Copies for each sequence."""
        longest = self.table.recording.copied_tokens if self._copies else 0
        asking = [s for s in sequences if s.num_remaining > 1] if longest else []
        if not asking:
            return [NO_COPIES] * len(sequences)
        rows = LookUp(
            slots=[sequence.slot for sequence in asking],
            lengths=[sequence.length for sequence in asking],
            most=[min(longest, sequence.num_remaining - 1) for sequence in asking],
            parts=[sequence.memory_part for sequence in asking],
            tables=[self.reliability.table(sampled=sequence.temperature > 0) for sequence in asking],
            rate_RC=self.reliability.rate_RC,
            least=LEAST_SURVIVAL,
        )
        found = dict(
            zip(map(id, asking), look_up_copies(self.table.tokens_SL, rows, memory=self.table.memory), strict=True)
        )
        return [found.get(id(sequence), NO_COPIES) for sequence in sequences]

    def copy_options(self, sequence: RunningSequence, copies: Copies) -> list[Option]:
        """Nothing, and the copies above each threshold."""
        options, table = [Option(NO_PROPOSAL, 0.0)], self.reliability.table(sampled=sequence.temperature > 0)
        for threshold in _THRESHOLDS:
            count = sum(survival >= threshold for survival in copies.survivals)
            if count > options[-1].columns:
                proposal = copied(copies, count, table=table)
                options.append(Option(proposal, self._gain(sequence, proposal, sum(copies.survivals[:count]))))
        return self._worthwhile(options)

    def draft_options(self, sequence: RunningSequence, copies: Copies, s: int) -> list[Option]:
        """What the draft proposes in a shape, without copies and with them."""
        position = self.table.drafter.position(sequence.slot, sequence.length)
        drafted = _drafted(self.table.recording, position, self.shapes[s])
        # A debt is paid once, now or later; what each round adds to it is the price of going on drafting.
        uncached = min(self.shapes[s].levels + 1, self.table.drafter.num_uncached(sequence.slot, sequence.length))
        debt = self.speed * uncached * self.world.position_s
        options = [Option(drafted, float(self._promise_NS[position, s]) - debt)]
        if copies.tokens:
            sampled, most = sequence.temperature > 0, self.table.recording.copied_tokens
            merged = with_copies(
                drafted, copies, reliability=self.reliability, sampled=sampled, least=_MERGED, most=most
            )
            if len(merged.tokens) > len(drafted.tokens):
                reach, more = {0: 1.0}, 0.0
                for node in merged.copies:
                    reach[node.column] = reach[node.parent] * self.reliability.rate(node.table, node.cell)
                    more += reach[node.column] if node.column > merged.num_drafted else 0.0
                gain = self._gain(sequence, merged, float(self._promise_NS[position, s]) + more)
                options.append(Option(merged, gain - debt))
        return options

    def _gain(self, sequence: RunningSequence, proposal: Proposal, expected: float) -> float:
        if not self._knows:
            return expected
        return float(len(verdict_of(proposal, self.table.rest_of(sequence)).columns) - 1)

    def _worthwhile(self, options: list[Option]) -> list[Option]:
        """Without those that cost more columns for no more tokens."""
        kept: list[Option] = []
        for option in options:
            if not kept or option.gain > kept[-1].gain:
                kept.append(option)
        return kept

    def _may_draft(self, sequence: RunningSequence) -> bool:
        """False: what the draft promises for the rest of the request does not repay reading its prompt first."""
        uncached = self.table.drafter.num_uncached(sequence.slot, sequence.length)
        if uncached <= _SMALL_DEBT:
            return True
        position = self.table.drafter.position(sequence.slot, sequence.length)
        if self._debt_worth_N is None:
            self._debt_worth_N = self._worth_of_drafting()
        worth, answer = self._debt_worth_N, self.table.drafter.answers[sequence.slot]
        if self._knows:
            left = float(worth[position : answer.first + len(answer.token_ids)].sum())
        else:
            left = float(worth.mean()) * min(MAX_REMAINING_TOKENS, sequence.num_remaining)
        return left > self.speed * uncached * self.world.position_s

    def _worth_of_drafting(self) -> np.ndarray:
        """By position, what the best shape is worth a token if all sequences draft it; no less than nothing. [N]"""
        B, world = self.world.batch_size, self.world
        shape_s = [
            world.draft_s(B, shape, 0) + world.pass_s(B + B * shape.num_tokens) - world.pass_s(B)
            for shape in self.shapes
        ]
        worth_NS = self._promise_NS - self.speed * np.array(shape_s) / B
        best_N = worth_NS.argmax(1)[:, None]
        worth_N = np.take_along_axis(worth_NS, best_N, 1)[:, 0]
        return np.maximum(0.0, worth_N) / (1.0 + np.take_along_axis(self._promise_NS, best_N, 1)[:, 0])

    # -- the best of it ------------------------------------------------------------------------------------------------

    def best(self, sequences: Sequence[RunningSequence]) -> Chosen:
        """The choice of most worth for these sequences together."""
        found = self.look_up(sequences)
        plain = [self.copy_options(sequence, copies) for sequence, copies in zip(sequences, found, strict=True)]
        may = [s.num_remaining > 1 and self._may_draft(s) for s in sequences]
        best = self._best_of(NO_DRAFT, plain, [[] for _ in sequences])
        for s, shape in enumerate(self.shapes if any(may) else ()):
            if shape.nodes and len(sequences) * (1 + shape.nodes) > MAX_TREE_COLUMNS:
                continue
            drafts = [
                self.draft_options(sequence, copies, s) if each else []
                for sequence, copies, each in zip(sequences, found, may, strict=True)
            ]
            best = max(best, self._best_of(shape, plain, drafts), key=lambda each: each.worth)
        return best

    def _best_of(self, shape: DraftShape, plain: list[list[Option]], drafts: list[list[Option]]) -> Chosen:
        """`gain_DC`: most tokens by number of drafting sequences and columns; −∞ where there is no such choice."""
        B = len(plain)
        rows = [[*((0, option) for option in plain[b]), *((1, option) for option in drafts[b])] for b in range(B)]
        width = 1 + sum(max(option.columns for _, option in row) for row in rows)
        most = 1 + sum(map(bool, drafts))
        gain_DC = np.full((most, width), -np.inf)
        gain_DC[0, 0] = 0.0
        picks = []
        for row in rows:
            new_DC, pick_DC = np.full_like(gain_DC, -np.inf), np.zeros(gain_DC.shape, dtype=np.int8)
            for index, (drafting, option) in enumerate(row):
                c = option.columns
                shifted = gain_DC[: most - drafting, : width - c] + option.gain
                target = new_DC[drafting:, c:]
                better = shifted > target
                np.copyto(target, shifted, where=better)
                pick_DC[drafting:, c:][better] = index
            gain_DC = new_DC
            picks.append(pick_DC)
        draft_D = np.array([self.world.draft_s(d, shape, 0) for d in range(most)])
        worth_DC = B + gain_DC - self.speed * (self._pass_s[B : B + width] + draft_D[:, None])
        d, c = (int(i) for i in np.unravel_index(worth_DC.argmax(), worth_DC.shape))
        worth, chosen = float(worth_DC[d, c]), []
        for row, pick_DC in zip(reversed(rows), reversed(picks), strict=True):
            drafting, option = row[pick_DC[d, c]]
            chosen.append(option)
            d, c = d - drafting, c - option.columns
        return Chosen(worth, shape, chosen[::-1])


class FixedPolicy(ChoosingPolicy):
    """Always the same shape: copies above a threshold where there are some, else the draft's shape."""

    def __init__(self, table: Table, arm: tuple[DraftShape, float | None]) -> None:
        """`arm`: shape of the draft, and threshold of copies; None: no copies."""
        super().__init__(table, np.zeros((0, 0)), knows_answer=False, copies=arm[1] is not None)
        self.arm = arm

    def best(self, sequences: Sequence[RunningSequence]) -> Chosen:
        """The arm."""
        shape, threshold = self.arm
        options = []
        for sequence, copies in zip(sequences, self.look_up(sequences), strict=True):
            count = 0 if threshold is None else sum(survival >= threshold for survival in copies.survivals)
            proposal = copied(copies, count, table=self.reliability.table(sampled=sequence.temperature > 0))
            if not count and shape.levels and sequence.num_remaining > 1:
                position = self.table.drafter.position(sequence.slot, sequence.length)
                proposal = _drafted(self.table.recording, position, shape)
            options.append(Option(proposal, 0.0))
        return Chosen(0.0, shape, options)


def arms(table: Table) -> list[tuple[DraftShape, float | None]]:
    """What `FixedPolicy` and the bandit choose from."""
    levels, B = (1, 2, table.recording.draft_tokens), table.world.batch_size
    fits = [s for s in draft_shapes(table.recording) if s.levels in levels and B * (1 + s.nodes) <= MAX_TREE_COLUMNS]
    return [(shape, threshold) for shape in (NO_DRAFT, *fits) for threshold in (None, 0.5, 0.2)]


class BanditPolicy(FixedPolicy):
    """UCB1 over the arms (Auer et al., 2002). An arm is kept for a few rounds, so that its debts are its own."""

    _ROUNDS = 8

    def __init__(self, table: Table, *, seed: int = 0) -> None:
        """All arms are tried once, in random order."""
        self.arms = arms(table)
        super().__init__(table, self.arms[0])
        self._untried = list(range(len(self.arms)))
        random.Random(seed).shuffle(self._untried)
        self._count, self._sum, self._squares = (np.zeros(len(self.arms)) for _ in range(3))
        self._index, self._left, self._worth = 0, 0, 0.0

    def best(self, sequences: Sequence[RunningSequence]) -> Chosen:
        """That of the arm with the highest bound."""
        if not self._left:
            if self._untried:
                self._index = self._untried.pop()
            else:
                mean = self._sum / self._count
                spread = np.sqrt(np.maximum(0.0, self._squares / self._count - mean**2).mean())
                self._index = int((mean + spread * np.sqrt(2 * math.log(self._count.sum()) / self._count)).argmax())
            self.arm = self.arms[self._index]
            self._left, self._worth, self._copies = self._ROUNDS, 0.0, self.arm[1] is not None
        return super().best(sequences)

    def end_round(self, sequences: Sequence[RunningSequence], *, columns: int, tokens: int, seconds: float) -> None:
        """What the arm was worth."""
        super().end_round(sequences, columns=columns, tokens=tokens, seconds=seconds)
        self._worth += (tokens - self.speed * seconds) / len(sequences)
        self._left -= 1
        if not self._left:
            self._count[self._index] += 1
            self._sum[self._index] += self._worth
            self._squares[self._index] += self._worth**2
