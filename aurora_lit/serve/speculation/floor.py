"""Never slower than plain decoding: speculation is judged by what it took, and turned off where it lost.

The planner predicts; this file keeps accounts. For each kind of round (number of sequences; greedy or sampled) it
knows what a plain round takes, because one is run now and then. Each speculating round adds to a balance what its
tokens would have taken in plain rounds, less what it took. The balance is in plain rounds and keeps at most
MOST_CREDIT; where it has fallen to a debt of MOST_DEBT, speculation rests for a while. Each further debt doubles that
while, and full credit restores the first one. What a wrong prediction can cost is therefore credit and debt together,
again and again, but ever more rarely. What speculation gains is kept: with one sequence a round's tokens vary by half a
round, so the sum of a few dozen rounds is negative by chance every now and then, but seldom by as much as credit and
debt together (E. S. Page's cumulative sum, Biometrika 41, 1954).

Kinds with about as many sequences (1, 2, 3 to 4, 5 to 8, …) share a balance, since few rounds are of exactly the same
kind while requests come and go. Rounds that only copy have a balance of their own, or a draft that does not pay would
end copies too, which cost little.

Times are those of whole rounds, with planning, drafting, verification and recording.

Left out: what is proposed (serve/speculation/proposer.py) and what it is predicted to gain
(serve/speculation/planner.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_lit.serve.sequences.sequence import RunningSequence

MOST_CREDIT, MOST_DEBT = 8.0, 3.0
"""In plain rounds. With one sequence, chance alone ends speculation that gains a tenth once in thousands of rounds; and
where speculation costs a tenth, the first debt is made within 30 rounds."""
FIRST_PATIENCE, MOST_PATIENCE = 64, 1024
"""Other rounds after a debt; and after many of them."""
_PLAIN_EVERY, _PLAIN_EVERY_WINNING = 32, 128
"""Speculating rounds after which a plain one is run to time it; the second where speculation had full credit."""
_MOST_ROUND = 4.0
"""A round counts as no more plain rounds: a preempted process is no loss of speculation."""
_DECAY = 0.7
"""Weight of the old time of a plain round when one is timed."""
_FIRST_TIMED = 3
"""Of the first plain rounds the shortest counts: one that was preempted would make speculation look good for long."""


class RoundKind(NamedTuple):
    """What the time of a plain round depends on."""

    batch_size: int
    sampled: bool
    """True if any sequence is."""

    @classmethod
    def of(cls, sequences: Sequence[RunningSequence]) -> RoundKind:
        """That of a round in which these sequences decode."""
        return cls(len(sequences), any(sequence.temperature > 0 for sequence in sequences))

    def group(self, *, drafted: bool) -> tuple[int, bool, bool]:
        """The same for kinds with about as many sequences."""
        return (self.batch_size - 1).bit_length(), self.sampled, drafted


@dataclass(kw_only=True)
class _PlainRounds:
    """Of one kind."""

    seconds: float = 0.0
    """What one takes; 0: none was timed yet."""
    count: int = 0
    since: int = 0
    """Speculating rounds since one was timed."""

    def add(self, seconds: float) -> None:
        """Time one more."""
        self.count += 1
        self.since = 0
        if self.count <= _FIRST_TIMED:
            self.seconds = min(self.seconds or seconds, seconds)
        else:
            self.seconds += (1 - _DECAY) * (min(seconds, 2 * self.seconds) - self.seconds)


@dataclass(kw_only=True)
class _Account:
    """Of one group of kinds."""

    balance: float = 0.0
    """What speculation has gained, in plain rounds; negative: lost."""
    rest: int = 0
    """Other rounds still to come before speculation is tried again."""
    patience: int = FIRST_PATIENCE
    won: bool = False
    """True if it had full credit since it last rested."""

    def add(self, gained: float) -> bool:
        """Add what a round gained, in plain rounds; True if speculation rests from now on."""
        self.balance = min(MOST_CREDIT, self.balance + gained)
        if self.balance == MOST_CREDIT:
            self.won, self.patience = True, FIRST_PATIENCE
        if self.balance > -MOST_DEBT:
            return False
        self.balance, self.won = 0.0, False
        self.rest, self.patience = self.patience, min(2 * self.patience, MOST_PATIENCE)
        return True


class SpeculationFloor:
    """Decides before each round whether it may speculate, and learns from its time.

    >>> kind = RoundKind(8, sampled=False)
    >>> if floor.allows(kind): ...                      # copies
    >>> if floor.allows(kind, drafts=True): ...         # proposals of the draft
    >>> floor.observe(kind, seconds=0.012, tokens=11, speculated=True)
    """

    def __init__(self) -> None:
        self._plain: defaultdict[RoundKind, _PlainRounds] = defaultdict(_PlainRounds)
        self._accounts: defaultdict[tuple[int, bool, bool], _Account] = defaultdict(_Account)
        self.num_rests = 0
        """How often speculation was turned off."""
        self.compared_s = self.compared_plain_s = 0.0
        """What all rounds took of kinds whose plain rounds have been timed; and what their tokens would have taken in
        plain rounds. As in the balance, no round counts as more than _MOST_ROUND plain ones."""

    def allows(self, kind: RoundKind, *, drafts: bool = False) -> bool:
        """False: this round is not to speculate, because that lost lately or a plain round is to be timed.

        `drafts`: by the draft; else by copies alone.
        """
        account, plain = self._accounts[kind.group(drafted=drafts)], self._plain[kind]
        if account.rest:
            return False
        if plain.count < _FIRST_TIMED:  # the first rounds of a kind speculate, then plain ones are timed
            return plain.since < 2
        return plain.since < (_PLAIN_EVERY_WINNING if account.won else _PLAIN_EVERY)

    def observe(
        self,
        kind: RoundKind,
        *,
        seconds: float,
        tokens: int,
        speculated: bool,
        drafted: bool = False,
        proposing_s: float = 0.0,
        looking_s: float = 0.0,
    ) -> None:
        """Add a round that had the machine to itself.

        `tokens`: that all its sequences got. `speculated`: anything was proposed or drafted; `drafted`: the draft ran.
        `proposing_s`: the part of `seconds` that proposing took; `looking_s`: its part that looked for copies. Where
        nothing came of it, no plain round would have taken that time. So it counts as lost: by copies what looked for
        them, by the draft the rest, in which it was decided not to draft.
        """
        plain = self._plain[kind]
        vain_s = [] if speculated else [(False, looking_s), (True, proposing_s - looking_s)]
        vain_s = [(own, lost_s) for own, lost_s in vain_s if not self._accounts[kind.group(drafted=own)].rest]
        for own in (False, True):
            account = self._accounts[kind.group(drafted=own)]
            if not (speculated and own == drafted):
                account.rest = max(0, account.rest - 1)
        if not speculated:
            plain.add(seconds - proposing_s)
            took_s = min(seconds, _MOST_ROUND * plain.seconds)
            self._compare(took_s, plain_s=took_s - proposing_s)
            for own, lost_s in vain_s:
                self.num_rests += self._accounts[kind.group(drafted=own)].add(-lost_s / plain.seconds)
            return
        account = self._accounts[kind.group(drafted=drafted)]
        plain.since += 1
        if not plain.seconds:
            return
        gave, took = tokens / kind.batch_size, min(seconds / plain.seconds, _MOST_ROUND)
        self._compare(took * plain.seconds, plain_s=gave * plain.seconds)
        self.num_rests += account.add(gave - took)

    def _compare(self, seconds: float, *, plain_s: float) -> None:
        self.compared_s += seconds
        self.compared_plain_s += plain_s

    def forgive(self) -> None:
        """Another draft proposes from now on: try speculation again everywhere."""
        for account in self._accounts.values():
            account.balance = max(0.0, account.balance)
            account.rest, account.patience = 0, FIRST_PATIENCE
