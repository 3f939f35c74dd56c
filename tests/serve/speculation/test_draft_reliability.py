"""DraftReliability: what is accepted is learned by the share of a first choice, greedy and sampled apart."""

from __future__ import annotations

import random

import pytest
import torch

from aurora_lit.kernels.draft_steps import SHARE_CLASSES
from aurora_lit.serve.speculation.draft_reliability import DraftReliability


def test_a_rate_follows_what_was_accepted_at_such_shares_and_no_other_rate_does() -> None:
    reliability, rng = DraftReliability(), random.Random(1)
    before_KC = reliability.acceptance_KC.clone()
    for _ in range(4000):
        reliability.observe(sampled=True, share=rng.uniform(0.5, 0.56), accepted=rng.random() < 0.9)
    assert reliability.acceptance_KC[1, 8] == pytest.approx(0.9, abs=0.05)
    before_KC[1, 8] = reliability.acceptance_KC[1, 8]
    assert torch.equal(before_KC, reliability.acceptance_KC)


def test_a_certain_share_belongs_to_the_last_class_and_a_changed_draft_is_learned_again() -> None:
    reliability = DraftReliability()
    for accepted in (True, False):
        for _ in range(3000):
            reliability.observe(sampled=False, share=1.0, accepted=accepted)
        rate = float(reliability.acceptance_KC[0, SHARE_CLASSES - 1])
        assert rate == pytest.approx(float(accepted), abs=0.01)


def test_the_first_rates_rise_with_the_share() -> None:
    rate_KC = DraftReliability().acceptance_KC
    assert rate_KC.shape == (2, SHARE_CLASSES)
    assert (rate_KC.diff(dim=1) >= 0).all()
