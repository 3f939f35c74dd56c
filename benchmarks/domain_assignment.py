"""What assigning domains while serving costs, and how often it agrees with means over whole prompts and the learner.

    python benchmarks/domain_assignment.py --prompts FILE... --limit 40

Prints the time of pooling and of assigning at 16 domains. Then, for each order of the prompts: clusters are learned
from the first half, and the second half is assigned, both by the same kind of mean: the share of prompts without a
domain, the share whose domain's most frequent kind (the file's) is theirs, and how often the mean over the whole prompt
in which later positions weigh more gives the same name. Last, how often a request gets the name that the learner's
clusters give it, if they are published when a domain is founded and after every 32 requests. All are means over random
orders of the prompts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aurora_lit.bench.prompts import load_prompts
from aurora_lit.config import load_config
from aurora_lit.learn.online.centroid_publisher import DRIFTED_REQUESTS
from aurora_lit.modules.domains.centroids import (
    MAX_POOLED_POSITIONS,
    RECENCY,
    UNKNOWN,
    Centroids,
    DomainAssigner,
    pool_prompt,
)
from aurora_lit.modules.domains.clusters import OnlineClusters
from aurora_lit.serve.worker.load_models import load_target, load_tokenizer

SERVED, WHOLE, WITH_LAST = f"the last {MAX_POOLED_POSITIONS}", "all but the first and the last", "all but the first"
ALIKE = "all but the first and the last, alike"
FEWER = (64, 32)
_NUM_DOMAINS = 16


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """One prompt's means, by the positions that they are taken of."""

    kind: str
    """The prompt file's, or the line's."""
    num_tokens: int
    means: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the second half of the prompts was assigned by one kind of mean."""

    unknown: float
    """Share without a domain."""
    pure: float
    """Share whose kind is the most frequent of their domain; without a domain they count as wrong."""
    as_whole: float
    """Share that the means over all positions give the same name."""


def pooled(aux_TE: Tensor, kind: str) -> Pooled:
    """All means of one prompt."""
    means = {
        ALIKE: aux_TE[1:-1].float().mean(0),
        WITH_LAST: _recent_mean(aux_TE[1:]),
        WHOLE: _recent_mean(aux_TE[1:-1]),
    }
    served_E = pool_prompt(aux_TE, len(aux_TE))
    assert served_E is not None
    means[SERVED] = served_E
    for most in FEWER:
        means[f"the last {most}"] = _recent_mean(aux_TE[1:-1][-most:])
    return Pooled(kind=kind, num_tokens=len(aux_TE), means=means)


def _recent_mean(aux_PE: Tensor) -> Tensor:
    """Mean in which later positions weigh more, as in `pool_prompt`."""
    return torch.softmax(torch.arange(len(aux_PE)) / RECENCY, 0) @ aux_PE.float()


class Learning:
    """Clusters that are learned from one mean after the other."""

    def __init__(self, novelty_threshold: float) -> None:
        self.clusters = OnlineClusters(max_clusters=_NUM_DOMAINS, novelty_threshold=novelty_threshold)
        self._next = 1

    def learn(self, x_E: Tensor) -> str:
        """The name that the learner gives."""
        assignment = self.clusters.assign(x_E, new_name=f"auto-{self._next}")
        self._next += bool(assignment.founded_novelty)
        return assignment.name or UNKNOWN

    def assigner(self) -> DomainAssigner | None:
        """What would be published now."""
        centroids = self.clusters.centroids()
        return None if centroids is None else DomainAssigner(centroids, version=1)


def outcome(prompts: Sequence[Pooled], mean: str, novelty_threshold: float) -> Outcome:
    """Learn from the first half by one kind of mean, and assign the second half by the same."""
    half = len(prompts) // 2
    learning = Learning(novelty_threshold)
    for prompt in prompts[:half]:
        learning.learn(prompt.means[mean])
    assigner = learning.assigner()
    assert assigner is not None, "no domain was found; take more prompts of more kinds"
    rest = prompts[half:]
    names = [assigner.assign(prompt.means[mean]) for prompt in rest]
    kinds: dict[str, Counter[str]] = {}
    for prompt, name in zip(rest, names, strict=True):
        kinds.setdefault(name, Counter())[prompt.kind] += 1
    return Outcome(
        unknown=names.count(UNKNOWN) / len(rest),
        pure=sum(max(counts.values()) for name, counts in kinds.items() if name != UNKNOWN) / len(rest),
        as_whole=float(np.mean([assigner.assign(p.means[WHOLE]) == n for p, n in zip(rest, names, strict=True)])),
    )


def served_as_learned(prompts: Sequence[Pooled], novelty_threshold: float) -> float:
    """Share of requests whose served name is the learner's."""
    learning, assigner, founded, equal = Learning(novelty_threshold), None, 0, 0
    for number, prompt in enumerate(prompts):
        x_E = prompt.means[SERVED]
        served = UNKNOWN if assigner is None else assigner.assign(x_E)
        equal += served == learning.learn(x_E)
        if learning.clusters.num_founded != founded or number % DRIFTED_REQUESTS == 0:
            founded, assigner = learning.clusters.num_founded, learning.assigner()
    return equal / len(prompts)


def times_us(function: Callable[[int], object], *, calls: int = 3000) -> str:
    """Median and 99th percentile of the time of a call."""
    seconds = []
    for number in range(calls):
        began = time.perf_counter()
        function(number)
        seconds.append(time.perf_counter() - began)
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e6
    return f"{p50:.0f} µs, p99 {p99:.0f} µs"


def print_times(size: int, dtype: torch.dtype) -> None:
    """Times with states of random numbers in eight slots."""
    aux_STE = torch.randn(8, 2048, size).to(dtype)
    centroids = Centroids(
        names=tuple(f"auto-{number}" for number in range(_NUM_DOMAINS)),
        centroid_DE=torch.randn(_NUM_DOMAINS, size),
        mean_E=torch.zeros(size),
        variance_E=torch.ones(size),
        common=0.0,
        novelty_threshold=0.75,
    )
    assigner, x_E = DomainAssigner(centroids, version=1), torch.randn(size)
    print(f"assign, {_NUM_DOMAINS} domains, {size} dimensions: {times_us(lambda _: assigner.assign(x_E))}")
    for length in (66, 258, 1000):
        print(f"pool {length} tokens, {dtype}: {times_us(lambda n: pool_prompt(aux_STE[n % 8], length))}")  # noqa: B023
    print(f"mean of 1000 tokens: {times_us(lambda n: aux_STE[n % 8, 1:1000].float().mean(0), calls=300)}")


def main() -> None:
    """Read the options and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=40, help="prompts of each file")
    parser.add_argument("--orders", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="settings, after --")
    options = parser.parse_args()
    config = load_config(None, options.overrides)
    torch.set_num_threads(config.engine.threads or torch.get_num_threads())
    target = load_target(config)
    encoded = load_prompts(
        options.prompts,
        limit=options.limit,
        tokenizer=load_tokenizer(config),
        max_prompt_tokens=config.engine.max_seq_len - 1,
    )
    with torch.no_grad():
        print_times(3 * target.hidden_size, target.kv_dtype)
        prompts = [
            pooled(target.in_torch.forward_uncached(torch.tensor([prompt.token_ids]))[0][0].bfloat16(), prompt.domain)
            for prompt in encoded
        ]
    lengths = sorted(prompt.num_tokens for prompt in prompts)
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}")
    orders = [random.Random(seed).sample(prompts, len(prompts)) for seed in range(options.orders)]
    threshold = config.domain.novelty_threshold
    for mean in prompts[0].means:
        outcomes = [outcome(order, mean, threshold) for order in orders]
        shares = {field: float(np.mean([getattr(each, field) for each in outcomes])) for field in vars(outcomes[0])}
        print(f"{mean}: " + ", ".join(f"{field} {share:.3f}" for field, share in shares.items()))
    print(f"served as learned: {np.mean([served_as_learned(order, threshold) for order in orders]):.3f}")


if __name__ == "__main__":
    main()
