"""Our Page–Hinkley test takes the decisions of river's."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
from river.drift import PageHinkley as RiverPageHinkley

from aurora_lit.modules.domains.page_hinkley import PageHinkley


@pytest.mark.parametrize("mode", ["up", "down"])
@pytest.mark.parametrize("alpha", [1.0, 0.9999, 0.9])
def test_it_detects_what_river_detects_at_the_same_values(mode: Literal["up", "down"], alpha: float) -> None:
    rng = random.Random(f"{mode} {alpha}")
    settings: Any = {"delta": 0.05, "threshold": 1.5, "min_instances": 16, "alpha": alpha, "mode": mode}
    ours, theirs = PageHinkley(**settings), RiverPageHinkley(**settings)
    detected = []
    for number in range(5000):
        value = rng.gauss(2.0 * (number // 300 % 3), 0.2)
        theirs.update(value)  # type: ignore[arg-type]
        detected.append(ours.update(value))
        assert detected[-1] == ours.drift_detected == theirs.drift_detected, number
    assert sum(detected) > 5, "the series has changes to detect"
