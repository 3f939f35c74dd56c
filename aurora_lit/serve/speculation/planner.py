"""How many tokens the draft proposes in a round: measured costs against predicted acceptance.

A round over B sequences with k proposals each takes draft(B, k) + target(B, k + 1) seconds and yields
1 + a + a² + … + a^k tokens per sequence of acceptance rate a. `choose_length` takes the k with the most tokens per
second. A change must promise a per cent, so that noise does not make it alternate; drafting is stopped as soon as
it costs time. Greedy and sampled sequences are accepted at different rates, so both are learned apart.

If it is worth drafting, a chain is weighed where that is possible: `SpeculationPlanner.weighing` has what native steps
need to decide for each token, and for those beside it, whether it is worth its column.

Left out: drafting itself (serve/speculation/drafter.py), the cost tables (serve/speculation/costs.py), copies
(serve/speculation/copy_planner.py), and whether speculation has paid at all (serve/speculation/floor.py).

All times are in seconds; speeds are in tokens per second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_lit.kernels.draft_steps import Prices, Weighing, doubles
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.sequence import RunningSequence, VerifiedDrafts
from aurora_lit.serve.speculation.costs import READ_IN_A_STEP, Costs
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
_PROBED_WEIGHT = 40.0
"""Most proposals that the earlier ones count as while only probes are verified, one in _PROBE_EVERY rounds: with
_MEAN_DECAY's four and eight clients waited for minutes until drafting came back."""
_MIN_GAIN = 1.01
"""A change of what is drafted must promise this factor in speed, so that noise does not make it alternate."""
_RECONSIDER_EVERY = 8
"""Rounds without a draft after which drafting is considered again; that takes a few per cent of a small round."""
_DECIDE_EVERY = 4
"""Rounds of as many sequences, whichever they are, for which a decision holds; making it takes 2 % of a small round."""
_TRY_EVERY, _TRY_WITHIN = 64, 0.8
"""Every so many rounds that draft, another length is drafted that promises at least this share of the chosen one's
speed, each in turn. Only what is drafted is measured: without this, one that was measured as too slow when the
server started, beside other work, or as accepting too little, would never be drafted."""
_PROBE_EVERY = 128
"""Rounds without a draft after which one token is drafted, to measure whether the traffic has become predictable."""
_PROBE_SHARE = 0.005
"""Largest share of the time of these rounds that reading a prompt for it may take: else it waits for longer."""
_PRICED_EVERY = 16
"""Rounds for which the price of columns holds."""
SIBLING_TOKENS = 3
"""Most other likely tokens that are considered beside each token of a weighed chain."""
MAX_REMAINING_TOKENS = 128
"""Most tokens that a sequence is assumed to generate from here on, whatever its `max_tokens`."""


@dataclass(frozen=True, kw_only=True)
class SpeculationLimits:
    """The most that may be proposed for a sequence in a round."""

    draft_tokens: int
    """Longest chain; 0: there is no draft."""
    copied_tokens: int
    """0: nothing is copied."""
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

    def add(self, accepted: bool, *, probed: bool) -> None:
        """Update by one proposal; `probed`: of a probe."""
        self._weight = min(self._weight + 1, _PROBED_WEIGHT if probed else 1 / (1 - _MEAN_DECAY))
        self.value += (accepted - self.value) / self._weight


def speed_of(length: int, rates: Sequence[float], *, batch_size: int, costs: Costs) -> float:
    """Expected tokens per second of a round in which sequences of these acceptance rates draft chains of a length.

    `batch_size`: all sequences of the round. 0 if costs are unknown.
    """
    tokens = batch_size + sum(_gain(length, rate) for rate in rates)
    target_s, draft_s = costs.round_s(batch_size, [length] * len(rates)), costs.draft_s(len(rates), length)
    return tokens / (target_s + draft_s) if target_s and (draft_s or not length) else 0.0


def choose_length(speeds: Sequence[float], *, last: int = 0) -> int:
    """How long drafted chains are: the fastest length, or `last`, that of the round before, if it is nearly as fast.

    A pure function. `speeds`: tokens per second by length, from 0, which drafts nothing.
    """
    best = max(range(len(speeds)), key=speeds.__getitem__)
    now = speeds[last]
    if speeds[best] > now * _MIN_GAIN:
        return best
    return last if now and now >= speeds[0] else 0


class DraftDecision(NamedTuple):
    """What a round drafts."""

    length: int = 0
    """Of the chains; 0: nothing is drafted."""
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
        self.reliability = DraftReliability()
        self._prices: dict[tuple[int, int], tuple[int, Prices]] = {}
        """What holds for _PRICED_EVERY rounds that draft, and since which, by batch size and sequences that draft."""
        self._last = limits.draft_tokens
        self._speed = 0.0
        """What it promises, in tokens per second."""
        self._decided_for, self._decided_rounds = (0, 0), 0
        """The last decision's numbers of sequences that draft and of all; and how many rounds it has held."""
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

    def decide(self, rates: Sequence[float], *, batch_size: int) -> DraftDecision:
        """What to draft for sequences of these acceptance rates, in a round of `batch_size` sequences."""
        if not rates or not self.limits.draft_tokens:
            return DraftDecision()
        if not self.limits.adaptive:
            return DraftDecision(self.limits.draft_tokens)
        if not self._last and (self._rounds_without + 1) % _RECONSIDER_EVERY:
            return self._without_draft()
        self._rounds_with += 1
        is_trial = self._rounds_with % _TRY_EVERY == 0
        asked, self._decided_rounds = (len(rates), batch_size), self._decided_rounds + 1
        if not self._last or is_trial or asked != self._decided_for or self._decided_rounds >= _DECIDE_EVERY:
            lengths = range(self.limits.draft_tokens + 1)
            speeds = [speed_of(length, rates, batch_size=batch_size, costs=self.costs) for length in lengths]
            self._last = choose_length(speeds, last=self._last)
            self._speed, self._decided_for, self._decided_rounds = speeds[self._last], asked, 0
            if is_trial and self._last:
                return DraftDecision(self._other_length(speeds), is_trial=True)
        if not self._last:
            return self._without_draft()
        self._rounds_without = 0
        return DraftDecision(self._last, speed=self._speed)

    def _without_draft(self) -> DraftDecision:
        """Nothing is drafted, but now and then a token to see how predictable the traffic is."""
        self._rounds_without += 1
        if self._rounds_without < _PROBE_EVERY:
            return DraftDecision()
        return DraftDecision(1, is_probe=True)

    def affords_probe(self, batch_size: int, *, uncached: int) -> bool:
        """True if a probe may read `uncached` positions now; it counts as held then."""
        earned_s = _PROBE_SHARE * self._rounds_without * self.costs.round_s(batch_size, [])
        if self.costs.catch_up_s(1, uncached=uncached) > earned_s:
            return False
        self._rounds_without = 0
        return True

    def pays_for_catching_up(
        self, length: int, rates: Sequence[float], *, batch_size: int, uncached: int, remaining: int
    ) -> bool:
        """True if drafting saves, over the `remaining` tokens, the time to prefill the draft with `uncached` positions.

        Otherwise drafting is over until it is considered again. What a first step reads anyway needs no saving.
        """
        if not self.limits.adaptive or uncached <= READ_IN_A_STEP * len(rates):
            return True
        plain, chosen = (speed_of(n, rates, batch_size=batch_size, costs=self.costs) for n in (0, length))
        gain_s = remaining * (1 / plain - 1 / chosen) if plain and chosen else 0.0
        if gain_s >= uncached * self.costs.catch_up_position_s:
            return True
        self._last = 0
        return False

    def min_gains(self, length: int, num_drafting: int, *, batch_size: int, speed: float) -> list[float] | None:
        """What each step after the first must promise to be drafted; None: all are drafted.

        In accepted tokens of all sequences together: as many as the time of the step, which also makes the target's
        pass longer, would give at `speed`, in tokens per second.
        """
        if not self.limits.adaptive:
            return None
        until_s = [
            self.costs.draft_s(num_drafting, n) + self.costs.round_s(batch_size, [n] * num_drafting)
            for n in range(1, length + 1)
        ]
        return [speed * max(0.0, after - before) for before, after in itertools.pairwise(until_s)]

    def weighing(self, drafting: Sequence[RunningSequence], *, batch_size: int, speed: float) -> Weighing:
        """How what is drafted for these sequences is weighed, in a round that promises `speed`, in tokens a second."""
        key = batch_size, len(drafting)
        since, prices = self._prices.get(key, (0, None))
        if prices is None or self._rounds_with - since >= _PRICED_EVERY:
            costs, most = self.costs, len(drafting) * self.limits.weighed_tokens
            plain_s = costs.round_s(batch_size, [])
            columns_s = [max(0.0, costs.round_s(batch_size, [count]) - plain_s) for count in range(most + 1)]
            until_s = [costs.draft_s(len(drafting), n) for n in range(1, self.limits.draft_tokens + 1)]
            levels_s = [max(0.0, after - before) for before, after in itertools.pairwise(until_s)]
            prices = Prices(self.reliability.acceptance_KC, doubles(columns_s), doubles(levels_s))
            self._prices[key] = self._rounds_with, prices
        return Weighing(prices, [self.rate_of(sequence) for sequence in drafting], speed)

    def expected_draft_gain(self, rate: float, *, batch_size: int, speed: float, column_tokens: float) -> float:
        """Tokens that the draft gains for one sequence, net of the tokens that its time would have given otherwise.

        Drafting is assumed to go as in the last round that drafted. `speed`: tokens per second without it;
        `column_tokens`: tokens in the time of one more query position of the target.
        """
        if not self._last:
            return 0.0
        drafting_s = self.costs.draft_s(batch_size, self._last) / batch_size
        return _gain(self._last, rate) - self._last * column_tokens - drafting_s * speed

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
            tested, right = proposal.weighed.tested_by(tokens)
            for i, share in enumerate(proposal.weighed.shares[:tested]):
                self._add(sequence, i < right, sampled=sampled)
                self.reliability.observe(sampled=sampled, share=share, accepted=i < right)
            return
        chain = proposal.first_choices
        accepted = common_prefix_length(chain, path[1:])
        # The end of a request may cut off what came after the accepted ones, so that it was not verified.
        for i in range(min(accepted + (not finished), len(chain))):
            self._add(sequence, i < accepted, sampled=sampled)

    def _add(self, sequence: RunningSequence, accepted: bool, *, sampled: bool) -> None:
        sequence.verified_drafts.add(accepted, decay=_RECORD_DECAY)
        self._mean_rates[sampled].add(accepted, probed=not self._last)

    def observe_round(self, batch_size: int, counts: Sequence[int], seconds: float) -> None:
        """Update by a round's time but for drafting; `counts`: proposals of those sequences that have some."""
        if self.updates_costs:
            self.costs.observe_round(batch_size, counts, seconds)

    def observe_draft(self, num_drafting: int, length: int, seconds: float, *, uncached: int = 0) -> None:
        """Update by the time that drafting took, the prefill of `uncached` positions included."""
        if self.updates_costs:
            self.costs.observe_draft(num_drafting, length, seconds, uncached=uncached)

    def observe_catch_up(self, num_positions: int, seconds: float) -> None:
        """Update by the time that the prefill of so many positions of the draft's cache took alone."""
        if self.updates_costs:
            self.costs.observe_catch_up(num_positions, seconds)

    def reset_for_new_draft(self, sequences: Sequence[RunningSequence]) -> None:
        """Another draft proposes from now on: low acceptance of the last one must not keep it from being tried."""
        for sampled, rate in self._mean_rates.items():
            if rate.value < _INITIAL_RATE:
                self._mean_rates[sampled] = _MeanRate()
        for sequence in sequences:
            if self.rate_of(sequence) < _INITIAL_RATE:
                sequence.verified_drafts = VerifiedDrafts()
        self._last, self._rounds_without = self.limits.draft_tokens, 0

    def _other_length(self, speeds: Sequence[float]) -> int:
        """The next in turn of those that might be as fast as the chosen length; that itself if there is none."""
        enough = _TRY_WITHIN * speeds[self._last]
        others = [each for each in range(1, len(speeds)) if each != self._last and speeds[each] >= enough]
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


def _gain(count: int, rate: float) -> float:
    """Expected number of accepted tokens of `count` proposals in a row."""
    return sum(rate**j for j in range(1, count + 1))
