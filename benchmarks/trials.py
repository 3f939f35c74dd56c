"""How often trials of drafts decide wrongly, and how soon rightly: made or recorded requests, real statistics.

    python -m benchmarks.trials --runs 2000
    python -m benchmarks.trials --runs 2000 --clients 7 --hostile 0.5     # live only, beside a hostile client
    python -m benchmarks.trials --runs 2000 --recorded ablation/traffic --config qwen2.5-coder-0.5b --learned DRAFT

Requests differ: each has its own rate at which the draft's first choices are right, and rounds are drawn with it. The
new draft changes the accepted length of every request by the same share, and of each request by noise with heavy tails
(Student's t with 4 degrees of freedom, as a share of the accepted length). Three domains, one of which is rare.

    live: after a swap, unpaired, through LiveWatch. back: rolled back within so many requests. A hostile client's share
          of the requests is right in all first choices before the swap, and in none after it
    pairs: the gate's evidence, from scores of both drafts. out: enough for the gate at heat 0. back: as much against
           the draft as rolls one back in live traffic

With --recorded, requests are drawn with replacement from those of a folder of traces, whose scores with the shipped
draft are their accepted lengths. Their changes with --learned, less the mean change, are the noise of changes. Nothing
is measured on a machine: figures depend only on the seed and on what was recorded.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.drafts.evidence import NEEDED_AGAINST, Evidence
from aurora_lit.drafts.live_watch import REQUEST_ROUNDS, TRIAL_REQUESTS, LiveWatch, TrafficKind
from aurora_lit.learn.offline.loop import read_traces
from aurora_lit.learn.online.build import load_head_and_draft, online_module
from aurora_lit.learn.online.scores import TRIAL_POSITIONS, HeldOutRequest, score_requests
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


class Drawn(NamedTuple):
    """A request."""

    domain: str
    length: float
    """Its accepted length with the draft before, in tokens a round."""
    noise: float
    """Of its change with another draft, as a share of the length."""


Draw = Callable[[random.Random], Drawn]


def made(*, spread: float = SPREAD, noise: float = PAIRED_NOISE) -> Draw:
    """Requests of three domains, with heavy tails; `spread`, `noise`: standard deviations as shares of the length."""
    names, weights = list(DOMAINS), [share for share, _ in DOMAINS.values()]

    def draw(chance: random.Random) -> Drawn:
        (domain,) = chance.choices(names, weights)
        length = DOMAINS[domain][1] * (1 + spread * heavy_tailed(chance))
        return Drawn(domain, length, noise * heavy_tailed(chance))

    return draw


def recorded(folder: Path, *, config: AuroraConfig, learned: Path) -> list[Drawn]:
    """The requests of a folder of traces, scored as trials score them, with the shipped draft and a learned one."""
    target_head, starting = load_head_and_draft(config)
    requests: dict[str, HeldOutRequest] = {}
    for trace in read_traces(folder):
        name = trace.request_id
        request = requests.setdefault(name, HeldOutRequest(request_id=name, domain=trace.domain, client=trace.client))
        request.traces.append(trace)
    before, after = (
        {
            request.request_id: score
            for request, score in score_requests(
                online_module(config, draft, target_head),
                list(requests.values()),
                batch_positions=TRIAL_POSITIONS,
                between_batches=lambda: None,
            )
        }
        for draft in (starting, load_draft(learned, target_head))
    )
    changes = {name: after[name] / length - 1 for name, length in before.items()}
    mean = fmean(changes.values())
    return [Drawn(requests[name].domain, length, changes[name] - mean) for name, length in before.items()]


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
    draw: Draw,
    change: float = 0.0,
    clients: Clients = ALONE,
    hostile_length: float = 0.0,
) -> int | None:
    """Serve so many requests; returns after how many the version was called bad, or None.

    hostile_length: accepted length of all that the hostile client sends.
    """
    names = itertools.count()
    for count in range(1, number + 1):
        domain, length, _ = draw(chance)
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
    seed: int, *, change: float, number: int, draw: Draw, before: int = 256, clients: Clients = ALONE
) -> int | None:
    """One trial after a swap, of a draft whose accepted length differs by this share."""
    chance, watch = random.Random(seed), LiveWatch()
    serve(watch, chance, number=before, draw=draw, clients=clients, hostile_length=CHAIN)
    watch.swapped(trusted=False)
    return serve(watch, chance, number=number, change=change, draw=draw, clients=clients, hostile_length=1.0)


def paired_trial(seed: int, *, change: float, number: int, finds_worse: bool, draw: Draw) -> int | None:
    """Requests until the gate's evidence suffices; None if it does not."""
    chance, evidence = random.Random(seed), Evidence()
    for count in range(1, number + 1):
        _, length, noise = draw(chance)
        lead = length * (change + noise)
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
    parser.add_argument("--recorded", type=Path, metavar="FOLDER", help="draw requests from these traces")
    parser.add_argument("--config", type=Path, help="of --recorded: a preset's name or a YAML file")
    parser.add_argument("--learned", type=Path, metavar="DRAFT", help="of --recorded: folder of a learned draft")
    options = parser.parse_args()
    clients = Clients(honest=options.clients, hostile=options.hostile)
    live = {f"requests differ by {spread:.0%}": made(spread=spread) for spread in (SPREAD, 0.25)}
    pairs = {f"change's noise {noise:.1%}": made(noise=noise) for noise in (PAIRED_NOISE, 0.08, 0.1, 0.125)}
    if options.recorded is not None:
        rows = recorded(options.recorded, config=load_config(options.config, []), learned=options.learned)
        spread, noise = (
            stdev(row.length for row in rows) / fmean(row.length for row in rows),
            stdev(row.noise for row in rows),
        )
        name = f"{len(rows)} recorded requests, which differ by {spread:.0%}, changes by {noise:.1%}"
        live = pairs = {name: partial(random.Random.choice, seq=rows)}

    def share(found: Iterator[int | None]) -> str:
        return f"{sum(each is not None for each in found) / options.runs:7.2%}"

    seeds = range(options.runs)
    for name, draw in live.items():
        for change, number in ((0.0, TRIAL_REQUESTS), (-0.1, 80)):
            back = share(live_trial(seed, change=change, number=number, draw=draw, clients=clients) for seed in seeds)
            print(f"live, {name}: {change:+.0%} back within {number:3}: {back}", flush=True)
    if clients != ALONE:
        return
    for name, draw in pairs.items():
        for change, number, finds_worse in ((0.0, TRIAL_REQUESTS, True), (-0.1, 20, True), (0.05, 40, False)):
            found = share(
                paired_trial(seed, change=change, number=number, finds_worse=finds_worse, draw=draw) for seed in seeds
            )
            word = "back" if finds_worse else "out"
            print(f"pairs, {name}: {change:+.0%} {word} within {number:3}: {found}", flush=True)


if __name__ == "__main__":
    main()
