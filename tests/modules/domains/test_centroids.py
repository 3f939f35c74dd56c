"""Assigning by the clusters of one moment gives what the learner's clusters would give, and never changes."""

from __future__ import annotations

import copy
import random
from functools import cache

import torch
from support.domain_prompts import KINDS, PromptMaker
from torch import Tensor

from aurora_lit.modules.domains.centroids import UNKNOWN, Centroids, DomainAssigner, client_label
from aurora_lit.modules.domains.clusters import WARMUP_REQUESTS
from aurora_lit.modules.domains.detector import DomainDetector, prompt_embedding


@cache
def _trained(label: str) -> tuple[DomainDetector, PromptMaker]:
    rng, prompts = random.Random(0), PromptMaker()
    detector = DomainDetector(max_domains=8, novelty_threshold=0.7)
    for _ in range(200):
        kind = rng.choice(KINDS)
        detector.assign(prompts.trace(kind, label=label if kind == "sql" else ""))
    return detector, prompts


def trained_detector(*, label: str = "") -> tuple[DomainDetector, PromptMaker]:
    return copy.deepcopy(_trained(label))


def assigner_of(detector: DomainDetector) -> DomainAssigner:
    centroids = detector.centroids()
    assert centroids is not None
    return DomainAssigner(centroids, version=1)


def embedding(prompts: PromptMaker, kind: str) -> Tensor:
    x_E = prompt_embedding(prompts.trace(kind))
    assert x_E is not None
    return x_E


def reference(centroids: Centroids, x_E: Tensor) -> str:
    """The definition: cosine distance after standardising every dimension and adding what all have in common."""
    deviation_E = (centroids.variance_E + 1e-8).sqrt().double()
    z_E, z_DE = ((x - centroids.mean_E).double() / deviation_E for x in (x_E, centroids.centroid_DE))
    length_D = ((z_DE.square().sum(1) + centroids.common) * (z_E.square().sum() + centroids.common)).sqrt()
    distance_D = 1 - (z_DE @ z_E + centroids.common) / length_D
    nearest = int(distance_D.argmin())
    return centroids.names[nearest] if distance_D[nearest] <= centroids.novelty_threshold else UNKNOWN


def test_a_domain_is_the_nearest_centroid_within_the_threshold() -> None:
    detector, prompts = trained_detector()
    centroids = detector.centroids()
    assert centroids is not None
    assigner = assigner_of(detector)
    between = [0.5 * embedding(prompts, KINDS[n % 4]) + 0.5 * embedding(prompts, KINDS[n % 3]) for n in range(100)]
    outliers = [centroids.mean_E + centroids.variance_E.sqrt() * torch.randn(96) for _ in range(50)]
    cases = [embedding(prompts, KINDS[n % 4]) for n in range(100)] + between + outliers
    found = [assigner.assign(x_E) for x_E in cases]
    assert found == [reference(centroids, x_E) for x_E in cases]
    assert set(found) == {UNKNOWN, *centroids.names}, "the cases meet every outcome"


def test_requests_get_the_names_that_the_learner_gives_them() -> None:
    detector, prompts = trained_detector(label="mine")
    assigner = assigner_of(detector)
    traces = [prompts.trace(KINDS[n % 4]) for n in range(200)]
    served = [assigner.assign(x_E) for trace in traces if (x_E := prompt_embedding(trace)) is not None]
    learned = [detector.assign(trace).domain for trace in traces]
    agreeing = sum(one == other for one, other in zip(served, learned, strict=True))
    assert agreeing >= 0.97 * len(traces)
    assert "mine" in served, "a request without a label may be like those with one"


def test_learning_on_changes_no_assigner() -> None:
    detector, prompts = trained_detector()
    assigner = assigner_of(detector)
    cases = [embedding(prompts, KINDS[n % 4]) for n in range(50)]
    before = [assigner.assign(x_E) for x_E in cases]
    for _ in range(200):
        detector.assign(prompts.trace("chatty"))
    assert [assigner.assign(x_E) for x_E in cases] == before


def test_there_are_no_centroids_during_the_warm_up_and_without_clusters() -> None:
    detector, prompts = DomainDetector(max_domains=8, novelty_threshold=0.7), PromptMaker()
    for _ in range(WARMUP_REQUESTS - 1):
        detector.assign(prompts.trace("code", label="mine"))
    assert detector.centroids() is None, "the statistics must be learned first"
    detector.assign(prompts.trace("code", label="mine"))
    centroids = detector.centroids()
    assert centroids is not None
    assert centroids.names == ("mine",)
    empty = DomainDetector(max_domains=8, novelty_threshold=0.7)
    for _ in range(40):
        empty.assign(prompts.trace("code"))
    assert empty.centroids() is None


def test_an_embedding_at_the_mean_is_an_outlier_and_so_is_one_without_length() -> None:
    """The latter as one more of prompts that were all equal."""
    centroids = trained_detector()[0].centroids()
    assert centroids is not None
    assert DomainAssigner(centroids, version=1).assign(centroids.mean_E.clone()) == UNKNOWN
    mean_E = torch.ones(6)
    same = Centroids(
        names=("a",),
        centroid_DE=mean_E[None],
        mean_E=mean_E,
        variance_E=torch.full((6,), 1 - 1e-8),
        common=0.0,
        novelty_threshold=0.7,
    )
    assert DomainAssigner(same, version=1).assign(mean_E) == UNKNOWN


def test_a_label_with_the_reserved_prefix_is_none() -> None:
    assert [client_label(label) for label in ("code", "auto-1", "")] == ["code", "", ""]
