"""How many tokens the draft proposes in a round: measured costs against predicted acceptance.

A round over B sequences with k proposals each takes draft(B, k) + target(B, k + 1) seconds and yields
1 + a + a² + … + a^k tokens per sequence of acceptance rate a. The planner takes the k with the most tokens per second.
A change of k must promise a few per cent, so that noise does not make it alternate; drafting is stopped as soon as it
costs time.

A tree of n nodes (`Drafter.propose_tree`) takes its levels' wider draft passes and target(B, n + 1). A level of a tree
has a higher acceptance rate than one of a chain: h = a + (1 − a)s, where s is the share of a chain's rejections that a
tree of that size avoids. `TreeAcceptance` learns s from verified trees; it is scaled down where a is lower than there.

Left out: drafting itself (serve/speculation/drafter.py), the cost tables (serve/speculation/costs.py), and n-gram
lookup (serve/speculation/ngram_planner.py).

All times are in seconds; speeds are in tokens per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aurora_lit.request import Output
from aurora_lit.serve.sequences.sequence import RunningSequence, VerifiedTokens
from aurora_lit.serve.speculation.costs import CostTable

_RATE_DECAY = 0.9
"""Weight of the old acceptance rate of a sequence, per proposal."""
_MEAN_RATE_DECAY = 0.98
"""The same for the acceptance rate over all sequences."""
_INITIAL_RATE = 0.5
"""Acceptance rate of a draft before anything was verified."""
_MIN_GAIN = 1.03
"""A change of draft length must promise this factor in speed."""
_EXTRA_TOKEN_SAVING = 0.5
"""One more token from a round saves this share of a plain round, because the rounds it saves would speculate too."""
_RECONSIDER_EVERY = 8
"""Rounds without a draft after which drafting is considered again; that takes a few per cent of a small round."""
_PROBE_EVERY = 128
"""Rounds without a draft after which one token is drafted, to measure whether the traffic has become predictable."""
_PLAIN_EVERY, _NEAR = 16, 1.3
"""Rounds with proposals after which a plain one is run, if it is expected to be less than 1.3 times as slow."""
MAX_REMAINING_TOKENS = 128
"""Most tokens that a sequence is assumed to generate from here on, whatever its `max_tokens`."""
MAX_TREE_COLUMNS = 64
"""Query positions of a batch beyond which no tree is considered: the target's time grows with them long before."""
_INITIAL_AVOIDED = 0.1
"""Times log2(nodes + 1) − 1: the share of rejections that a tree avoids before any was verified; measured on
SmolLM2-135M."""
_TREE_DECAY = 0.99
"""Weight of the old share of rejections, per level."""


class TreeAcceptance:
    """How much trees of one size gain: shares of levels that were rejected, in the trees and along chains in them."""

    def __init__(self, nodes: int) -> None:
        self.chain = 0.5
        """Share of rejected first choices."""
        self.tree = self.chain * (1 - _INITIAL_AVOIDED * (math.log2(nodes + 1) - 1))
        """Share of levels of which every node was rejected."""

    def observe(self, verified: VerifiedTokens, output: Output) -> None:
        """Update by one verified tree."""
        self.tree = _update_rejections(self.tree, output.num_accepted, verified.num_levels)
        self.chain = _update_rejections(self.chain, output.chain_accepted, output.chain_proposed)

    def avoided(self, rate: float) -> float:
        """The share of a chain's rejections that the tree avoids, for a chain of acceptance rate `rate`."""
        mean = max(0.0, 1.0 - self.tree / max(self.chain, 1e-3))
        return mean * min(1.0, rate / max(1.0 - self.chain, 1e-3))


def _update_rejections(share: float, accepted: int, reached: int) -> float:
    """A running share of rejected levels, after a path that accepted `accepted` of the `reached` levels."""
    for level in range(min(accepted + 1, reached)):
        share += (1 - _TREE_DECAY) * ((level >= accepted) - share)
    return share


class SpeculationPlanner:
    """Chooses the draft length of each round, and what each further draft step must promise to be run.

    >>> k = planner.choose([0.7, 0.6])                        # acceptance rates of the sequences
    >>> planner.should_draft(k, 0, [0.7, 0.6])                # False: a plain round this time
    >>> planner.observe(sequence, proposed=k, accepted=2)     # after the round
    """

    def __init__(
        self, *, max_draft_tokens: int, adaptive: bool, max_lookup_tokens: int | None = None, tree_tokens: int = 0
    ) -> None:
        """`adaptive` False: always `max_draft_tokens`. `tree_tokens`: most nodes of a tree; 0: chains only.

        `max_lookup_tokens`: most tokens that n-gram lookup proposes; None: as many as the draft.
        """
        self.max_lookup_tokens = max_draft_tokens if max_lookup_tokens is None else max_lookup_tokens
        self.max_draft_tokens = max_draft_tokens
        self.adaptive = adaptive
        self.ragged = False
        """True if each sequence of this round computes its own query length; else all have the longest one."""
        self.target_cost = CostTable()
        """Of a round from the target's forward pass on, with verification and commit."""
        self.first_step_cost = CostTable()
        """Of the first proposal, the prefill of the draft's cache included, by batch size (query length 1)."""
        self.next_step_cost = CostTable()
        """Of each further proposal, by batch size (query length 1)."""
        self.level_cost = CostTable()
        """Of each level of a tree after the first, by batch size (query length 1)."""
        self.prefill_position_s = 0.0
        """Of one position of the prefill of the draft's cache."""
        self.probing = False
        """True if the last choice is a probe of how predictable the traffic is: one sequence suffices for it."""
        self.mean_rate = _INITIAL_RATE
        """Running acceptance rate over all sequences: a new sequence starts with it."""
        self.updates_costs = True
        """False: rounds do not have the machine to themselves now, so their times are not measurements of costs."""
        self.tree_sizes = tree_sizes(tree_tokens if max_draft_tokens > 1 else 0)
        """Numbers of nodes of the trees to choose from, ascending."""
        self._tree_acceptance = {n: TreeAcceptance(n) for n in self.tree_sizes}
        self._last = max_draft_tokens
        """Draft length in use."""
        self._last_levels = self._last_tree = 0
        """Levels and nodes of the tree in use; 0 nodes: a chain."""
        self._rounds_without = self._since_plain = 0
        self._resting = False
        """True if drafting is not even considered in this round."""

    def choose(self, rates: Sequence[float], *, num_not_drafting: int = 0) -> int:
        """Draft length for sequences of these acceptance rates; 0: none. `num_not_drafting`: others in the batch."""
        self.probing = False
        if not rates or not self.max_draft_tokens:
            return 0
        if not self.adaptive:
            return self.max_draft_tokens
        batch_size = len(rates) + num_not_drafting
        self._resting = not self._last_tree and self._last == 0 and (self._rounds_without + 1) % _RECONSIDER_EVERY != 0
        if self._resting:
            self._rounds_without += 1
            return 0
        speeds = [self._speed(k, rates, batch_size) for k in range(self.max_draft_tokens + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if speeds[best] > speeds[self._last] * _MIN_GAIN:
            self._last = best
        elif speeds[self._last] < speeds[0]:
            self._last = 0
        self._rounds_without = self._rounds_without + 1 if self._last == 0 else 0
        if self._rounds_without >= _PROBE_EVERY:
            self._rounds_without = 0
            self.probing = True
            return 1
        return self._last

    def choose_tree(self, steps: int, rates: Sequence[float], *, num_not_drafting: int = 0) -> tuple[int, int]:
        """Levels and nodes of the tree that is faster than a chain of `steps`; 0 nodes: a chain is."""
        if not rates or not self.tree_sizes or self._resting:
            return steps, 0
        if not self.adaptive:
            return self.max_draft_tokens, self.tree_sizes[-1]
        batch_size = len(rates) + num_not_drafting
        shapes = [
            (levels, nodes)
            for nodes in self.tree_sizes
            if batch_size * self._query_length(nodes, len(rates), batch_size) <= MAX_TREE_COLUMNS
            for levels in range(2, min(self.max_draft_tokens, nodes) + 1)
        ]
        speeds = {shape: self._tree_speed(*shape, rates, batch_size) for shape in shapes}
        best = max(speeds, key=speeds.__getitem__, default=(steps, 0))
        bar = self._speed(steps, rates, batch_size) * (1.0 if self._last_tree else _MIN_GAIN)
        self._last_levels, self._last_tree = best if speeds.get(best, 0.0) > bar else (steps, 0)
        return self._last_levels, self._last_tree

    def should_draft(
        self,
        steps: int,
        nodes: int,
        rates: Sequence[float],
        *,
        num_not_drafting: int = 0,
        uncached: int = 0,
        remaining: int = 0,
    ) -> bool:
        """True if this round drafts as chosen; False: it is a plain one.

        Drafting must save, over the `remaining` tokens, the time to prefill the draft's cache with the `uncached`
        positions. And where plain rounds are nearly as fast, one is run now and then: otherwise their cost would only
        be estimated, and a wrong estimate would last.
        """
        if not self.adaptive or self.probing:
            return True
        batch_size = len(rates) + num_not_drafting
        plain = self._speed(0, rates, batch_size)
        chosen = self._tree_speed(steps, nodes, rates, batch_size) if nodes else self._speed(steps, rates, batch_size)
        gain_s = remaining * (1 / plain - 1 / chosen) if plain else 0.0
        if gain_s < uncached * self.prefill_position_s:
            self._last = self._last_tree = 0
            return False
        self._since_plain = (self._since_plain + 1) % _PLAIN_EVERY
        return self._since_plain > 0 or chosen > _NEAR * plain

    def min_gains_of_chain(self, steps: int, num_drafting: int, *, num_not_drafting: int = 0) -> list[float] | None:
        """What each step of a chain after the first must promise to be drafted, up to `steps`; None: all are drafted.

        In accepted tokens of all sequences together: as many as save more time than the step takes.
        """
        if not self.adaptive:
            return None
        batch_size = num_drafting + num_not_drafting
        widths = [self._query_length(k, num_drafting, batch_size) for k in range(1, steps + 1)]
        target_s = [self.target_cost(batch_size, width) for width in widths]
        step_s = self.next_step_cost(num_drafting, 1)
        return [
            self._tokens_that_save(step_s + max(0.0, longer - shorter), batch_size)
            for shorter, longer in zip(target_s, target_s[1:], strict=False)
        ]

    def min_gains_of_tree(self, levels: int, num_drafting: int, *, num_not_drafting: int = 0) -> list[float] | None:
        """As `min_gains_of_chain`, for the levels of a tree.

        The target's pass takes the same time either way: nodes of the new level replace less probable ones.
        """
        if not self.adaptive:
            return None
        level_s = self.level_cost(num_drafting, 1)
        return [self._tokens_that_save(level_s, num_drafting + num_not_drafting)] * (levels - 1)

    def tree_rate(self, nodes: int, rate: float) -> float:
        """Acceptance rate of a tree's levels, given that of a chain."""
        return rate + (1.0 - rate) * self._tree_acceptance[nodes].avoided(rate)

    def expected_draft_gain(self, rate: float, *, batch_size: int, speed: float, column_tokens: float) -> float:
        """Tokens that the draft gains for one sequence, net of the tokens that its time would have given otherwise.

        Drafting is assumed to go as in the last round that drafted. `speed`: tokens per second without it;
        `column_tokens`: tokens in the time of one more query position of the target.
        """
        nodes = self._last_tree
        levels, later_cost = (self._last_levels, self.level_cost) if nodes else (self._last, self.next_step_cost)
        if not levels:
            return 0.0
        drafting_s = self.first_step_cost(batch_size, 1) + (levels - 1) * later_cost(batch_size, 1)
        level_rate = self.tree_rate(nodes, rate) if nodes else rate
        return _gain(levels, [level_rate]) - (nodes or levels) * column_tokens - drafting_s / batch_size * speed

    def observe(self, sequence: RunningSequence, *, proposed: int, accepted: int) -> None:
        """Update the acceptance rates of the sequence and of all sequences by a round's outcome.

        Rounds that explore are left out: they say nothing about the other rounds.
        """
        if sequence.is_exploring:
            return
        for i in range(min(accepted + 1, proposed)):
            hit = 1.0 if i < accepted else 0.0
            sequence.acceptance_rate += (1 - _RATE_DECAY) * (hit - sequence.acceptance_rate)
            self.mean_rate += (1 - _MEAN_RATE_DECAY) * (hit - self.mean_rate)

    def observe_trees(self, verified: Sequence[VerifiedTokens], outputs: Sequence[Output]) -> None:
        """Update by how much more than their chains the trees of a round accepted."""
        for tokens, output in zip(verified, outputs, strict=True):
            acceptance = self._tree_acceptance.get(tokens.num_proposed)
            if acceptance is not None and not output.from_lookup and output.finish_reason is None:
                acceptance.observe(tokens, output)

    def observe_target(self, batch_size: int, columns: int, seconds: float) -> None:
        """Update by a round's time from the target's pass on; `columns`: query positions of the whole batch."""
        if self.updates_costs:
            self.target_cost.update(batch_size, columns / batch_size, seconds)

    def observe_chain(self, batch_size: int, steps: int, seconds: float, *, uncached: int = 0) -> None:
        """Update by the time to draft chains, the prefill of `uncached` positions included."""
        seconds = max(0.0, seconds - uncached * self.prefill_position_s)
        expected = self._draft_seconds(batch_size, steps)
        if self.updates_costs and expected:
            for table in (self.first_step_cost, self.next_step_cost):
                table.update(batch_size, 1, table(batch_size, 1) * seconds / expected)

    def observe_levels(self, batch_size: int, levels: int, seconds: float, *, uncached: int = 0) -> None:
        """Update by the time to draft trees, the prefill of `uncached` positions included."""
        seconds = max(0.0, seconds - uncached * self.prefill_position_s)
        expected = self.first_step_cost(batch_size, 1) + (levels - 1) * self.level_cost(batch_size, 1)
        if self.updates_costs and expected and levels > 1:
            for table in (self.first_step_cost, self.level_cost):
                table.update(batch_size, 1, table(batch_size, 1) * seconds / expected)

    def reset_for_new_draft(self, sequences: Sequence[RunningSequence]) -> None:
        """Another draft proposes from now on: low acceptance of the last one must not keep it from being tried."""
        self.mean_rate = max(self.mean_rate, _INITIAL_RATE)
        for sequence in sequences:
            sequence.acceptance_rate = max(sequence.acceptance_rate, _INITIAL_RATE)
        self._last, self._rounds_without = self.max_draft_tokens, 0

    def expected_round_s(self, batch_size: int, counts: Sequence[int]) -> float:
        """Seconds of a round from the target's pass on; `counts`: proposals of those sequences that have some."""
        return self.target_cost(batch_size, 1 + (sum(counts) / batch_size if self.ragged else max(counts, default=0)))

    def _draft_seconds(self, batch_size: int, steps: int) -> float:
        return self.first_step_cost(batch_size, 1) + (steps - 1) * self.next_step_cost(batch_size, 1)

    def _query_length(self, proposed: int, drafting: int, batch_size: int) -> float:
        """Mean query length where `drafting` of the sequences have `proposed` proposals."""
        return 1 + proposed * (drafting / batch_size if self.ragged else 1)

    def _speed(self, k: int, rates: Sequence[float], batch_size: int) -> float:
        """Tokens per second with chains of k proposals."""
        tokens = batch_size + _gain(k, rates)
        seconds = self.target_cost(batch_size, self._query_length(k, len(rates), batch_size))
        if k:
            seconds += self._draft_seconds(len(rates), k)
        return tokens / seconds if seconds else float(k)

    def _tree_speed(self, levels: int, nodes: int, rates: Sequence[float], batch_size: int) -> float:
        """Tokens per second with trees."""
        tokens = batch_size + _gain(levels, [self.tree_rate(nodes, rate) for rate in rates])
        query_length = self._query_length(nodes, len(rates), batch_size)
        seconds = self.target_cost(batch_size, query_length) + self.first_step_cost(len(rates), 1)
        seconds += (levels - 1) * self.level_cost(len(rates), 1)
        return tokens / seconds if seconds else 0.0

    def _tokens_that_save(self, seconds: float, batch_size: int) -> float:
        """How many more tokens a round must give to save this time."""
        saving_s = self.target_cost(batch_size, 1) / batch_size * _EXTRA_TOKEN_SAVING
        return seconds / saving_s if saving_s else math.inf


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


def tree_sizes(largest: int) -> tuple[int, ...]:
    """Tree sizes to choose from: a root and 3, 7, 15, … nodes fill whole matrix tiles; and `largest` itself."""
    return tuple(sorted({n for n in (3, 7, 15) if n < largest} | ({largest} if largest else set())))


def _gain(count: int, rates: Sequence[float]) -> float:
    """Expected number of accepted tokens, with `count` proposals per sequence."""
    return sum(rate**j for rate in rates for j in range(1, count + 1))
