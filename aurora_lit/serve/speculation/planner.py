"""How many tokens to draft in a round: measured costs against predicted acceptance, zero included.

A round over B rows with k proposals costs draft(B, k) + target(B, k + 1) seconds and yields 1 + a + a² + … + a^k
tokens a row of acceptance rate a. The k with the most tokens a second is taken; a change must promise a few per cent,
so that noise does not make it flutter, but for giving drafting up, which is done as soon as it costs time.

A tree of n nodes (serve/speculation/draft_tree.py) costs its levels' wider draft passes and target(B, n + 1). Its levels hit more
often than a chain's: h = a + (1 − a)s, where the share s of misses that a tree of that size saves is learned from the
trees that were verified, and taken for less where a is lower than theirs.

What is left out: drafting itself (serve/speculation/drafter.py), how costs (serve/speculation/costs.py) and misses (serve/speculation/tree_acceptance.py) are kept,
how much is copied (serve/speculation/ngram_planner.py).
Seconds everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from aurora_lit.request import Output
from aurora_lit.serve.sequences.sequence import RunningSequence, VerifiedTokens
from aurora_lit.serve.speculation.costs import CostTable
from aurora_lit.serve.speculation.tree_acceptance import TreeAcceptance

_RATE_MEMORY = 0.9
"""The same a proposal, for a row's acceptance rate."""
_MEAN_RATE_MEMORY = 0.98
"""The same for the rate of all traffic."""
_FIRST_RATE = 0.5
"""Acceptance rate of a draft that nobody has seen at work."""
_GAIN_TO_CHANGE = 1.03
_LATE_TOKEN_WORTH = 0.5
"""A token more from a round saves this share of a plain round, since the rounds it saves speculate too."""
_LOOK_EVERY = 8
"""Rounds without a draft after which it is considered again: considering takes a few per cent of a small round."""
_PROBE_EVERY = 128
"""Rounds without a draft after which one token is drafted, to see whether the traffic has become predictable."""
_PLAIN_EVERY, _NEAR = 16, 1.3
"""Rounds with proposals after which a plain one is tried, where that is thought to be less than 1.3 times as slow."""
MOST_LEFT = 128
"""Tokens still to come that a row is thought to have at most, whatever it asked for."""

MOST_COLUMNS = 64
"""Target rows of a round beyond which no tree is tried: products stop being free long before."""


class SpeculationPlanner:
    """Chooses k for each round and, inside a round, whether one more draft step pays.

    >>> k = policy.choose(rates=[0.7, 0.6])
    >>> policy.observe(...)  # after the round
    """

    def __init__(
        self, *, max_draft_tokens: int, adaptive: bool, max_proposals: int | None = None, tree_tokens: int = 0
    ) -> None:
        """`max_proposals`: most copied tokens; as many as drafted ones when left out. `tree_tokens`: most nodes."""
        self.max_proposals = max_draft_tokens if max_proposals is None else max_proposals
        self.max_draft_tokens = max_draft_tokens
        self.adaptive = adaptive
        self.ragged = False
        """Whether the round in hand runs of each row its own columns only; else all have as many as the widest."""
        self.target_cost = CostTable()
        """Of a round from the target's pass on: checking and keeping its outcome included."""
        self.first_step_cost = CostTable()
        """Of catching up and the first proposal, by rows (width 1)."""
        self.next_step_cost = CostTable()
        """Of each further proposal, by rows (width 1)."""
        self.position_cost = 0.0
        """Of a position that the draft has to catch up with, seconds."""
        self.probing = False
        """Whether the last choice is a look at how predictable the traffic is: one row will do."""
        self.mean_rate = _FIRST_RATE
        """Running acceptance rate of all traffic: where a new request starts."""
        self.times_count = True
        """Whether rounds have the machine that costs are about; false: how long they take is not taken in."""
        self._last = max_draft_tokens
        self._rounds_without = self._since_plain = 0
        self._resting = False
        """Whether drafting is not even considered in this round."""
        self.tree_sizes = tree_sizes(tree_tokens if max_draft_tokens > 1 else 0)
        """Nodes of the trees that may be chosen, largest last."""
        self.level_cost = CostTable()
        """Of each level of a tree after the first, by rows (width 1)."""
        self._tree_misses = {n: TreeAcceptance(n) for n in self.tree_sizes}
        self._last_tree = self._last_levels = 0

    def choose(self, rates: Sequence[float], *, num_plain: int = 0) -> int:
        """Draft length for rows of these acceptance rates beside `num_plain` rows that do not speculate."""
        self.probing = False
        if not rates or not self.max_draft_tokens:
            return 0
        if not self.adaptive:
            return self.max_draft_tokens
        rows = len(rates) + num_plain
        self._resting = not self._last_tree and self._last == 0 and (self._rounds_without + 1) % _LOOK_EVERY != 0
        if self._resting:
            self._rounds_without += 1
            return 0
        speeds = [self._speed(k, rates, rows) for k in range(self.max_draft_tokens + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if speeds[best] > speeds[self._last] * _GAIN_TO_CHANGE:
            self._last = best
        elif speeds[self._last] < speeds[0]:
            self._last = 0
        self._rounds_without = self._rounds_without + 1 if self._last == 0 else 0
        if self._rounds_without >= _PROBE_EVERY:
            self._rounds_without = 0
            self.probing = True
            return 1
        return self._last

    def stands(
        self, steps: int, nodes: int, rates: Sequence[float], *, num_plain: int = 0, behind: int = 0, left: int = 0
    ) -> bool:
        """Whether that choice is carried out, or this round is a plain one.

        It must gain in `left` tokens what it takes to catch up with `behind` positions. And where plain rounds come
        near it they are tried now and then: else what they cost is only guessed, and a wrong guess would last.
        """
        if not self.adaptive or self.probing:
            return True
        rows = len(rates) + num_plain
        plain = self._speed(0, rates, rows)
        chosen = self._tree_speed(steps, nodes, rates, rows) if nodes else self._speed(steps, rates, rows)
        gain_s = left * (1 / plain - 1 / chosen) if plain else 0.0
        if gain_s < behind * self.position_cost:
            self._last = self._last_tree = 0
            return False
        self._since_plain = (self._since_plain + 1) % _PLAIN_EVERY
        return self._since_plain > 0 or chosen > _NEAR * plain

    def choose_tree(self, steps: int, rates: Sequence[float], *, num_plain: int = 0) -> tuple[int, int]:
        """Levels and nodes of the tree that beats a chain of `steps`; 0 nodes: none does."""
        if not rates or not self.tree_sizes or self._resting:
            return steps, 0
        if not self.adaptive:
            return self.max_draft_tokens, self.tree_sizes[-1]
        rows = len(rates) + num_plain
        shapes = [
            (levels, nodes)
            for nodes in self.tree_sizes
            if rows * self._width(nodes, len(rates), rows) <= MOST_COLUMNS
            for levels in range(2, min(self.max_draft_tokens, nodes) + 1)
        ]
        speeds = {shape: self._tree_speed(*shape, rates, rows) for shape in shapes}
        best = max(speeds, key=speeds.__getitem__, default=(steps, 0))
        bar = self._speed(steps, rates, rows) * (1.0 if self._last_tree else _GAIN_TO_CHANGE)
        self._last_levels, self._last_tree = best if speeds.get(best, 0.0) > bar else (steps, 0)
        return self._last_levels, self._last_tree

    def worth_another_level(
        self, reach: Sequence[float], rates: Sequence[float], *, nodes: int, num_plain: int = 0
    ) -> bool:
        """Whether one more level promises more time than it costs; `reach[b]`: the draft's probability to get there.

        The target's pass costs the same: nodes of the new level take the place of less likely ones.
        """
        if not self.adaptive:
            return True
        rows = len(rates) + num_plain
        gain_tokens = sum(r * self._tree_rate(nodes, rate) for r, rate in zip(reach, rates, strict=True))
        plain_s = self.target_cost(rows, 1)
        return gain_tokens * plain_s / rows * _LATE_TOKEN_WORTH > self.level_cost(len(rates), 1)

    def observe_trees(self, judged: Sequence[VerifiedTokens], outputs: Sequence[Output]) -> None:
        """Take in how much more than chains trees accepted."""
        for of_row, output in zip(judged, outputs, strict=True):
            seen = self._tree_misses.get(of_row.num_proposed)
            if seen is not None and not output.looked_up and output.finish_reason is None:
                seen.observe(of_row, output)

    def observe_levels(self, rows: int, levels: int, seconds: float, *, behind: int = 0) -> None:
        """Take in how long drafting a tree took, catching up with `behind` positions included."""
        seconds = max(0.0, seconds - behind * self.position_cost)
        expected = self.first_step_cost(rows, 1) + (levels - 1) * self.level_cost(rows, 1)
        if self.times_count and expected and levels > 1:
            for table in (self.first_step_cost, self.level_cost):
                table.update(rows, 1, table(rows, 1) * seconds / expected)

    def worth_another_step(
        self, steps_done: int, values: Sequence[float], survival: list[float], *, num_plain: int = 0
    ) -> bool:
        """Whether drafting step `steps_done` + 1 promises more time than it costs.

        `values[b]`: the value head's prediction at the last step, v = a(1 + v'), of tokens accepted from there on.
        `survival[b]`: probability that row b accepts all before that step; moved on by one step here.
        """
        if not self.adaptive:
            return True
        rows = len(values) + num_plain
        gain_tokens = 0.0
        for b, value in enumerate(values):
            rate = max(0.0, min(0.98, value / (1.0 + max(0.0, value))))
            survival[b] *= rate
            gain_tokens += survival[b] * rate
        shorter, longer = (self._width(k, len(values), rows) for k in (steps_done, steps_done + 1))
        cost_s = self.next_step_cost(len(values), 1) + max(
            0.0, self.target_cost(rows, longer) - self.target_cost(rows, shorter)
        )
        plain_s = self.target_cost(rows, 1)
        return gain_tokens * plain_s / rows * _LATE_TOKEN_WORTH > cost_s

    def promised_tokens(self, rate: float, *, rows: int, speed: float, column_tokens: float) -> float:
        """Tokens that a row's draft promises as rounds were last drafted, less those that its time would have given.

        `speed`: tokens a second otherwise; `column_tokens`: what a column's time would have given.
        """
        nodes = self._last_tree
        levels, later_cost = (self._last_levels, self.level_cost) if nodes else (self._last, self.next_step_cost)
        if not levels:
            return 0.0
        drafting_s = self.first_step_cost(rows, 1) + (levels - 1) * later_cost(rows, 1)
        hit = self._tree_rate(nodes, rate) if nodes else rate
        return _gained(levels, [hit]) - (nodes or levels) * column_tokens - drafting_s / rows * speed

    def observe(self, row: RunningSequence, *, proposed: int, accepted: int) -> None:
        """Take in a round's outcome: the rate of the row, and of all traffic.

        An exploring round says nothing about the others.
        """
        if row.explored:
            return
        for i in range(min(accepted + 1, proposed)):
            hit = 1.0 if i < accepted else 0.0
            row.rate += (1 - _RATE_MEMORY) * (hit - row.rate)
            self.mean_rate += (1 - _MEAN_RATE_MEMORY) * (hit - self.mean_rate)

    def start_over(self, rows: Sequence[RunningSequence]) -> None:
        """Another draft proposes: what the last one was worth must not keep this one from being tried."""
        self.mean_rate = max(self.mean_rate, _FIRST_RATE)
        for row in rows:
            row.rate = max(row.rate, _FIRST_RATE)
        self._last, self._rounds_without = self.max_draft_tokens, 0

    def observe_target(self, rows: int, columns: int, seconds: float) -> None:
        """Take in how long a round took from the target's pass on, which ran so many columns of all rows together."""
        if self.times_count:
            self.target_cost.update(rows, columns / rows, seconds)

    def observe_draft(self, rows: int, steps: int, seconds: float, *, behind: int = 0) -> None:
        """Take in how long drafting took in a round, catching up with `behind` positions included."""
        seconds = max(0.0, seconds - behind * self.position_cost)
        expected = self._draft_seconds(rows, steps)
        if self.times_count and expected:
            for table in (self.first_step_cost, self.next_step_cost):
                table.update(rows, 1, table(rows, 1) * seconds / expected)

    def _draft_seconds(self, rows: int, steps: int) -> float:
        return self.first_step_cost(rows, 1) + (steps - 1) * self.next_step_cost(rows, 1)

    def round_s(self, rows: int, counts: Sequence[int]) -> float:
        """What a round over `rows` takes from the target's pass on, of which some have so many proposals."""
        return self.target_cost(rows, 1 + (sum(counts) / rows if self.ragged else max(counts, default=0)))

    def _width(self, proposed: int, drafting: int, rows: int) -> float:
        """Columns a row, on average, where `drafting` of the rows have so many proposals."""
        return 1 + proposed * (drafting / rows if self.ragged else 1)

    def _speed(self, k: int, rates: Sequence[float], rows: int) -> float:
        tokens = rows + _gained(k, rates)
        seconds = self.target_cost(rows, self._width(k, len(rates), rows))
        if k:
            seconds += self._draft_seconds(len(rates), k)
        return tokens / seconds if seconds else float(k)

    def _tree_rate(self, nodes: int, rate: float) -> float:
        """Share of a tree's levels that hit, for a chain's acceptance rate."""
        return rate + (1.0 - rate) * self._tree_misses[nodes].saved(rate)

    def _tree_speed(self, levels: int, nodes: int, rates: Sequence[float], rows: int) -> float:
        tokens = rows + _gained(levels, [self._tree_rate(nodes, rate) for rate in rates])
        seconds = self.target_cost(rows, self._width(nodes, len(rates), rows)) + self.first_step_cost(len(rates), 1)
        seconds += (levels - 1) * self.level_cost(len(rates), 1)
        return tokens / seconds if seconds else 0.0


def tree_sizes(most: int) -> tuple[int, ...]:
    """The sizes tried: a root and 3, 7, 15, … nodes fill whole tiles of rows at some batch; and `most` itself."""
    return tuple(sorted({n for n in (3, 7, 15) if n < most} | ({most} if most else set())))


def _gained(count: int, rates: Sequence[float]) -> float:
    """Tokens expected to be accepted of `count` proposals a row."""
    return sum(rate**j for rate in rates for j in range(1, count + 1))
