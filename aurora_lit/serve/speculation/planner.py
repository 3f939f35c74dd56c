"""How many tokens the draft proposes in a round: measured costs against predicted acceptance.

A round over B sequences with k proposals each takes draft(B, k) + target(B, k + 1) seconds and yields
1 + a + a² + … + a^k tokens per sequence of acceptance rate a. `choose_shape` takes the shape with the most tokens per
second. A change must promise a per cent, so that noise does not make it alternate; drafting is stopped as soon as
it costs time.

A tree of n nodes (`Drafter.propose_tree`) takes its levels' wider draft passes and target(B, n + 1). A level of a tree
has a higher acceptance rate than one of a chain: h = a + (1 − a)s, where s is the share of a chain's rejections that a
tree of that size avoids. `TreeAcceptance` learns s from verified trees; it is scaled down where a is lower than there.
Greedy and sampled sequences are accepted at different rates, so both are learned apart.

Left out: drafting itself (serve/speculation/drafter.py), the cost tables (serve/speculation/costs.py), copies
(serve/speculation/copy_planner.py), and whether speculation has paid at all (serve/speculation/floor.py).

All times are in seconds; speeds are in tokens per second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_lit.kernels.draft_steps import Weighing, doubles
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.serve.sequences.round_plan import Proposal
from aurora_lit.serve.sequences.sequence import RunningSequence, VerifiedDrafts
from aurora_lit.serve.speculation.costs import READ_IN_A_STEP, Costs, DraftShape
from aurora_lit.serve.speculation.draft_reliability import DraftReliability

_RECORD_DECAY = 0.95
"""Weight of a sequence's earlier proposals when one more is verified."""
_MEAN_WEIGHT = 20.0
"""What the rate over all sequences weighs beside a sequence's own, in proposals. A rate of twenty proposals is off by a
tenth by chance, and a planner follows those that are too high; this weight and decay predict held-out outcomes best."""
_MEAN_DECAY = 0.998
"""Weight of the earlier proposals of all sequences; less while there are few."""
_INITIAL_RATE, _INITIAL_WEIGHT = 0.5, 40.0
"""Acceptance rate of a draft before anything was verified, and the proposals that it counts as: those of a few
requests, since one request's are alike. With 10, a first request that was hard to draft for ended drafting for ten."""
_MIN_GAIN = 1.01
"""A change of what is drafted must promise this factor in speed, so that noise does not make it alternate."""
_RECONSIDER_EVERY = 8
"""Rounds without a draft after which drafting is considered again; that takes a few per cent of a small round."""
_DECIDE_EVERY = 4
"""Rounds of as many sequences for which a decision holds; making it takes 2 % of a small round."""
_TRY_EVERY, _TRY_WITHIN = 64, 0.8
"""Every so many rounds that draft, another shape is drafted that promises at least this share of the chosen one's
speed, each in turn. Only what is drafted is measured: without this, a shape that was measured as too slow when the
server started, beside other work, or as accepting too little, would never be drafted."""
_PROBE_EVERY = 128
"""Rounds without a draft after which one token is drafted, to measure whether the traffic has become predictable."""
_PROBE_SHARE = 0.005
"""Largest share of the time of these rounds that reading a prompt for it may take: else it waits for longer."""
_PRICED_EVERY = 16
"""Rounds for which the price of columns holds."""
MAX_REMAINING_TOKENS = 128
"""Most tokens that a sequence is assumed to generate from here on, whatever its `max_tokens`."""
MAX_TREE_COLUMNS = 64
"""Query positions of a batch beyond which no tree is considered: the target's time grows with them long before."""
_INITIAL_AVOIDED = {False: 0.1, True: 0.13}
"""Times log2(nodes + 1) − 1: the share of rejections that a tree avoids before any was verified, for greedy and sampled
sequences; measured on SmolLM2-135M."""
_TREE_DECAY = 0.99
"""Weight of the old share of rejections, per level."""
NO_DRAFT = DraftShape()


@dataclass(frozen=True, kw_only=True)
class SpeculationLimits:
    """The most that may be proposed for a sequence in a round."""

    draft_tokens: int
    """Longest chain, and most levels of a tree; 0: there is no draft."""
    copied_tokens: int
    """0: nothing is copied."""
    tree_sizes: tuple[int, ...] = ()
    """Numbers of nodes of the trees to choose from, ascending."""
    sibling_tokens: int = 0
    """Beside each token of a chain; 0: chains are not weighed."""
    adaptive: bool = True
    """False: always the most."""

    @property
    def weighed_tokens(self) -> int:
        """Most tokens of a weighed chain and beside it."""
        return weighed_tokens(self.draft_tokens, self.sibling_tokens)


class _MeanRate:
    """A running acceptance rate, quick to learn while there are few proposals."""

    def __init__(self) -> None:
        self.value = _INITIAL_RATE
        self._weight = _INITIAL_WEIGHT

    def add(self, accepted: bool) -> None:
        """Update by one proposal."""
        self._weight = min(self._weight + 1, 1 / (1 - _MEAN_DECAY))
        self.value += (accepted - self.value) / self._weight


class TreeAcceptance:
    """How much trees of one size gain: shares of levels that were rejected, in the trees and along chains in them."""

    def __init__(self, nodes: int, *, sampled: bool = False) -> None:
        self.chain = 0.5
        """Share of rejected first choices."""
        self.tree = self.chain * (1 - _INITIAL_AVOIDED[sampled] * (math.log2(nodes + 1) - 1))
        """Share of levels of which every node was rejected."""

    def observe(self, *, levels: int, accepted: int, chain_proposed: int, chain_accepted: int) -> None:
        """Update by one verified tree of `levels` levels; `chain_…`: of the chain of first choices in it."""
        self.tree = _update_rejections(self.tree, accepted, levels)
        self.chain = _update_rejections(self.chain, chain_accepted, chain_proposed)

    def avoided(self, rate: float) -> float:
        """The share of a chain's rejections that the tree avoids, for a chain of acceptance rate `rate`."""
        mean = max(0.0, 1.0 - self.tree / max(self.chain, 1e-3))
        return mean * min(1.0, rate / max(1.0 - self.chain, 1e-3))


def _update_rejections(share: float, accepted: int, reached: int) -> float:
    """A running share of rejected levels, after a path that accepted `accepted` of the `reached` levels."""
    for level in range(min(accepted + 1, reached)):
        share += (1 - _TREE_DECAY) * ((level >= accepted) - share)
    return share


def level_rate(shape: DraftShape, rate: float, trees: Mapping[int, TreeAcceptance]) -> float:
    """Acceptance rate of a level of the shape, given that of a chain."""
    return rate + (1.0 - rate) * trees[shape.nodes].avoided(rate) if shape.nodes else rate


def speed_of(
    shape: DraftShape,
    rates: Sequence[float],
    *,
    batch_size: int,
    costs: Costs,
    trees: Mapping[int, TreeAcceptance],
) -> float:
    """Expected tokens per second of a round in which sequences of these acceptance rates draft; 0 if costs are unknown.

    `batch_size`: all sequences of the round.
    """
    tokens = batch_size + sum(_gain(shape.levels, level_rate(shape, rate, trees)) for rate in rates)
    counts = [shape.num_tokens] * len(rates)
    target_s, draft_s = costs.round_s(batch_size, counts), costs.draft_s(len(rates), shape)
    return tokens / (target_s + draft_s) if target_s and (draft_s or not shape.levels) else 0.0


def speeds_of_shapes(
    rates: Sequence[float],
    *,
    batch_size: int,
    costs: Costs,
    limits: SpeculationLimits,
    trees: Mapping[int, TreeAcceptance],
) -> dict[DraftShape, float]:
    """`speed_of` every shape that the limits allow, NO_DRAFT among them."""
    shapes = [NO_DRAFT, *(DraftShape(levels) for levels in range(1, limits.draft_tokens + 1))]
    columns = len(rates) if costs.ragged else batch_size
    shapes += [
        DraftShape(levels, nodes)
        for nodes in limits.tree_sizes
        if batch_size + columns * nodes <= MAX_TREE_COLUMNS
        for levels in range(2, min(limits.draft_tokens, nodes) + 1)
    ]
    return {shape: speed_of(shape, rates, batch_size=batch_size, costs=costs, trees=trees) for shape in shapes}


def choose_shape(speeds: Mapping[DraftShape, float], *, last: DraftShape = NO_DRAFT) -> DraftShape:
    """What to draft: the fastest shape, or `last`, what was drafted in the round before, if that is nearly as fast.

    A pure function. `speeds`: tokens per second of every shape, NO_DRAFT among them.
    """
    best = max(speeds, key=speeds.__getitem__)
    now = speeds.get(last, 0.0)
    if speeds[best] > now * _MIN_GAIN:
        return best
    return last if now and now >= speeds[NO_DRAFT] else NO_DRAFT


class DraftDecision(NamedTuple):
    """What a round drafts."""

    shape: DraftShape = NO_DRAFT
    is_probe: bool = False
    """True: one sequence suffices, to measure how predictable the traffic is."""
    is_trial: bool = False
    """True: drafted in full, to measure what it costs and how much of it is accepted."""
    speed: float = 0.0
    """Tokens per second of all sequences that the round promises; 0 if unknown."""


class SpeculationPlanner:
    """Chooses what each round drafts, and what each further level must promise to be run.

    >>> decision = planner.decide([0.7, 0.6], batch_size=2)      # acceptance rates of the sequences
    >>> planner.observe(sequence, proposal, path=[0, 1, 2], finished=False)    # after the round
    """

    def __init__(self, limits: SpeculationLimits, costs: Costs) -> None:
        self.limits, self.costs = limits, costs
        self.updates_costs = True
        """False: rounds do not have the machine to themselves now, so their times are not measurements of costs."""
        self._mean_rates = {False: _MeanRate(), True: _MeanRate()}
        """Over all sequences, greedy and sampled."""
        self._trees = {
            sampled: {n: TreeAcceptance(n, sampled=sampled) for n in limits.tree_sizes} for sampled in (False, True)
        }
        self.reliability = DraftReliability()
        self._weighings: dict[tuple[int, int], tuple[int, Weighing]] = {}
        """What holds for _PRICED_EVERY rounds that draft, and since which, by batch size and sequences that draft."""
        self._last = DraftShape(limits.draft_tokens)
        self._speed = 0.0
        """What it promises, in tokens per second."""
        self._decided_for, self._decided_rounds = (0, 0, False), 0
        """The last decision's numbers of sequences that draft and of all, and whether most are sampled; and how many
        rounds it has held."""
        self._rounds_without = self._rounds_with = 0
        """Rounds since one drafted; and rounds that drafted, or considered it."""

    def mean_rate(self, *, sampled: bool) -> float:
        """The acceptance rate over all sequences, with which a new one starts."""
        return self._mean_rates[sampled].value

    def rate_of(self, sequence: RunningSequence) -> float:
        """The acceptance rate that a sequence's next proposals are expected to have."""
        record = sequence.verified_drafts
        mean = self.mean_rate(sampled=sequence.temperature > 0)
        return (record.accepted + _MEAN_WEIGHT * mean) / (record.proposed + _MEAN_WEIGHT)

    def decide(self, rates: Sequence[float], *, batch_size: int, sampled: bool = False) -> DraftDecision:
        """What to draft for sequences of these acceptance rates, in a round of `batch_size` sequences.

        `sampled`: most of them are.
        """
        if not rates or not self.limits.draft_tokens:
            return DraftDecision()
        if not self.limits.adaptive:
            return DraftDecision(DraftShape(self.limits.draft_tokens, max(self.limits.tree_sizes, default=0)))
        if self._last == NO_DRAFT and (self._rounds_without + 1) % _RECONSIDER_EVERY:
            return self._without_draft()
        self._rounds_with += 1
        is_trial = self._rounds_with % _TRY_EVERY == 0
        asked, self._decided_rounds = (len(rates), batch_size, sampled), self._decided_rounds + 1
        if self._last == NO_DRAFT or is_trial or asked != self._decided_for or self._decided_rounds >= _DECIDE_EVERY:
            speeds = speeds_of_shapes(
                rates, batch_size=batch_size, costs=self.costs, limits=self.limits, trees=self._trees[sampled]
            )
            self._last = choose_shape(speeds, last=self._last)
            self._speed, self._decided_for, self._decided_rounds = speeds[self._last], asked, 0
            if is_trial and self._last != NO_DRAFT:
                return DraftDecision(self._other_shape(speeds), is_trial=True)
        if self._last == NO_DRAFT:
            return self._without_draft()
        self._rounds_without = 0
        return DraftDecision(self._last, speed=self._speed)

    def _without_draft(self) -> DraftDecision:
        """Nothing is drafted, but now and then a token to see how predictable the traffic is."""
        self._rounds_without += 1
        if self._rounds_without < _PROBE_EVERY:
            return DraftDecision()
        return DraftDecision(DraftShape(1), is_probe=True)

    def affords_probe(self, batch_size: int, *, uncached: int) -> bool:
        """True if a probe may read `uncached` positions now; it counts as held then."""
        earned_s = _PROBE_SHARE * self._rounds_without * self.costs.round_s(batch_size, [])
        if self.costs.catch_up_s(1, uncached=uncached) > earned_s:
            return False
        self._rounds_without = 0
        return True

    def pays_for_catching_up(
        self,
        shape: DraftShape,
        rates: Sequence[float],
        *,
        batch_size: int,
        sampled: bool,
        uncached: int,
        remaining: int,
    ) -> bool:
        """True if drafting saves, over the `remaining` tokens, the time to prefill the draft with `uncached` positions.

        Otherwise drafting is over until it is considered again. What a first step reads anyway needs no saving.
        """
        if not self.limits.adaptive or uncached <= READ_IN_A_STEP * len(rates):
            return True
        how = {"batch_size": batch_size, "costs": self.costs, "trees": self._trees[sampled]}
        plain, chosen = speed_of(NO_DRAFT, rates, **how), speed_of(shape, rates, **how)  # type: ignore[arg-type]
        gain_s = remaining * (1 / plain - 1 / chosen) if plain and chosen else 0.0
        if gain_s >= uncached * self.costs.prefill_position_s:
            return True
        self._last = NO_DRAFT
        return False

    def min_gains(self, shape: DraftShape, num_drafting: int, *, batch_size: int, speed: float) -> list[float] | None:
        """What each level after the first must promise to be drafted; None: all are drafted.

        In accepted tokens of all sequences together: as many as the time of the level would give at `speed`, in tokens
        per second. A further step of a chain also makes the target's pass longer. With a tree that takes the same time
        either way, since nodes of the new level replace less probable ones.
        """
        if not self.limits.adaptive:
            return None
        # A tree of one level is a chain of one, as far as its time goes.
        shapes = [DraftShape(n, shape.nodes if n > 1 else 0) for n in range(1, shape.levels + 1)]
        until_s = [self.costs.draft_s(num_drafting, each) for each in shapes]
        if not shape.nodes:
            target_s = [self.costs.round_s(batch_size, [each.levels] * num_drafting) for each in shapes]
            until_s = [draft_s + pass_s for draft_s, pass_s in zip(until_s, target_s, strict=True)]
        return [speed * max(0.0, after - before) for before, after in itertools.pairwise(until_s)]

    def weighing(self, drafting: Sequence[RunningSequence], *, batch_size: int, speed: float) -> Weighing:
        """How what is drafted for these sequences is weighed, in a round that promises `speed`, in tokens a second."""
        key = batch_size, len(drafting)
        since, weighing = self._weighings.get(key, (0, None))
        if weighing is None or self._rounds_with - since >= _PRICED_EVERY:
            costs, most = self.costs, len(drafting) * self.limits.weighed_tokens
            plain_s = costs.round_s(batch_size, [])
            columns_s = [max(0.0, costs.round_s(batch_size, [count]) - plain_s) for count in range(most + 1)]
            until_s = [costs.draft_s(len(drafting), DraftShape(n)) for n in range(1, self.limits.draft_tokens + 1)]
            levels_s = [max(0.0, after - before) for before, after in itertools.pairwise(until_s)]
            weighing = Weighing(
                self.reliability.acceptance_KC, doubles(columns_s), doubles(levels_s), level_rates=(), speed=0.0
            )
            self._weighings[key] = self._rounds_with, weighing
        return weighing._replace(level_rates=[self.rate_of(sequence) for sequence in drafting], speed=speed)

    def level_rates(self, shape: DraftShape, rates: Sequence[float], *, sampled: bool) -> list[float]:
        """Acceptance rates of the shape's levels, for sequences whose chains have these."""
        return [level_rate(shape, rate, self._trees[sampled]) for rate in rates]

    def expected_draft_gain(
        self, rate: float, *, batch_size: int, sampled: bool, speed: float, column_tokens: float
    ) -> float:
        """Tokens that the draft gains for one sequence, net of the tokens that its time would have given otherwise.

        Drafting is assumed to go as in the last round that drafted. `speed`: tokens per second without it;
        `column_tokens`: tokens in the time of one more query position of the target.
        """
        shape = self._last
        if not shape.levels:
            return 0.0
        tokens = _gain(shape.levels, level_rate(shape, rate, self._trees[sampled]))
        drafting_s = self.costs.draft_s(batch_size, shape) / batch_size
        return tokens - shape.num_tokens * column_tokens - drafting_s * speed

    def observe(
        self,
        sequence: RunningSequence,
        proposal: Proposal,
        *,
        path: Sequence[int],
        finished: bool,
        tokens: Sequence[int] = (),
    ) -> None:
        """Update the acceptance rates by the outcome of what the draft proposed for a sequence.

        `path`: the accepted columns, column 0 first; `tokens`: what the sequence got. Rounds that explore are left
        out: they say nothing about others.
        """
        if proposal.explored_at is not None:
            return
        sampled = sequence.temperature > 0
        if proposal.weighed is not None:
            # The round's tokens tell of the chain whether it was right, as far as they agree, proposed or not.
            chain, shares = proposal.weighed
            right = common_prefix_length(chain, tokens)
            for i in range(min(right + 1, len(chain), len(tokens))):
                self._add(sequence, i < right, sampled=sampled)
                self.reliability.observe(sampled=sampled, share=shares[i], accepted=i < right)
            return
        chain = proposal.first_choices
        proposed, chain_accepted = len(chain), common_prefix_length(chain, path[1:])
        accepted = sum(0 < column <= proposal.num_drafted for column in path)
        # The end of a request may cut off what came after the accepted ones, so that it was not verified.
        for i in range(min(chain_accepted + (not finished), proposed)):
            self._add(sequence, i < chain_accepted, sampled=sampled)
        tree = self._trees[sampled].get(proposal.num_drafted) if proposal.parents is not None else None
        if tree is None or finished:
            return
        levels = proposal.num_drafted_levels
        if levels < proposal.num_drafted:  # else copies branch off a drafted chain, which says nothing about trees
            tree.observe(levels=levels, accepted=accepted, chain_proposed=proposed, chain_accepted=chain_accepted)

    def _add(self, sequence: RunningSequence, accepted: bool, *, sampled: bool) -> None:
        sequence.verified_drafts.add(accepted, decay=_RECORD_DECAY)
        self._mean_rates[sampled].add(accepted)

    def observe_round(self, batch_size: int, columns: int, seconds: float) -> None:
        """Update by a round's time but for drafting; `columns`: query positions of the whole batch."""
        if self.updates_costs:
            self.costs.target.update(batch_size, columns / batch_size, seconds)

    def observe_draft(self, num_drafting: int, shape: DraftShape, seconds: float, *, uncached: int = 0) -> None:
        """Update by the time that drafting took, the prefill of `uncached` positions included."""
        if self.updates_costs:
            self.costs.observe_draft(num_drafting, shape, seconds, uncached=uncached)

    def reset_for_new_draft(self, sequences: Sequence[RunningSequence]) -> None:
        """Another draft proposes from now on: low acceptance of the last one must not keep it from being tried."""
        for sampled, rate in self._mean_rates.items():
            if rate.value < _INITIAL_RATE:
                self._mean_rates[sampled] = _MeanRate()
        for sequence in sequences:
            if self.rate_of(sequence) < _INITIAL_RATE:
                sequence.verified_drafts = VerifiedDrafts()
        self._last, self._rounds_without = DraftShape(self.limits.draft_tokens), 0

    def _other_shape(self, speeds: Mapping[DraftShape, float]) -> DraftShape:
        """The next in turn of those that might be as fast as the chosen shape; that itself if there is none."""
        enough = _TRY_WITHIN * speeds[self._last]
        others = [each for each in speeds if each not in (NO_DRAFT, self._last) and speeds[each] >= enough]
        return others[self._rounds_with // _TRY_EVERY % len(others)] if others else self._last


def extends_chain(values: Sequence[float], survival: list[float], min_gain: float) -> bool:
    """True if one more step of a chain promises more accepted tokens than `min_gain`.

    `values[b]`: the value head's prediction at the last step, v = a(1 + v'), of tokens accepted from there on.
    `survival[b]`: probability that sequence b accepts everything before that step; updated in place. Native calls have
    the same rule (promises_more in kernels/csrc/drafting.hpp).
    """
    gain = 0.0
    for b, value in enumerate(values):
        rate = max(0.0, min(0.98, value / (1.0 + max(0.0, value))))
        survival[b] *= rate
        gain += survival[b] * rate
    return gain > min_gain


def weighed_tokens(draft_tokens: int, sibling_tokens: int) -> int:
    """Most tokens of a sequence that are proposed of a weighed chain; 0 without siblings, when nothing is weighed."""
    return 2 * draft_tokens if sibling_tokens else 0


def tree_sizes(largest: int) -> tuple[int, ...]:
    """Tree sizes to choose from: a root and 3, 7, 15, … nodes fill whole matrix tiles; and `largest` itself."""
    return tuple(sorted({n for n in (3, 7, 15) if n < largest} | ({largest} if largest else set())))


def _gain(count: int, rate: float) -> float:
    """Expected number of accepted tokens of `count` proposals in a row."""
    return sum(rate**j for j in range(1, count + 1))
