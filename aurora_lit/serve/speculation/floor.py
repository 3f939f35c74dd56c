"""Never slower than plain decoding: speculation is judged by what it took, and turned off where it lost.

Prices predict; this file keeps accounts. For each kind of round (number of sequences; greedy or sampled; with the
target's logits or without) it knows what a plain round takes, because one is run now and then. Each speculating round
adds to a balance what its tokens would have taken in plain rounds, less what it took. The balance is in plain rounds
and keeps at most MOST_CREDIT; where it has fallen to a debt of `most_debt`, speculation rests for a while. Each further
debt doubles that while, and full credit restores the first one. What a wrong prediction can cost is therefore credit
and debt together, again and again, but ever more rarely. What speculation gains is kept: with one sequence a round's
tokens vary by half a round, so the sum of a few dozen rounds is negative by chance every now and then, but seldom by as
much as credit and debt together (E. S. Page's cumulative sum, Biometrika 41, 1954).

Kinds with about as many sequences (1, 2, 3 to 4, 5 to 8, …) share a balance, since few rounds are of exactly the same
kind while requests come and go. Rounds with fewer threads, since other processes use the rest, have balances of their
own, and so have rounds that only copy: a draft that does not pay would end copies too, which cost little.

Times are those of whole rounds, with planning, drafting and verification; not with what follows the end of a request,
which comes more often in a plain round, since the last token has no proposal. Only what a draft takes to read a
prompt, or what it missed while it rested, is charged in parts, over the rounds that come: it is paid once a request,
and would be a debt at once.

Left out: what is proposed (serve/speculation/propose.py) and what it is predicted to gain
(serve/speculation/weigh.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_lit.serve.engine.round_plan import ProposedRound
from aurora_lit.serve.engine.sequence import RunningSequence

MOST_CREDIT = 8.0
"""In plain rounds."""
FIRST_PATIENCE, MOST_PATIENCE = 128, 2048
"""Other rounds after a debt; and after many of them."""
_PLAIN_EVERY, _PLAIN_EVERY_WINNING = 32, 128
"""Speculating rounds after which a plain one is run to time it; the second where speculation had full credit."""
_MOST_ROUND = 4.0
"""A round counts as no more plain rounds: a preempted process is no loss of speculation."""
_CHARGED = 1 / 32
"""Share of what is left of catching up that a round is charged."""
_DECAY = 0.7
"""Weight of the old time of a plain round when one is timed."""
_FIRST_TIMED = 3
"""Of the first plain rounds the shortest counts: one that was preempted would make speculation look good for long."""


def most_debt(batch_size: int, rounds: int) -> float:
    """In plain rounds, after so many speculating ones: 3, and what luck may have made of those, up to a limit.

    One sequence's speculating round varies by 0.8 plain rounds; of several sequences luck averages out, and so does
    what there is to gain. Where speculation gains a fifteenth, chance ends it once in some thirty debts; where it costs
    a tenth, the first debt is a sixteenth of a second. What looking in vain takes is no luck, and makes a debt of 3.
    """
    return 3.0 + min(1.2 * math.sqrt(rounds), 16.0) / batch_size


class RoundKind(NamedTuple):
    """What the time of a plain round depends on."""

    batch_size: int
    sampled: bool
    """True if any sequence is."""
    threads: int = 0
    """That the round computes with; others may have been left to other processes."""
    needs_logits: bool = False
    """True if any sequence does until its end: then choosing tokens takes several times as long."""

    @classmethod
    def of(cls, sequences: Sequence[RunningSequence], *, threads: int) -> RoundKind:
        """That of a round in which these sequences decode."""
        sampled = any(sequence.temperature > 0 for sequence in sequences)
        needs_logits = any(each.always_needs_logits or each.grammar is not None for each in sequences)
        return cls(len(sequences), sampled, threads, needs_logits)

    @property
    def group(self) -> tuple[int, bool, int, bool]:
        """The same for kinds with about as many sequences."""
        return (self.batch_size - 1).bit_length(), self.sampled, self.threads, self.needs_logits


@dataclass(kw_only=True)
class _PlainRounds:
    """Of one kind."""

    seconds: float = 0.0
    """What one takes; 0: none was timed yet."""
    last_s: float = 0.0
    """What the last one took."""
    count: int = 0
    since: int = 0
    """Speculating rounds since one was timed."""
    since_s: float = 0.0
    """What those took that count …"""
    since_tokens: float = 0.0
    """… and what they gave each sequence."""

    def add(self, seconds: float) -> tuple[float, float]:
        """Time one more. Returns what the speculating rounds since the last one took, and plain ones would have taken.

        A plain one would have taken the mean of the last and of this one. By the last alone speculation looks better
        than it is: where that one was slow, speculation seems to win, and none is timed for long.
        """
        last_s, self.last_s = self.last_s, min(seconds, 2 * self.seconds or seconds)
        self.count += 1
        if self.count <= _FIRST_TIMED:
            self.seconds = min(self.seconds or seconds, seconds)
        else:
            self.seconds += (1 - _DECAY) * (self.last_s - self.seconds)
        compared = self.since_s, self.since_tokens * (last_s + self.last_s) / 2
        self.since, self.since_s, self.since_tokens = 0, 0.0, 0.0
        return compared


@dataclass(kw_only=True)
class _Account:
    """Of one group of kinds."""

    batch_size: int
    """Largest of the group."""
    balance: float = 0.0
    """What speculation has gained, in plain rounds; negative: lost."""
    rounds: int = 0
    """Speculating ones since it last rested or had full credit."""
    owed: float = 0.0
    """Of catching up, in plain rounds: what is still to be charged."""
    rest: int = 0
    """Other rounds still to come before speculation is tried again."""
    patience: int = FIRST_PATIENCE
    won: bool = False
    """True if it had full credit since it last rested."""

    def allows(self, plain: _PlainRounds) -> bool:
        """False while it rests, and where a plain round is to be timed."""
        most = _PLAIN_EVERY_WINNING if self.won else _PLAIN_EVERY
        if plain.count < _FIRST_TIMED:
            most = 2  # the first rounds of a kind speculate, then plain ones are timed
        return not self.rest and plain.since < most

    def charge(self, catching_up: float) -> float:
        """What a round is charged of this catching up and what is owed of earlier ones, in plain rounds."""
        charged = _CHARGED * (self.owed + catching_up)
        self.owed += catching_up - charged
        return charged

    def add(self, gained: float) -> bool:
        """Add what a round gained, in plain rounds; True if speculation rests from now on."""
        self.balance = min(MOST_CREDIT, self.balance + gained)
        if self.balance == MOST_CREDIT:
            self.won, self.patience, self.rounds = True, FIRST_PATIENCE, 0
        if self.balance > -most_debt(self.batch_size, self.rounds):
            return False
        self.balance, self.owed, self.won, self.rounds = 0.0, 0.0, False, 0
        self.rest, self.patience = self.patience, min(2 * self.patience, MOST_PATIENCE)
        return True


class Allowed(NamedTuple):
    """What may be proposed in a round."""

    copies: bool
    drafts: bool


class _Accounts(NamedTuple):
    """Of one group of kinds."""

    copying: _Account
    """Of rounds that only copy."""
    drafting: _Account


class SpeculationFloor:
    """Decides before each round whether it may speculate, and learns from its time.

    >>> kind = RoundKind(8, sampled=False)
    >>> copies, drafts = floor.allows(kind)             # may this round propose copies, may the draft propose?
    >>> floor.observe(kind, seconds=0.012, tokens=11, proposed=True, proposing=ProposedRound())
    """

    def __init__(self) -> None:
        self._plain: defaultdict[RoundKind, _PlainRounds] = defaultdict(_PlainRounds)
        self._accounts: dict[tuple[int, bool, int, bool], _Accounts] = {}
        """By group."""
        self.num_rests = 0
        """How often speculation was turned off."""
        self.compared_s = self.compared_plain_s = 0.0
        """What all rounds took of kinds whose plain rounds have been timed; and what their tokens would have taken in
        plain rounds. As in the balance, no round counts as more than _MOST_ROUND plain ones. Speculating rounds are
        added when the next plain one is timed."""

    def allows(self, kind: RoundKind) -> Allowed:
        """Whether this round may copy, and whether it may draft: not where that lost lately, nor where a plain round is
        to be timed.
        """
        copying, drafting = self._accounts_for(kind)
        plain = self._plain[kind]
        return Allowed(copying.allows(plain), drafting.allows(plain))

    def observe(
        self, kind: RoundKind, *, seconds: float, tokens: int, proposed: bool, proposing: ProposedRound
    ) -> None:
        """Add a round in which speculation was wanted.

        `tokens`: that all its sequences got. `proposed`: anything was. `proposing`: the part of `seconds` that this
        took. Where nothing came of it and the draft did not run, no plain round would have taken that time. So it
        counts as lost: by copies what looked for them, by the draft the rest, in which it was decided not to draft.
        """
        looking_s, proposing_s, catch_up_s = proposing.looking_s, proposing.all_s, proposing.catching_up_s
        drafted = proposing.drafting_s > 0
        plain, accounts = self._plain[kind], self._accounts_for(kind)
        if not (proposed or drafted):
            losses = zip(accounts, (looking_s, proposing_s - looking_s), strict=True)
            vain_s = [(account, lost_s) for account, lost_s in losses if not account.rest]
            _pass_rests(accounts)
            self._compare(*plain.add(seconds - proposing_s))
            took_s = min(seconds, _MOST_ROUND * plain.seconds)
            self._compare(took_s, max(0.0, took_s - proposing_s))
            for account, lost_s in vain_s:
                self.num_rests += account.add(-min(lost_s / plain.seconds, 1.0))
            return
        account, other = accounts[drafted], accounts[not drafted]
        _pass_rests([other])
        plain.since += 1
        account.rounds += 1
        if not plain.seconds:
            return
        gave, took = tokens / kind.batch_size, min((seconds - catch_up_s) / plain.seconds, _MOST_ROUND)
        plain.since_s += took * plain.seconds + catch_up_s
        plain.since_tokens += gave
        self.num_rests += account.add(gave - took - account.charge(catch_up_s / plain.seconds))

    def observe_unasked(self, kind: RoundKind, *, seconds: float) -> None:
        """Time a plain round of requests that do not want speculation, in which no rest passes."""
        self._compare(*self._plain[kind].add(seconds))

    def pass_untimed(self, kind: RoundKind) -> None:
        """Count a round that is not compared: rests end in rounds, whatever these took."""
        _pass_rests(self._accounts_for(kind))

    def _accounts_for(self, kind: RoundKind) -> _Accounts:
        group = kind.group
        if group not in self._accounts:
            most = 1 << group[0]
            self._accounts[group] = _Accounts(_Account(batch_size=most), _Account(batch_size=most))
        return self._accounts[group]

    def _compare(self, seconds: float, plain_s: float) -> None:
        self.compared_s += seconds
        self.compared_plain_s += plain_s

    def forgive(self) -> None:
        """Another draft proposes from now on: try speculation again everywhere."""
        for accounts in self._accounts.values():
            for account in accounts:
                account.balance = max(0.0, account.balance)
                account.rest, account.patience = 0, FIRST_PATIENCE


def _pass_rests(accounts: Iterable[_Account]) -> None:
    """Count a round in which these did not propose."""
    for account in accounts:
        account.rest = max(0, account.rest - 1)
