"""How much speaks for a draft, or against it: an e-value over requests that may be looked at after each of them.

With a test of fixed size after every request, equal drafts would be told apart sooner or later. An e-value bets
instead: it starts at 1, and each request multiplies it by 1 + λ·x, where x in [-1, 1] says how far the draft is ahead
there. Of two equal drafts either is as likely to be ahead by as much, so x is as likely as -x whatever came before, the
e-value is a nonnegative martingale, and the probability that it ever reaches 1/a is at most a (Ville's inequality),
however often it is looked at. Each request may be bet on only once.

Of a pair, two drafts on one request (learn/online/trial.py), x is the change divided by the median size of changes, cut
at 1. Unpaired (drafts/live_watch.py) it is the request's place among those of the draft before (`place_among`). So
neither a scale nor tails have to be known, and no single request counts for much. The bound holds for drafts that are
equal, not for all that are equal in the mean: one that gains a little on most requests and loses much on a few is taken
for a better one. All domains share one error budget (`DomainEvidence`).

A client that knows when drafts are swapped can choose its requests so that a new one looks bad, and it can send many.
So where several clients have a say, evidence counts only as far as no one of them has brought it alone. With E of all
requests and E₋c of those of all clients but c, `agreed` is min(E, min over c of E₋c^(3/2)): of its logarithm, no client
brings more than a third. It is at most E, so that the bound for honest clients holds for it. If one of them, h, does
whatever it likes, the other requests' x are still as likely as -x given all that came before. So E₋h is such a
martingale too, `agreed` is at most E₋h^(3/2), and it reaches 75 with probability 75^(-2/3) at most, one in 17.

Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, arXiv 2010.09686; Vovk et
al., Testing exchangeability on-line, ICML 2003 (places).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Sequence

NEEDED_AGAINST = 75.0
"""A draft is bad once so much speaks against it: of equal ones one in 75 at most, however long they are on trial."""
FEWEST_FOR_A_SAY = 4
"""Requests by which a client has a say: whoever has sent fewer hinders no decision about those who sent many."""
_BETS = (0.4, 0.8)
"""Shares of the wealth that the largest change could win or lose; a part of the stake is bet at each."""
_MOST_LOG_WEALTH = 50.0
"""Wealth is capped here, which leaves the e-value valid: a draft that passes and cannot be published, as the disk is
full, goes on winning."""
_MOST_SIZES = 512
"""Of so many changes the usual size is known; later ones are taken to be like them."""


class Evidence:
    """See the file's docstring.

    >>> evidence = Evidence()
    >>> evidence.add([0.3] * 3)         # three requests on which the draft is ahead by the same
    >>> round(evidence.value, 2)        # the mean of 1.4³ and 1.8³
    4.29
    """

    def __init__(self) -> None:
        """Without any request."""
        self.clear()

    def clear(self) -> None:
        """Begin again, with other drafts."""
        self._log_wealth: dict[str, list[float]] = {}
        """By client, and by bet."""
        self._sizes: list[float] = []
        """Of the changes, ascending."""

    @property
    def value(self) -> float:
        """The e-value; 1 before any request."""
        return self.without(None)

    def without(self, client: str | None) -> float:
        """The e-value of all clients' requests but this one's; None: of all."""
        sums = self._sums([each for name, each in self._log_wealth.items() if name != client])
        return sum(map(math.exp, sums)) / len(sums)

    def add(self, changes: Sequence[float], *, clients: Iterable[str] = itertools.repeat("")) -> None:
        """Bet on new requests that both drafts were scored on; `changes`: how far the draft is ahead, in any unit."""
        for change in changes[: _MOST_SIZES - len(self._sizes)]:
            insort(self._sizes, abs(change))
        for change, client in zip(changes, clients, strict=False):
            usual = self._sizes[len(self._sizes) // 2]
            size = min(1.0, abs(change) / usual) if usual else 1.0
            self.add_lead(math.copysign(size, change) if change else 0.0, client=client)

    def add_lead(self, lead: float, *, client: str = "") -> None:
        """Bet on a new request; `lead`: x, which is -1 to 1."""
        bets = [math.log1p(bet * lead) for bet in _BETS]
        self._log_wealth[client] = self._sums([self._log_wealth.get(client, [0.0] * len(_BETS)), bets])

    def forget_losses(self) -> None:
        """Begin again if more speaks against the draft until now than for it."""
        if self.value < 1:
            self.clear()

    def state_dict(self) -> list[float]:
        """The logarithm of what each bet has made of its stake."""
        return self._sums(list(self._log_wealth.values()))

    def load_state_dict(self, state: list[float]) -> None:
        """Continue from what `state_dict` returned, as if it were of one client; of another number of bets: ignored."""
        if len(state) == len(_BETS):
            self._log_wealth = {"": list(state)}

    @staticmethod
    def _sums(rows: Sequence[Sequence[float]]) -> list[float]:
        """By bet."""
        return [min(_MOST_LOG_WEALTH, math.fsum(row[bet] for row in rows)) for bet in range(len(_BETS))]


class DomainEvidence:
    """Evidence over all domains together and in each: its value is an e-value too.

    Four fifths of the stake are bet on all requests, the rest on single domains: of this the k-th domain that comes
    gets 1 / (k (k + 1)), and what is left waits for those to come.
    """

    def __init__(self) -> None:
        """Without any request."""
        self._all = Evidence()
        self._by_domain: dict[str, Evidence] = {}

    def add_lead(self, domain: str, lead: float, *, client: str = "") -> None:
        """Bet on a new request; `lead`: x, which is -1 to 1."""
        self._all.add_lead(lead, client=client)
        self._by_domain.setdefault(domain, Evidence()).add_lead(lead, client=client)

    @property
    def value(self) -> float:
        """The e-value; 1 before any request."""
        return self.without(None)

    def without(self, client: str | None) -> float:
        """The e-value of all clients' requests but this one's; None: of all."""
        parts = [each.without(client) / (k * (k + 1)) for k, each in enumerate(self._by_domain.values(), 1)]
        return 0.8 * self._all.without(client) + 0.2 * (sum(parts) + 1 / (len(parts) + 1))

    @property
    def strongest(self) -> str | None:
        """The domain for which more is known than for all together; None: there is none."""
        if not self._by_domain:
            return None
        domain = max(self._by_domain, key=lambda name: self._by_domain[name].value)
        return domain if self._by_domain[domain].value > self._all.value else None


def agreed(value_without: Callable[[str | None], float], clients: Collection[str | None]) -> float:
    """How much of the evidence no client has brought alone; see the file's docstring.

    value_without: the e-value without the requests of a client; None: of all. clients: that have a say. If there is
    only one, all counts.
    """
    value = value_without(None)
    return min([value, *(value_without(each) ** 1.5 for each in clients)]) if len(clients) > 1 else value


def place_among(values: Sequence[float], value: float) -> float:
    """A value's place among ascending others, from -1 (below all) to 1, if it is as likely to have any of the places
    under equal drafts; it is one of the others for the next value."""
    below, above = bisect_left(values, value), len(values) - bisect_right(values, value)
    return (below - above) / (len(values) + 1)
