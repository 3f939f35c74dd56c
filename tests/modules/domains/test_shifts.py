"""The statistical tests behind shifts: on the mix of domains, and on acceptance; and that they can be saved."""

from __future__ import annotations

import random

import pytest

from aurora_lit.modules.domains.shifts import (
    MEAN_REQUESTS_BETWEEN_FALSE_ALARMS,
    AcceptanceDropDetector,
    MixShiftDetector,
    change_evidence,
    cusum_threshold,
)

# -- the mix -------------------------------------------------------------------------------------------------------


def calls(domains: list[str]) -> list[tuple[int, str]]:
    """The requests at which a new detector tells a shift, and the domain that grew."""
    detector, found = MixShiftDetector(), []
    for number, domain in enumerate(domains):
        detector.add(domain)
        if detector.has_changed:
            found.append((number, detector.start_anew()))
    return found


def mix(number: int, shares: dict[str, float], *, burst: float = 1.0, seed: int = 0) -> list[str]:
    """Requests in bursts of this mean length, which is geometric."""
    rng, domains = random.Random(seed), []
    while len(domains) < number:
        domains += rng.choices(list(shares), weights=list(shares.values()))
        while rng.random() > 1 / burst:
            domains.append(domains[-1])
    return domains[:number]


EVEN, SKEWED = dict.fromkeys("abcd", 1.0), {"a": 60.0, "b": 25.0, "c": 10.0, "d": 5.0}


@pytest.mark.parametrize("shares", [EVEN, SKEWED, {"a": 1.0}], ids=["even", "skewed", "one"])
def test_a_steady_mix_is_quiet(shares: dict[str, float]) -> None:
    assert [calls(mix(800, shares, seed=seed)) for seed in range(2)] == [[], []]


def test_bursts_are_no_change_of_the_mix() -> None:
    found = [call for seed in range(3) for call in calls(mix(700, EVEN, burst=5, seed=seed))]
    assert len(found) <= 1, "one in 2,000 requests"


@pytest.mark.parametrize(("shares", "most"), [({"a": 1.0}, 8), (EVEN, 8), (SKEWED, 8)])
def test_a_new_domain_is_noticed_within_a_few_requests(shares: dict[str, float], most: int) -> None:
    ((number, grown),) = calls(mix(300, shares) + ["new"] * 100)
    assert 300 <= number < 300 + most
    assert grown == "new"


def test_a_known_domain_that_becomes_the_only_one_is_noticed_later() -> None:
    ((number, grown),) = calls(mix(300, EVEN) + ["b"] * 100)
    assert 305 < number < 330
    assert grown == "b"


def test_the_change_is_told_to_begin_where_it_began() -> None:
    evidence, first = change_evidence(["a"] * 200 + ["b"] * 9)
    assert (evidence > 9, first) == (True, 200)


def test_evidence_needs_a_mix_before_and_forgets_what_is_old() -> None:
    assert calls(["a"] * 20 + ["b"] * 30) == []
    detector = MixShiftDetector()
    for domain in mix(2000, EVEN):
        detector.add(domain)
    assert len(detector.domains) <= 256


# -- acceptance ----------------------------------------------------------------------------------------------------


def rates(number: int, mean: float, *, seed: int) -> list[float]:
    """Accepted / proposed of requests with 10 to 40 proposals, each with a rate of its own."""
    rng = random.Random(seed)

    def rate() -> float:
        own, proposed = rng.betavariate(14 * mean, 14 * (1 - mean)), rng.randint(10, 40)
        return sum(rng.random() < own for _ in range(proposed)) / proposed

    return [rate() for _ in range(number)]


def test_noise_of_few_proposals_is_no_drop_and_a_fall_by_a_third_is_one() -> None:
    false, waited = 0, []
    for seed in range(4):
        detector = AcceptanceDropDetector()
        false += sum(detector.update(rate) > 0 for rate in rates(1500, 0.6, seed=seed))
        drops = [detector.update(rate) for rate in rates(100, 0.4, seed=100 + seed)]
        waited.append(next(number for number, drop in enumerate(drops) if drop))
    assert false <= 2, "one in 30,000 is expected"
    assert max(waited) <= 35


def test_the_threshold_gives_the_stated_rate_of_false_alarms() -> None:
    rng, total, crossed, threshold = random.Random(0), 0.0, 0, cusum_threshold(200, 0.5)
    for _ in range(60_000):
        total = max(0.0, total + rng.gauss(0, 1) - 0.5)
        if total > threshold:
            total, crossed = 0.0, crossed + 1
    assert 60_000 / crossed == pytest.approx(200, rel=0.2)
    assert cusum_threshold(MEAN_REQUESTS_BETWEEN_FALSE_ALARMS, 0.5) > 2 * threshold * 0.8


def test_a_restored_test_goes_on_as_if_it_had_not_stopped() -> None:
    first, again = AcceptanceDropDetector(), AcceptanceDropDetector()
    for rate in rates(200, 0.6, seed=0) + rates(4, 0.4, seed=1):
        assert not first.update(rate)
    again.load_state_dict(first.state_dict())
    rest = rates(40, 0.4, seed=2)
    drops = [first.update(rate) for rate in rest]
    assert drops == [again.update(rate) for rate in rest]
    assert any(drops)
