"""Detects, soon after a swap and on live traffic, that the new draft is right less often than the last one.

Each request counts once, by its first rounds: by how many first choices of the draft a round were right more than those
of earlier versions were in the same kind of traffic and at the same places of a round's chain, proposed or not (n-gram
lookup does not count). How many tokens are drafted and proposed changes with load, with acceptance and with how sure
the draft is, and traffic changes its mix of domains, temperatures, grammars and options, none of which makes a draft a
worse one. The request's place among those before it in the same kind of traffic is evidence (drafts/evidence.py): an
equal draft's has any place as likely as any other, however much requests differ and however few came before. A
version is on trial once, for its first requests: a bad draft is bad from its first round on, later changes are due to
traffic.

Clients weigh, not requests. A client's requests are compared with its own, so that what one sends says nothing about
another's, nor does another mix of clients after the swap. Those of clients with few requests are compared with each
other, if they are enough together. A version is bad only if several clients agree (`agreed`), unless one alone has
asked: one that sends easy text before a swap and hard text after it rolls nothing back. By the opposite it can keep a
bad draft from being rolled back, which costs the others speed until the next version passes the gate. What is worse for
one client alone, such as the only one that asks for a domain, raises an alarm (`LiveWatch.alarm`). Alarms and rollbacks
of equal drafts are one in 75 together.

Leaves out the rollback itself (drafts/hot_reload.py) and the gate before publishing (learn/online/trial.py).

    watch = LiveWatch()
    watch.swapped(trusted=False)                                            # the trial of a new version begins
    verdict = watch.observe(request="a1", traffic=TrafficKind("code"), proposed=4, accepted=0)  # None, or the reason
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from aurora_lit.drafts.evidence import FEWEST_FOR_A_SAY, NEEDED_AGAINST, DomainEvidence, agreed, place_among
from aurora_lit.request import oldest_of_busiest

TRIAL_REQUESTS = 128
"""Length of a trial, requests included that are not compared."""
_ACQUITTAL_REQUESTS = 48
"""After so many a trial ends as soon as the evidence against the version is less than at its beginning."""
REQUEST_ROUNDS = 32
"""Rounds by which a request counts; of a longer one the first."""
_QUIET_ROUNDS = 1024
"""A request of which nothing came in so many rounds is over, such as one that was cancelled."""
_REMEMBERED_REQUESTS = 256
"""Requests of a version that the next one is compared with, the latest of each client."""
_ENOUGH_REQUESTS = 32
"""Of a kind of traffic; if a version had fewer, those of the versions before it count too."""
_MOST_SWAPS = 4
"""After so many swaps a kind of traffic that has not come since is forgotten: drafts and traffic have changed."""
_FEWEST_CHOICES = 32
"""Fewest choices at a place of the chain for their mean to be used."""
_FEWEST_OF_OTHERS = 16
"""Fewest requests, of a kind, that clients with few requests must have sent together to be compared."""


class TrafficKind(NamedTuple):
    """What makes a draft right more or less often, however good it is: only rounds that agree in it are compared, but
    for clients with few requests."""

    domain: str = ""
    """What the request is served as."""
    temperature: float = 0.0
    """The request's, to a tenth; 0: greedy."""
    has_grammar: bool = False
    """True if a grammar constrains the answer."""
    has_options: bool = False
    """True if penalties, a bias, top-k, top-p or min-p change the target's distribution; the draft knows of none."""
    client: str = ""
    """Who asks (`Client.source`); "" if that is unknown."""


@dataclass(eq=False)
class _Request:
    """How often the draft's first choices were right in one request."""

    traffic: TrafficKind
    last_round: int = 0
    """Number of the request's last round among all."""
    reached: list[int] = field(default_factory=list)
    """How many choices the answer tells about, by their place in the round's chain."""
    right: list[int] = field(default_factory=list)
    is_counted: bool = False

    @property
    def client(self) -> str:
        return self.traffic.client

    @property
    def kind(self) -> TrafficKind:
        """Its kind of traffic, whoever asks."""
        return self.traffic._replace(client="")

    @property
    def num_rounds(self) -> int:
        return self.reached[0] if self.reached else 0

    def add(self, *, proposed: int, accepted: int) -> None:
        """Count a round."""
        self.reached += [0] * (proposed - len(self.reached))
        self.right += [0] * (proposed - len(self.right))
        for place in range(min(proposed, accepted + 1)):
            self.reached[place] += 1
            self.right[place] += place < accepted


class _Tally(NamedTuple):
    """What requests of one domain add up to."""

    requests: int = 0
    choices: int = 0
    """First choices that their answers tell about."""
    lead: float = 0.0
    """Choices that were right more than expected; below 0: fewer."""


class LiveWatch:
    """The trials of one version after another; see the file's example."""

    def __init__(self) -> None:
        """No trial runs before the first swap."""
        self._open: OrderedDict[str, _Request] = OrderedDict()
        """Requests that may go on, the one with the latest round last."""
        self._latest: list[_Request] = []
        """Those of the present version that have been counted."""
        self._num_rounds = 0
        self._before: dict[TrafficKind, _Before] = {}
        """By kind, whoever asks."""
        self._on_trial = self._was_bad = False
        self.alarm = ""
        """Why the version on trial is bad for one client; empty: it is not."""

    def swapped(self, *, trusted: bool) -> None:
        """Another version proposes from now on. trusted: it was served before, so there is no trial."""
        # A bad version is rolled back now, or has been replaced by a newer one meanwhile.
        if not trusted and not self._was_bad:
            self._remember([*self._latest, *(each for each in self._open.values() if not each.is_counted)])
        self._on_trial = bool(self._before) and not trusted
        self._evidence = DomainEvidence()
        self._tallies: dict[str, _Tally] = {}
        """Of the requests that were compared, by domain."""
        self.alarm = ""
        self._heard: set[str | None] = {client for before in self._before.values() for client in before.clients}
        """Clients that have a say; None: those with few requests."""
        self._num_requests = 0
        self._was_bad = False
        self._latest.clear()
        self._open.clear()  # what they do from now on is of the new version

    def observe(
        self, *, request: str, traffic: TrafficKind, proposed: int, accepted: int, is_last: bool = False
    ) -> str | None:
        """Add one sequence's round. Returns the reason if the version on trial is bad, which ends its trial.

        proposed: first choices that the answer tells about if all before them are right; accepted: that were right, up
        to the first that was not. is_last: the request has ended.
        """
        self._num_rounds += 1
        own = self._open.setdefault(request, _Request(traffic))
        self._open.move_to_end(request)
        own.last_round = self._num_rounds
        if not own.is_counted:
            own.add(proposed=proposed, accepted=accepted)
        quiet = next(iter(self._open))
        is_quiet = self._open[quiet].last_round <= self._num_rounds - _QUIET_ROUNDS
        over = [self._open.pop(name) for name, ends in ((request, is_last), (quiet, is_quiet)) if ends]
        verdicts = [self._count(each) for each in ([own, *over] if own.num_rounds == REQUEST_ROUNDS else over)]
        return next((each for each in verdicts if each is not None), None)

    def _remember(self, requests: Iterable[_Request]) -> None:
        """The next version is compared with these."""
        by_kind: dict[TrafficKind, list[_Request]] = {}
        for each in requests:
            by_kind.setdefault(each.kind, []).append(each)
        known: dict[TrafficKind, _Before] = {}
        for traffic, older in self._before.items():
            if traffic not in by_kind and older.age < _MOST_SWAPS:
                known[traffic] = _Before(older.requests, age=older.age + 1)
        for traffic, latest in by_kind.items():
            if len(latest) < _ENOUGH_REQUESTS and traffic in self._before:
                latest = [*self._before[traffic].requests, *latest]
                _forget_beyond(_REMEMBERED_REQUESTS, latest)
            known[traffic] = _Before(latest)
        self._before = known

    def _count(self, request: _Request) -> str | None:
        """Count a request that is over, or has had its rounds; once."""
        if request.is_counted or not request.num_rounds:
            return None
        request.is_counted = True
        self._latest.append(request)
        _forget_beyond(_REMEMBERED_REQUESTS, self._latest)
        if not self._on_trial:
            return None
        self._num_requests += 1
        self._judge(request)
        if self._evidence.value < NEEDED_AGAINST:
            num_compared = sum(each.requests for each in self._tallies.values())
            is_acquitted = num_compared >= _ACQUITTAL_REQUESTS and self._evidence.value < 1
            self._on_trial = self._num_requests < TRIAL_REQUESTS and not is_acquitted
            return None
        if agreed(self._evidence.without, self._heard) < NEEDED_AGAINST:
            self.alarm = self.alarm or f"{self._loss()}, but not for several clients: it serves on"
            self._on_trial = self._num_requests < TRIAL_REQUESTS
            return None
        self._on_trial, self._was_bad = False, True
        return self._loss()

    def _loss(self) -> str:
        """What the version on trial loses, in one domain or in all together."""
        domain = self._evidence.strongest
        tallies = [self._tallies[domain]] if domain is not None else list(self._tallies.values())
        requests, choices, lead = (sum(each) for each in zip(*tallies, strict=True))
        where = f" of domain {domain!r}" if domain is not None and len(self._tallies) > 1 else ""
        return (
            f"{-lead / choices:.0%} fewer of its tokens were right than of the version before, in {requests:.0f} "
            f"requests{where}"
        )

    def _judge(self, request: _Request) -> None:
        """Compare a request with those before the swap, if there were any of its kind."""
        before = self._before.get(request.kind)
        place = before.place(request) if before is not None and before.rates else None
        if before is None or place is None:
            return
        self._heard.add(request.client)
        domain, tally = request.traffic.domain, self._tallies.get(request.traffic.domain, _Tally())
        self._tallies[domain] = _Tally(
            tally.requests + 1,
            tally.choices + sum(request.reached[: len(before.rates)]),
            tally.lead + before.lead(request) * request.num_rounds,
        )
        self._evidence.add_lead(domain, -place, client=request.client)


class _Before:
    """Requests of earlier versions, of one kind of traffic, and the places among them."""

    def __init__(self, requests: list[_Request], *, age: int = 0) -> None:
        """age: swaps since the last of the requests, after the first."""
        self.requests, self.age = requests, age
        reached, right = Counter[int](), Counter[int]()
        for each in requests:
            reached.update(dict(enumerate(each.reached)))
            right.update(dict(enumerate(each.right)))
        self.rates: list[float] = []
        """How often choices were right, by place, as far as there were enough."""
        while reached[len(self.rates)] >= _FEWEST_CHOICES:
            self.rates.append(right[len(self.rates)] / reached[len(self.rates)])
        by_client: dict[str, list[float]] = {}
        for each in requests:
            by_client.setdefault(each.client, []).append(self.lead(each))
        enough = 1 if len(by_client) == 1 else FEWEST_FOR_A_SAY
        self._leads: dict[str | None, list[float]] = {
            client: sorted(leads) for client, leads in by_client.items() if len(leads) >= enough
        }
        of_others = sorted(lead for leads in by_client.values() if len(leads) < enough for lead in leads)
        if len(of_others) >= _FEWEST_OF_OTHERS:
            self._leads[None] = of_others

    @property
    def clients(self) -> Collection[str | None]:
        """Those that have enough requests for a comparison with their own; None: the others have together."""
        return self._leads.keys()

    def lead(self, request: _Request) -> float:
        """Choices a round that were right more than expected; below 0: fewer."""
        counts = zip(request.right, request.reached, self.rates, strict=False)
        return sum(right - reached * rate for right, reached, rate in counts) / request.num_rounds

    def place(self, request: _Request) -> float | None:
        """Place among these and the requests since of its client, to which it is added; None: they are too few."""
        leads = self._leads.get(request.client, self._leads.get(None))
        if leads is None:
            return None
        lead = self.lead(request)
        place = place_among(leads, lead)
        insort(leads, lead)
        return place


def _forget_beyond(number: int, requests: list[_Request]) -> None:
    """Or one client would have others forgotten by sending many."""
    while len(requests) > number:
        requests.remove(oldest_of_busiest(requests))
