"""Evidence about a draft: it has the error that it promises for equal ones, and finds others soon."""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Callable

import pytest

from aurora_lit.drafts.evidence import NEEDED_AGAINST, DomainEvidence, Evidence, agreed, place_among
from benchmarks import trials

LAWS: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda chance: chance.gauss(0.0, 1.0),
    "heavy": lambda chance: chance.choice((-1, 1)) / chance.random(),  # without a mean
    "few values": lambda chance: float(chance.choice((-1, 0, 0, 1))),
}


@pytest.mark.parametrize("law", LAWS)
def test_equal_drafts_reach_evidence_no_oftener_than_the_bound_allows_whatever_the_noise(law: str) -> None:
    chance, reached = random.Random(0), 0
    for _ in range(400):
        evidence, top = Evidence(), 0.0
        for _ in range(150):
            evidence.add([LAWS[law](chance)])
            top = max(top, evidence.value)
        reached += top >= 4
    assert 0.05 < reached / 400 < 0.25


def test_the_unit_of_changes_does_not_matter() -> None:
    chance = random.Random(1)
    changes = [chance.gauss(0.1, 1.0) for _ in range(50)]
    values = []
    for unit in (1.0, 1e-6, 1e6):
        evidence = Evidence()
        for change in changes:
            evidence.add([unit * change])
        values.append(evidence.value)
    assert values == pytest.approx([values[0]] * 3)


def test_a_place_is_as_likely_to_be_high_as_low_however_few_there_are_before() -> None:
    chance, sums = random.Random(2), [0.0] * 5
    for _ in range(3000):
        values: list[float] = []
        for count in range(5):
            value = math.exp(chance.gauss(0.0, 1.0))
            sums[count] += place_among(values, value)
            insort(values, value)
    assert max(map(abs, sums)) / 3000 < 0.05
    assert (place_among([1, 2, 3], 0), place_among([1, 2, 3], 2), place_among([1, 2, 3], 9)) == (-0.75, 0.0, 0.75)


def test_what_one_domain_of_many_loses_is_found_and_named() -> None:
    evidence, chance = DomainEvidence(), random.Random(3)
    count = 0
    while evidence.value < NEEDED_AGAINST:
        count += 1
        evidence.add_lead("bad" if count % 5 == 0 else str(count % 5), 0.9 if count % 5 == 0 else chance.uniform(-1, 1))
    assert 10 * 5 < count < 30 * 5
    assert evidence.strongest == "bad"


def test_equal_drafts_of_many_domains_share_one_error() -> None:
    chance, reached = random.Random(4), 0
    for _ in range(400):
        evidence, top = DomainEvidence(), 0.0
        for count in range(150):
            evidence.add_lead(str(count % 10), chance.uniform(-1, 1))
            top = max(top, evidence.value)
        reached += top >= 5
    assert reached / 400 < 0.2


def test_trials_are_as_sharp_as_they_are_said_to_be() -> None:
    """A part of what benchmarks/trials.py measures, in a few runs."""
    found = [
        trials.paired_trial(seed, change=change, number=number, finds_worse=worse, draw=trials.made(noise=0.08))
        for change, number, worse in ((-0.1, 20, True), (0.05, 40, False))
        for seed in range(100)
    ]
    assert sum(each is not None for each in found) >= 180
    live = [trials.live_trial(seed, change=-0.1, number=80, draw=trials.made()) for seed in range(30)]
    assert sum(each is not None for each in live) >= 22


def test_no_client_brings_more_than_a_third_of_what_clients_agree_on() -> None:
    evidence = DomainEvidence()
    for number in range(40):
        evidence.add_lead(str(number % 2), 1.0, client="hostile")
    clients: list[str | None] = ["hostile", "a", "b"]
    assert evidence.value > 1e6
    assert agreed(evidence.without, ["hostile"]) == evidence.value, "it is the only one"
    assert agreed(evidence.without, clients) == pytest.approx(1.0)
    for number in range(12):
        evidence.add_lead(str(number % 2), 0.8, client="ab"[number % 2])
    of_two = evidence.without("hostile")
    assert 1 < agreed(evidence.without, clients) == of_two**1.5 < evidence.value


def test_whatever_one_client_does_equal_drafts_reach_evidence_no_oftener_than_the_bound_allows() -> None:
    """It sees all that is known, and bets against the draft."""
    chance, reached = random.Random(5), 0
    for _ in range(400):
        evidence, top = Evidence(), 0.0
        for number in range(120):
            lead = chance.uniform(-1, 1) if number % 4 else 1.0
            evidence.add_lead(lead, client=str(number % 4))
            top = max(top, agreed(evidence.without, "0123"))
        reached += top >= 8
    assert reached / 400 < 1 / 4, "8 to the power of 2/3"


@pytest.mark.parametrize(("lead", "is_kept"), [(0.5, True), (-0.5, False)])
def test_what_speaks_for_a_draft_is_kept_where_losses_are_forgotten(lead: float, is_kept: bool) -> None:
    evidence = Evidence()
    evidence.add_lead(lead)
    before = evidence.value
    assert 0.5 < before < 2.0
    evidence.forget_losses()
    assert evidence.value == (before if is_kept else 1.0)
