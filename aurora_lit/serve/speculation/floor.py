"""Never slower than plain decoding: speculation is judged by what it took, and turned off where it lost.

The planner predicts; this file keeps accounts. For each kind of round (number of sequences; greedy or sampled) it
knows what a plain round takes, because one is run now and then. Over a window of speculating rounds it adds up what
they took and what plain rounds would have taken for the same tokens; kinds with about as many sequences (1, 2, 3 to 4,
5 to 8, …) share a window, since few rounds are of exactly the same kind while requests come and go. Rounds that only
copy have windows of their own, or a draft that does not pay would end copies too, which cost little. A window that lost
turns speculation off for a while. Each further loss doubles that while, and a window that clearly won shortens it. What
a wrong prediction can cost is therefore one window, again and again, but ever more rarely.

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

WINDOW_ROUNDS = 24
"""Speculating rounds after which they are judged."""
_EARLY_ROUNDS, _EARLY_SHARE = 8, 1.15
"""After so many a window that took more than this share of plain decoding's time is lost already."""
FIRST_PATIENCE, MOST_PATIENCE = 64, 1024
"""Other rounds after a lost window; and after many of them."""
_PLAIN_EVERY, _PLAIN_EVERY_WINNING = 32, 128
"""Speculating rounds after which a plain one is run to time it; the second where speculation clearly wins."""
_CLEARLY = 0.9
"""A window that took less than this share of plain decoding's time has clearly won."""
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

    spent_s: float = 0.0
    """What the window's rounds took."""
    worth_s: float = 0.0
    """What plain rounds would have taken for their tokens."""
    num_rounds: int = 0
    rest: int = 0
    """Other rounds still to come before speculation is tried again."""
    patience: int = FIRST_PATIENCE
    won: bool = False
    """True if the last window clearly won."""


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
        self.windows_won = self.windows_lost = 0

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

    def observe(self, kind: RoundKind, *, seconds: float, tokens: int, speculated: bool, drafted: bool = False) -> None:
        """Add a round that had the machine to itself.

        `tokens`: that all its sequences got. `speculated`: anything was proposed or drafted; `drafted`: the draft ran.
        """
        plain = self._plain[kind]
        for own in (False, True):
            account = self._accounts[kind.group(drafted=own)]
            if not (speculated and own == drafted):
                account.rest = max(0, account.rest - 1)
        if not speculated:
            plain.add(seconds)
            return
        account = self._accounts[kind.group(drafted=drafted)]
        plain.since += 1
        if not plain.seconds:
            return
        account.spent_s += min(seconds, 4 * plain.seconds)  # a preempted process is no loss of speculation
        account.worth_s += plain.seconds * tokens / kind.batch_size
        account.num_rounds += 1
        is_lost = account.num_rounds >= _EARLY_ROUNDS and account.spent_s > _EARLY_SHARE * account.worth_s
        if is_lost or account.num_rounds >= WINDOW_ROUNDS:
            self._judge(account)

    def forgive(self) -> None:
        """Another draft proposes from now on: try speculation again everywhere."""
        for account in self._accounts.values():
            account.rest, account.patience = 0, FIRST_PATIENCE

    def _judge(self, account: _Account) -> None:
        share = account.spent_s / account.worth_s
        account.won = share < _CLEARLY
        if share > 1.0:
            self.windows_lost += 1
            account.rest, account.patience = account.patience, min(2 * account.patience, MOST_PATIENCE)
        else:
            self.windows_won += 1
            if account.won:  # by chance, maybe: so patience shrinks step by step
                account.patience = max(FIRST_PATIENCE, account.patience // 4)
        account.spent_s = account.worth_s = 0.0
        account.num_rounds = 0
