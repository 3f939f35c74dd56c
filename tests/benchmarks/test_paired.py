"""Pairs of measurements: their mean ratio and its interval, and percentiles of pauses."""

from __future__ import annotations

import math

import pytest

from benchmarks.paired import _p99_ms, interval


def test_the_interval_of_two_ratios_is_that_of_students_t() -> None:
    mean, low, high = interval([math.exp(0.1), math.exp(0.3)])
    half = 12.706 * math.sqrt(0.02) / math.sqrt(2)
    assert (mean, low, high) == pytest.approx((math.exp(0.2), math.exp(0.2 - half), math.exp(0.2 + half)), rel=1e-4)


def test_one_ratio_has_no_interval() -> None:
    mean, low, high = interval([1.25])
    assert mean == pytest.approx(1.25)
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_percentile_of_pauses_is_not_beyond_the_longest() -> None:
    assert _p99_ms([0.01] * 49 + [0.1]) == pytest.approx(55.9)
    assert _p99_ms([0.03]) == pytest.approx(30)
    assert _p99_ms([]) is None
