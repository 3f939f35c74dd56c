"""CopyReliability: rates follow what was verified, and start as measured."""

from __future__ import annotations

import random

import pytest
import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import COUNT_CLASSES, KINDS, LENGTH_CLASSES, SHARE_CLASSES


def test_rates_follow_what_was_verified_in_their_cell_alone() -> None:
    reliability = CopyReliability()
    table = reliability.table(sampled=False)
    before = reliability.rate_RC.clone()
    for _ in range(300):
        reliability.observe(table, 5, accepted=False)
    assert reliability.rate(table, 5) < 0.02
    before[table, 5] = reliability.rate(table, 5)
    assert torch.equal(reliability.rate_RC, before)
    for _ in range(2000):
        reliability.observe(table, 5, accepted=True)
    assert reliability.rate(table, 5) > 0.98
    assert reliability.trials_RC[table, 5] == 2300


def test_a_rate_is_the_mean_of_the_latest_nodes() -> None:
    reliability, rng = CopyReliability(), random.Random(0)
    for _ in range(2000):
        reliability.observe(3, 7, accepted=rng.random() < 0.3)
    assert reliability.rate(3, 7) == pytest.approx(0.3, abs=0.12)  # four standard errors of 200


def test_longer_agreement_and_larger_shares_promise_more_at_first() -> None:
    reliability = CopyReliability()
    shape = (len(KINDS), len(LENGTH_CLASSES), len(SHARE_CLASSES), len(COUNT_CLASSES))
    rates = reliability.rate_RC.view(-1, *shape)
    assert (rates.diff(dim=2) > 0).all()
    assert (rates.diff(dim=3) > 0).all()
    against = reliability.rate_RC[reliability.table(sampled=False, relation="against")]
    assert (against < reliability.rate_RC[reliability.table(sampled=False)]).all()
