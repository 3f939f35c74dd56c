"""How soon the domain detector notices changes of real traffic, how often it errs, and how it takes templates.

    python -m benchmarks.templated_prompts --out templates --requests 400
    python -m benchmarks.shifts --prompts prompts/train/*.jsonl --templates templates/*.jsonl --cache FILE

Embeds the prompts of each file (the slow part; kept in the cache), and replays streams of requests through the
detector:

- steady traffic: each kind alone, an even mix of four kinds and of all, a skewed one, and an even one in bursts. Every
  shift is a false one.
- phases of 300 to 600 requests, A B A and A B C A, of kinds and templates in random order. A change is noticed with the
  first shift in its phase; further ones, and those in the first phase, are false.
- templates, alone and after other traffic: the number of domains that one template is told as.
- a mix in which one kind's acceptance rate falls by 40 %.

A kind's prompts are drawn in random order, all of them before any comes again. A request has 10 to 40 proposals, and
its own acceptance rate, beta-distributed around its kind's (0.35 to 0.75) with a standard deviation of 0.13; what is
accepted is binomial. So the rate of a request has a standard deviation of about 0.17.

Leaves out the detector (modules/domains/detector.py) and streams of recorded traces (`aurora-lit bench shifts`).
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aurora_lit.bench.prompts import load_prompts
from aurora_lit.bench.shifts import delays
from aurora_lit.config import load_config
from aurora_lit.errors import AuroraError
from aurora_lit.modules.domains.centroids import RECENCY, UNKNOWN, pool_prompt
from aurora_lit.modules.domains.detector import DomainDetector, Shift
from aurora_lit.request import Source
from aurora_lit.serve.worker.load_models import load_target, load_tokenizer
from aurora_lit.traces.record import Trace

_SAVE_EVERY_PROMPTS = 200
_PROPOSALS = (10, 40)
_RATES = (0.35, 0.75)
_RATE_CONCENTRATION = 14.0
"""Sum of the beta distribution's parameters."""
_STEADY_REQUESTS, _TEMPLATE_REQUESTS, _DROP_REQUESTS = 2000, 500, 1000
_PHASE_REQUESTS = (300, 600)
_BURST_REQUESTS = 5
"""Mean length of a burst; lengths are geometric."""
_DROP = 0.6
"""Factor of a rate that drops."""
_MOST_DELAY = 30
_LEAST_SHARE = 0.02
"""A template's domains are those of at least this share of its requests."""


def embed(
    paths: Sequence[Path], *, cache: Path, limit: int, max_tokens: int, overrides: Sequence[str]
) -> dict[str, Tensor]:
    """Each kind's embeddings [N, E], fp32; prompts that are in the cache already are not computed again.

    Raises AuroraError if the cache holds another mean of prompts than the detector's.
    """
    kinds: dict[str, list[Tensor]] = {}
    mean = {"recency": str(RECENCY)}
    if cache.exists():
        with safe_open(cache, framework="pt") as file:
            if file.metadata() != mean:
                raise AuroraError(f"--cache {cache} holds another mean of prompts than {mean}; delete it")
            kinds = {kind: list(file.get_tensor(kind)) for kind in file.keys()}  # noqa: SIM118  (not a dict)
    config = load_config(None, list(overrides))
    torch.set_num_threads(config.engine.threads or torch.get_num_threads())
    prompts = load_prompts(paths, limit=limit, tokenizer=load_tokenizer(config), max_prompt_tokens=max_tokens)
    to_skip = {kind: len(embedded) for kind, embedded in kinds.items()}
    target = None
    for number, prompt in enumerate(prompts, start=1):
        if to_skip.get(prompt.domain, 0):
            to_skip[prompt.domain] -= 1
            continue
        target = target or load_target(config)
        with torch.no_grad():
            aux_1T3H, _ = target.in_torch.forward_uncached(torch.tensor([prompt.token_ids]))
        mean_E = pool_prompt(aux_1T3H[0].bfloat16(), len(prompt.token_ids))
        if mean_E is not None:
            kinds.setdefault(prompt.domain, []).append(mean_E)
        if number % _SAVE_EVERY_PROMPTS == 0 or number == len(prompts):
            save_file({kind: torch.stack(embedded) for kind, embedded in kinds.items()}, cache, mean)
    return {kind: torch.stack(embedded) for kind, embedded in kinds.items()}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the detector told of one request."""

    domain: str
    shift: Shift | None


class Replay:
    """Embedded prompts, from which requests are made; see the file's docstring for their acceptance rates."""

    def __init__(self, kinds: dict[str, Tensor], *, seed: int) -> None:
        self._kinds, self._rng = kinds, np.random.default_rng(seed)
        self._order: dict[str, Iterator[int]] = {}
        rates = np.linspace(*_RATES, len(kinds))
        self._rate_of = dict(zip(sorted(kinds), self._rng.permutation(rates).tolist(), strict=True))
        self._number = 0

    def trace(self, kind: str, *, rate_factor: float = 1.0) -> Trace:
        """A request of this kind."""
        index = next(self._order.get(kind, iter(())), None)
        if index is None:
            self._order[kind] = iter(self._rng.permutation(len(self._kinds[kind])).tolist())
            index = next(self._order[kind])
        mean = self._rate_of[kind] * rate_factor
        rate = self._rng.beta(mean * _RATE_CONCENTRATION, (1 - mean) * _RATE_CONCENTRATION)
        proposed = int(self._rng.integers(*_PROPOSALS, endpoint=True))
        accepted = int(self._rng.binomial(proposed, rate))
        self._number += 1
        return Trace(
            request_id=str(self._number),
            answer_start=3,
            token_ids_T=torch.zeros(3, dtype=torch.int32),
            aux_T3H=self._kinds[kind][index].expand(3, -1),
            last_TH=torch.zeros(0, 0),
            num_proposed_R=torch.tensor([proposed], dtype=torch.int32),
            num_accepted_R=torch.tensor([accepted], dtype=torch.int32),
            source_R=torch.tensor([Source.DRAFT], dtype=torch.uint8),
            explored_R=torch.zeros(1, dtype=torch.bool),
        )


def told(
    kinds: dict[str, Tensor], stream: Sequence[str], *, seed: int, dropped: tuple[str, int] = ("", 0)
) -> list[Told]:
    """Replay a stream of kinds through a new detector.

    dropped: a kind, and the number of the request from which its acceptance rate is lower.
    """
    replay = Replay(kinds, seed=seed)
    settings = load_config(None, []).domain
    detector = DomainDetector(max_domains=settings.max_domains, novelty_threshold=settings.novelty_threshold)
    answers = []
    for number, kind in enumerate(stream):
        is_dropped = kind == dropped[0] and number >= dropped[1]
        assignment = detector.assign(replay.trace(kind, rate_factor=_DROP if is_dropped else 1.0))
        answers.append(Told(domain=assignment.domain, shift=assignment.shift))
    return answers


def steady_streams(kinds: Sequence[str], *, seed: int) -> dict[str, list[str]]:
    """One stream of each sort of steady traffic."""
    rng = random.Random(seed)
    four = rng.sample(kinds, 4)
    bursts: list[str] = []
    while len(bursts) < _STEADY_REQUESTS:
        length = 1
        while rng.random() > 1 / _BURST_REQUESTS:
            length += 1
        bursts += [rng.choice(four)] * length
    return {
        "one kind": [rng.choice(kinds)] * _STEADY_REQUESTS,
        "even mix of four": rng.choices(four, k=_STEADY_REQUESTS),
        "even mix of all": rng.choices(kinds, k=_STEADY_REQUESTS),
        "skewed mix of four": rng.choices(four, weights=(60, 25, 10, 5), k=_STEADY_REQUESTS),
        "even mix of four in bursts": bursts[:_STEADY_REQUESTS],
    }


def phases(kinds: Sequence[str], *, seed: int) -> tuple[list[str], list[int]]:
    """The kinds of a stream of phases, and the phase of each request."""
    rng = random.Random(seed)
    names = rng.sample(kinds, 2 + seed % 2)
    stream, numbers = [], []
    for number, name in enumerate([*names, names[0]]):
        length = rng.randint(*_PHASE_REQUESTS)
        stream += [name] * length
        numbers += [number] * length
    return stream, numbers


def shifts_of(answers: Sequence[Told], cause: str | None = None) -> list[int]:
    """Numbers of the requests with a shift, of one cause or of any."""
    return [n for n, told in enumerate(answers) if told.shift and cause in (None, told.shift.cause)]


def causes(answers: Sequence[Told]) -> str:
    """False shifts by cause: `2 mix, 1 acceptance`."""
    counts = Counter(told.shift.cause for told in answers if told.shift)
    return ", ".join(f"{count} {cause}" for cause, count in counts.items()) or "none"


def print_steady(kinds: dict[str, Tensor], names: Sequence[str], *, seeds: int) -> None:
    """False shifts in steady traffic."""
    answers: dict[str, list[Told]] = {}
    for seed in range(seeds):
        for sort, stream in steady_streams(names, seed=seed).items():
            answers.setdefault(sort, []).extend(told(kinds, stream, seed=seed))
    for sort, of_sort in answers.items():
        per_2000 = 2000 * len(shifts_of(of_sort)) / len(of_sort)
        print(f"{sort}, {len(of_sort)} requests: {causes(of_sort)}; {per_2000:.2f} false in 2,000", flush=True)


def print_phases(kinds: dict[str, Tensor], *, seeds: int, verbose: bool) -> None:
    """Delays and false shifts in phases."""
    waited, missed, false, requests = [], 0, 0, 0
    for seed in range(seeds):
        stream, numbers = phases(sorted(kinds), seed=seed)
        answers = told(kinds, stream, seed=seed)
        rows = delays(shifts_of(answers), numbers, [str(n) for n in range(numbers[-1] + 1)])
        of_seed = [row["delay_requests"] for row in rows[1:]]
        waited += [delay for delay in of_seed if delay is not None]
        missed += of_seed.count(None)
        false += sum(row["more_shifts"] for row in rows)
        requests += len(stream)
        if verbose:
            print(list(dict.fromkeys(stream)), of_seed, [row["more_shifts"] for row in rows], causes(answers))
    late = sum(delay >= _MOST_DELAY for delay in waited)
    print(
        f"{seeds} streams of phases, {requests} requests: {len(waited) + missed} changes, {missed} missed, "
        f"{late} after {_MOST_DELAY} requests or more; requests until noticed: median {np.median(waited):.0f}, "
        f"90 % within {np.percentile(waited, 90):.0f}, at most {max(waited)}; "
        f"{2000 * false / requests:.2f} false in 2,000",
        flush=True,
    )


def print_templates(kinds: dict[str, Tensor], templates: Sequence[str], others: Sequence[str]) -> None:
    """The domains of one template."""
    for template in templates:
        for before in ([], [others[0]], [others[1], others[2]], ["mix"]):
            rng = random.Random(0)
            earlier = [
                name if name != "mix" else rng.choice(others) for name in before for _ in range(_TEMPLATE_REQUESTS)
            ]
            alone = told(kinds, earlier + [template] * _TEMPLATE_REQUESTS, seed=0)[len(earlier) :]
            counts = Counter(each.domain for each in alone if each.domain != UNKNOWN)
            domains = sum(count >= _LEAST_SHARE * len(alone) for count in counts.values())
            unknown = sum(each.domain == UNKNOWN for each in alone) / len(alone)
            print(
                f"{template} after {' '.join(before) or 'nothing'}: domains {domains}, "
                f"unknown {unknown:.1%}, shifts {causes(alone)}",
                flush=True,
            )


def print_drops(kinds: dict[str, Tensor], names: Sequence[str], *, seeds: int) -> None:
    """Requests of a kind until a drop of its acceptance rate is noticed."""
    waited, missed, false = [], 0, 0
    for seed in range(seeds):
        rng = random.Random(seed)
        two = rng.sample(names, 2)
        stream = rng.choices(two, k=_DROP_REQUESTS + _DROP_REQUESTS // 2)
        answers = told(kinds, stream, seed=seed, dropped=(two[0], _DROP_REQUESTS))
        found = shifts_of(answers, "acceptance")
        after = [number for number in found if number >= _DROP_REQUESTS]
        false += len(found) - len(after)
        missed += not after
        waited += [stream[_DROP_REQUESTS : number + 1].count(two[0]) for number in after[:1]]
    print(
        f"{seeds} drops of a rate by {1 - _DROP:.0%}: {missed} missed; requests of that kind until noticed: median "
        f"{np.median(waited) if waited else -1:.0f}, at most {max(waited, default=-1)}; {false} false before",
        flush=True,
    )


def main() -> None:
    """Read the options and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--templates", type=Path, nargs="*", default=[], help="of benchmarks.templated_prompts")
    parser.add_argument("--cache", type=Path, required=True, help="file of embedded prompts, made or added to")
    parser.add_argument("--limit", type=int, default=160, help="prompts of each file")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer prompts are left out")
    parser.add_argument("--seeds", type=int, default=5, help="streams of each sort of steady traffic")
    parser.add_argument("--phases", type=int, default=16, help="streams of phases, and drops of acceptance")
    parser.add_argument("--verbose", action="store_true", help="print each stream of phases")
    parser.add_argument("overrides", nargs="*", help="settings, after --")
    options = parser.parse_args()
    kinds = embed(
        [*options.prompts, *options.templates],
        cache=options.cache,
        limit=options.limit,
        max_tokens=options.max_tokens,
        overrides=options.overrides,
    )
    print("prompts: " + ", ".join(f"{len(embedded)} {kind}" for kind, embedded in kinds.items()))
    templates = [path.stem for path in options.templates]
    names = [kind for kind in sorted(kinds) if kind not in templates]
    print_templates(kinds, templates, names)
    print_phases(kinds, seeds=options.phases, verbose=options.verbose)
    print_drops(kinds, names, seeds=options.phases)
    print_steady(kinds, names, seeds=options.seeds)


if __name__ == "__main__":
    main()
