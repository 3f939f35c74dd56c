"""How often trials of drafts decide wrongly, and how soon rightly: made requests, real statistics.

    python benchmarks/trials.py --runs 2000
    python benchmarks/trials.py --runs 2000 --clients 7 --hostile 0.5     # live only, beside a hostile client

Requests differ: each has its own rate at which the draft's first choices are right, and rounds are drawn with it. The
new draft changes the accepted length of every request by the same share, and of each request by noise with heavy tails
(Student's t with 4 degrees of freedom, as a share of the accepted length). Three domains, one of which is rare.

    live: after a swap, unpaired, through LiveWatch. back: rolled back within so many requests. A hostile client's share
          of the requests is right in all first choices before the swap, and in none after it
    pairs: the gate's evidence, from scores of both drafts. out: enough for the gate at heat 0. back: as much against
           the draft as rolls one back in live traffic

Nothing is measured on a machine, and no noise is a recorded one: figures depend only on the seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from aurora_lit.drafts.evidence import NEEDED_AGAINST, Evidence
from aurora_lit.drafts.live_watch import REQUEST_ROUNDS, TRIAL_REQUESTS, LiveWatch, TrafficKind
from aurora_lit.learn.online.trial import NEEDED_TO_PASS

CHAIN = 4
"""First choices a round."""
DOMAINS = {"code": (5, 2.6), "chat": (4, 2.0), "mails": (1, 2.3)}
"""Share of the requests, and mean accepted length in tokens a round."""
HOSTILE = "hostile"
PAIRED_NOISE, SPREAD = 0.06, 0.15
"""Standard deviations as shares of the accepted length: of a request's change, and of requests of a domain."""


def heavy_tailed(chance: random.Random) -> float:
    """A draw of variance 1."""
    degrees = 4
    return chance.gauss(0.0, 1.0) / math.sqrt(chance.gammavariate(degrees / 2, 2 / degrees)) / math.sqrt(2.0)


def rate_for(length: float) -> float:
    """At which first choices of a chain are right, so that a round brings so many tokens, bonus token included."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(CHAIN + 1)) < length else (low, middle)
    return low


RATES = [rate_for(1 + i / 100) for i in range(100 * CHAIN + 1)]


def lengths(chance: random.Random, *, spread: float) -> Iterator[tuple[str, float]]:
    """Domain and accepted length of one request after another."""
    names, weights = list(DOMAINS), [share for share, _ in DOMAINS.values()]
    while True:
        (domain,) = chance.choices(names, weights)
        yield domain, DOMAINS[domain][1] * (1 + spread * heavy_tailed(chance))


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Who asks: so many honest clients, by turns at random."""

    honest: int = 1
    hostile: float = 0.0
    """Share of requests of one more client, whose text is easy before the swap and hard after it."""

    def draw(self, chance: random.Random) -> str:
        """Who sends the next request."""
        if self.hostile and chance.random() < self.hostile:
            return HOSTILE
        return str(chance.randrange(self.honest) if self.honest > 1 else 0)


ALONE = Clients()


def serve(
    watch: LiveWatch,
    chance: random.Random,
    *,
    number: int,
    change: float = 0.0,
    spread: float = SPREAD,
    clients: Clients = ALONE,
    hostile_length: float = 0.0,
) -> int | None:
    """Serve so many requests; returns after how many the version was called bad, or None.

    hostile_length: accepted length of all that the hostile client sends.
    """
    names = itertools.count()
    for count, (domain, length) in enumerate(itertools.islice(lengths(chance, spread=spread), number), 1):
        client = clients.draw(chance)
        length = hostile_length if client == HOSTILE else length * (1 + change)
        rate = RATES[max(0, min(len(RATES) - 1, round(100 * (length - 1))))]
        num_rounds, name = chance.randint(4, 2 * REQUEST_ROUNDS), f"{next(names)}"
        for round_number in range(num_rounds):
            accepted = next((i for i in range(CHAIN) if chance.random() >= rate), CHAIN)
            verdict = watch.observe(
                request=name,
                traffic=TrafficKind(domain, client=client),
                proposed=CHAIN,
                accepted=accepted,
                is_last=round_number + 1 == num_rounds,
            )
            if verdict is not None:
                return count
    return None


def live_trial(
    seed: int, *, change: float, number: int, before: int = 256, spread: float = SPREAD, clients: Clients = ALONE
) -> int | None:
    """One trial after a swap, of a draft whose accepted length differs by this share."""
    chance, watch = random.Random(seed), LiveWatch()
    serve(watch, chance, number=before, spread=spread, clients=clients, hostile_length=CHAIN)
    watch.swapped(trusted=False)
    return serve(watch, chance, number=number, change=change, spread=spread, clients=clients, hostile_length=1.0)


def paired_trial(seed: int, *, change: float, number: int, finds_worse: bool, noise: float) -> int | None:
    """Requests until the gate's evidence suffices; None if it does not."""
    chance, evidence = random.Random(seed), Evidence()
    for count, (_, length) in enumerate(itertools.islice(lengths(chance, spread=SPREAD), number), 1):
        lead = length * (change + noise * heavy_tailed(chance))
        evidence.add([-lead if finds_worse else lead])
        if evidence.value >= (NEEDED_AGAINST if finds_worse else NEEDED_TO_PASS):
            return count
    return None


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=1, help="honest ones (default: %(default)s)")
    parser.add_argument("--hostile", type=float, default=0.0, help="share of a hostile client's requests")
    options = parser.parse_args()
    clients = Clients(honest=options.clients, hostile=options.hostile)

    def share(found: Iterator[int | None]) -> str:
        return f"{sum(each is not None for each in found) / options.runs:7.2%}"

    seeds = range(options.runs)
    for spread in (SPREAD, 0.25):
        for change, number in ((0.0, TRIAL_REQUESTS), (-0.1, 80)):
            back = share(
                live_trial(seed, change=change, number=number, spread=spread, clients=clients) for seed in seeds
            )
            print(f"live, requests differ by {spread:.0%}: {change:+.0%} back within {number:3}: {back}", flush=True)
    if clients != ALONE:
        return
    for noise in (PAIRED_NOISE, 0.08, 0.1, 0.125):
        for change, number, finds_worse in ((0.0, TRIAL_REQUESTS, True), (-0.1, 20, True), (0.05, 40, False)):
            found = share(
                paired_trial(seed, change=change, number=number, finds_worse=finds_worse, noise=noise) for seed in seeds
            )
            word = "back" if finds_worse else "out"
            print(f"pairs, change's noise {noise:.1%}: {change:+.0%} {word} within {number:3}: {found}", flush=True)


if __name__ == "__main__":
    main()
