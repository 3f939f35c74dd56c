"""The statistical tests behind shifts: on the mix of domains, and on acceptance; and that they can be saved."""

from __future__ import annotations

import random

from aurora_lit.modules.domains.shifts import AcceptanceDropDetector, MixShiftDetector, PageHinkleyTest


def test_a_shift_of_the_mix_names_the_domain_that_grew_and_ignores_order() -> None:
    detector = MixShiftDetector()
    calm = [detector.update(("a", "b")[n % 2], num_domains=3) for n in range(200)]
    calm += [detector.update(("a", "b")[n // 3 % 2], num_domains=3) for n in range(200)]
    assert calm == [None] * 400
    assert [grown for _ in range(40) if (grown := detector.update("b", num_domains=3))] == ["b"]


def test_state_stays_small_however_long_traffic_runs() -> None:
    test, acceptance = PageHinkleyTest(mode="up", tolerance=0.3, threshold=6.0), AcceptanceDropDetector()
    for n in range(2000):
        test.update(n % 2)
        acceptance.update(n % 2)
    assert max(len(test.values), len(acceptance.state_dict()["values"])) <= 512


def test_a_test_is_restored_from_its_values() -> None:
    first = PageHinkleyTest(mode="up", tolerance=0.1, threshold=3.0)
    rng = random.Random(1)
    for _ in range(700):
        first.update(rng.random())
    again = PageHinkleyTest(mode="up", tolerance=0.1, threshold=3.0)
    again.restore(first.values)
    rest = [rng.random() + (n > 50) for n in range(100)]
    detected = [first.update(value) for value in rest]
    assert detected == [again.update(value) for value in rest]
    assert any(detected)
