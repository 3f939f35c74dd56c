"""Which candidates are proposed: nodes of all sources, best first, while they repay their columns.

A node promises its probability to be accepted, and costs the time that its column adds to the target's pass. That time
is worth the tokens that such rounds bring in it: the running tokens a second of rounds of as many sequences. Copies are
weighed here, a draft's chain in its native steps at the same price (`worthwhile` in kernels/csrc/drafting.hpp). What
both propose for a sequence becomes one tree.

If copies promise a sequence as much as its draft would, they are proposed alone, and the draft need not run.

Left out: what columns take (serve/speculation/costs.py), how probable candidates are (serve/speculation/sources/), and
whether speculation has paid (serve/speculation/floor.py).

All times are in seconds; speeds are in tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.draft_steps import Prices, Weighing, doubles
from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import (
    NO_PROPOSAL,
    CopiedNode,
    Proposal,
    SpeculationLimits,
    source_of_copies,
)
from aurora_lit.serve.speculation.costs import Costs

LEAST_SURVIVAL = 0.05
"""A copy that is less probable is never proposed."""
_WORTH_LOOKING_UP = 0.5
"""Share of a column's price that a copy must promise to be looked up."""
_REMEMBERED_ROUNDS = 32
"""About so many rounds make up the running speed; before the first, the target's alone counts as a few of them."""
_FIRST_ROUNDS = 4
_PRICED_EVERY = 16
"""Rounds for which what columns take holds."""


class _Columns(NamedTuple):
    """What columns take in rounds of a batch size."""

    priced_at: int
    """Number of the round since which this holds."""
    columns_s: list[float]
    """Seconds that 0, 1, 2, … proposals add to a round: all together, or of padded rows those of the longest."""
    prices: dict[int, Prices]
    """The same for native steps, by the number of sequences that draft."""


class Weigher:
    """Prices the columns of rounds.

    >>> counts = weigher.copies([[0.9, 0.7], [0.2]], draft_rates=[0.5, 0.5], batch_size=4)
    >>> weigher.observe(4, tokens=9, seconds=0.02)      # after the round
    """

    def __init__(self, limits: SpeculationLimits, costs: Costs) -> None:
        """`limits` may be replaced."""
        self.limits, self.costs = limits, costs
        self._recent: dict[int, tuple[float, float]] = {}
        """Tokens and seconds of the last rounds by batch size, older ones with less weight."""
        self._num_rounds = 0
        self._columns: dict[int, _Columns] = {}

    def speed(self, batch_size: int) -> float:
        """Tokens a second of all sequences that a round's time is worth; 0: time costs nothing."""
        if not self.limits.adaptive:
            return 0.0
        tokens, seconds = self._recent.get(batch_size) or self._expected(batch_size)
        return tokens / seconds if seconds else 0.0

    def observe(self, batch_size: int, *, tokens: int, seconds: float) -> None:
        """Update by what a round of so many sequences gave them together."""
        self._num_rounds += 1
        old_tokens, old_s = self._recent.get(batch_size) or self._expected(batch_size)
        decay = 1 - 1 / _REMEMBERED_ROUNDS
        self._recent[batch_size] = decay * old_tokens + tokens, decay * old_s + seconds

    def _expected(self, batch_size: int) -> tuple[float, float]:
        """Tokens and seconds of a few plain rounds."""
        plain_s = self.costs.round_s(batch_size, [])
        return (_FIRST_ROUNDS * batch_size, _FIRST_ROUNDS * plain_s) if plain_s else (0.0, 0.0)

    def _priced(self, batch_size: int) -> _Columns:
        found = self._columns.get(batch_size)
        if found is None or self._num_rounds - found.priced_at >= _PRICED_EVERY:
            most = max(self.limits.weighed_tokens, self.limits.copied_tokens)
            most *= batch_size if self.costs.ragged else 1
            plain_s = self.costs.round_s(batch_size, [])
            columns_s = [max(0.0, self.costs.round_s(batch_size, [count]) - plain_s) for count in range(most + 1)]
            found = self._columns[batch_size] = _Columns(self._num_rounds, columns_s, {})
        return found

    def column_tokens(self, batch_size: int, count: int = 0) -> float:
        """What one more proposal must promise in a round that has `count`."""
        columns_s = self._priced(batch_size).columns_s
        at = min(count, len(columns_s) - 2)
        return self.speed(batch_size) * (columns_s[at + 1] - columns_s[at]) if at >= 0 else 0.0

    def least_survival(self, batch_size: int) -> float:
        """What is less probable need not be looked up."""
        return max(LEAST_SURVIVAL, _WORTH_LOOKING_UP * self.column_tokens(batch_size))

    # -- the draft's -------------------------------------------------------------------------------------------------

    def draft_weighing(self, rates: Sequence[float], acceptance_KC: torch.Tensor, *, batch_size: int) -> Weighing:
        """How native steps weigh what is drafted for sequences of these acceptance rates.

        `acceptance_KC`: of first choices by their shares (`DraftReliability`); it is read where it is.
        """
        columns = self._priced(batch_size)
        prices = columns.prices.get(len(rates))
        if prices is None:
            until_s = [self.costs.draft_s(len(rates), n) for n in range(1, self.limits.draft_tokens + 1)]
            levels_s = [max(0.0, after - before) for before, after in zip(until_s, until_s[1:], strict=False)]
            prices = Prices(acceptance_KC, doubles(columns.columns_s), doubles(levels_s))
            columns.prices[len(rates)] = prices
        return Weighing(prices, rates, self.speed(batch_size))

    def _draft_gain(self, rate: float, *, batch_size: int, column_tokens: float) -> float:
        """Tokens that a chain promises a sequence beyond those that its time would bring otherwise."""
        length = self.limits.draft_tokens
        if not length:
            return 0.0
        drafting_s = self.costs.draft_s(batch_size, length) / batch_size
        accepted = sum(rate**j for j in range(1, length + 1))
        return accepted - length * column_tokens - drafting_s * self.speed(batch_size)

    # -- copies ------------------------------------------------------------------------------------------------------

    def copies(
        self,
        survivals: Sequence[Sequence[float]],
        draft_rates: Sequence[float],
        *,
        batch_size: int,
        at_least_one: bool = False,
    ) -> list[int]:
        """How many of its copied nodes, most probable first, each sequence proposes without its draft.

        `survivals[b]`: probabilities that its nodes are accepted, descending. `draft_rates`: how often what is drafted
        for it is accepted; 0: nothing is. `batch_size`: all sequences. `at_least_one`: the most probable node of all
        is proposed even if it does not repay its column.
        """
        if not self.limits.adaptive:
            return [len(each) for each in survivals]
        counts = self._worthwhile(survivals, batch_size)
        num_nodes = sum(counts)
        if not num_nodes:
            if at_least_one:
                counts[max(range(len(counts)), key=lambda b: survivals[b][0])] = 1
            return counts
        columns_s = self._priced(batch_size).columns_s
        column_tokens = self.speed(batch_size) * columns_s[self._width(counts)] / num_nodes

        def suffices(count: int, survival: Sequence[float], rate: float) -> bool:
            gain = sum(survival[:count]) - count * column_tokens
            return not rate or gain >= self._draft_gain(rate, batch_size=batch_size, column_tokens=column_tokens)

        return [
            count if suffices(count, survival, rate) else 0
            for count, survival, rate in zip(counts, survivals, draft_rates, strict=True)
        ]

    def _worthwhile(self, survivals: Sequence[Sequence[float]], batch_size: int) -> list[int]:
        """Of all nodes, best first, how many of each sequence promise most beyond their price."""
        nodes = [(survival, b) for b, each in enumerate(survivals) for survival in each]
        nodes.sort(key=lambda node: -node[0])
        columns_s, speed = self._priced(batch_size).columns_s, self.speed(batch_size)
        counts, best, promised, most = [0] * len(survivals), [0] * len(survivals), 0.0, 0.0
        for survival, b in nodes:
            counts[b] += 1
            promised += survival
            gain = promised - speed * columns_s[min(self._width(counts), len(columns_s) - 1)]
            if gain > most:
                best, most = counts.copy(), gain
        return best

    def _width(self, counts: Sequence[int]) -> int:
        """Which of `columns_s` a round with these proposals takes."""
        return sum(counts) if self.costs.ragged else max(counts)


def copied(copies: Copies, count: int, *, table: int) -> Proposal:
    """The `count` most probable copies as a proposal: a chain if they are one."""
    if not count:
        return NO_PROPOSAL
    parents, cells = copies.parents[:count], copies.cells[:count]
    return Proposal(
        tokens=copies.tokens[:count],
        parents=None if parents == list(range(count)) else parents,
        source=source_of_copies(cells),
        copies=tuple(
            CopiedNode(column, parent, table, cell)
            for column, (parent, cell) in enumerate(zip(parents, cells, strict=True), start=1)
        ),
    )


def with_copies(
    drafted: Proposal, copies: Copies, *, reliability: CopyReliability, sampled: bool, least: float, most: int
) -> Proposal:
    """What the draft proposes, and beside it or after it the copies that are at least `least` probable.

    Where the draft proposes the same token, its branch goes on with the copies; where it proposes another one, a copy
    is less probable than alone. Both are known from what was verified. `most`: no copy is added beyond so many tokens.
    """
    tokens = list(drafted.tokens)
    parents = list(range(len(tokens))) if drafted.parents is None else list(drafted.parents)
    num_drafted = len(tokens)
    columns = {(parent, token): column for column, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1)}
    has_drafted_children = set(parents)
    column_of, survival_of = {0: 0}, {0: 1.0}
    nodes = []
    alone, agrees, against = (
        reliability.table(sampled=sampled, relation=relation) for relation in ("alone", "agrees", "against")
    )
    for copy, (token, copied_parent, cell) in enumerate(
        zip(copies.tokens, copies.parents, copies.cells, strict=True), start=1
    ):
        parent = column_of.get(copied_parent)
        if parent is None:  # left out itself
            continue
        column = columns.get((parent, token))
        if column is None:
            table = against if parent in has_drafted_children else alone
            survival = survival_of[parent] * reliability.rate(table, cell)
            if survival < least or len(tokens) >= most:
                continue
            tokens.append(token)
            parents.append(parent)
            column = columns[parent, token] = len(tokens)
        else:
            table = agrees
            survival = survival_of[parent] * reliability.rate(table, cell)
        column_of[copy], survival_of[column] = column, survival
        nodes.append(CopiedNode(column, parent, table, cell))
    if not nodes:
        return drafted
    is_chain = parents == list(range(len(tokens)))
    # Without drafted tokens, nothing that was drafted is worth its column.
    source = Source.DRAFT if num_drafted else source_of_copies(node.cell for node in nodes)
    return replace(
        drafted,
        tokens=tokens,
        parents=None if is_chain else parents,
        source=source,
        num_drafted=num_drafted,
        copies=tuple(nodes),
    )
