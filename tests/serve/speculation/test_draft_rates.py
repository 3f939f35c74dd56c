"""DraftRates: what is accepted is learned by the share of a first choice, greedy and sampled apart, and by sequence."""

from __future__ import annotations

import random

import pytest
import torch

from aurora_lit.kernels.draft_steps import SHARE_CLASSES
from aurora_lit.request import Request, SamplingParams, Source
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.draft_rates import DraftRates


def test_a_rate_follows_what_was_accepted_at_such_shares_and_no_other_rate_does() -> None:
    rates, rng = DraftRates(), random.Random(1)
    before_KC = rates.acceptance_KC.clone()
    for _ in range(4000):
        rates._add_share(rng.uniform(0.5, 0.56), rng.random() < 0.9, sampled=True)
    assert rates.acceptance_KC[1, 8] == pytest.approx(0.9, abs=0.05)
    before_KC[1, 8] = rates.acceptance_KC[1, 8]
    assert torch.equal(before_KC, rates.acceptance_KC)


def test_a_certain_share_belongs_to_the_last_class_and_a_changed_draft_is_learned_again() -> None:
    rates = DraftRates()
    for accepted in (True, False):
        for _ in range(3000):
            rates._add_share(1.0, accepted, sampled=False)
        rate = float(rates.acceptance_KC[0, SHARE_CLASSES - 1])
        assert rate == pytest.approx(float(accepted), abs=0.01)


def test_the_first_rates_rise_with_the_share() -> None:
    rate_KC = DraftRates().acceptance_KC
    assert rate_KC.shape == (2, SHARE_CLASSES)
    assert (rate_KC.diff(dim=1) >= 0).all()


def sequence() -> RunningSequence:
    request = Request(request_id="a", prompt_ids=(1, 2), params=SamplingParams(temperature=0.0))
    return RunningSequence(request=request, slot=0, prompt_length=2, length=2)


def observe(rates: DraftRates, of: RunningSequence, *, accepted: int, rounds: int) -> None:
    chain = Proposal(tokens=[5, 6, 7, 8], source=Source.DRAFT, num_drafted=4)
    for _ in range(rounds):
        rates.observe(of, chain, path=list(range(accepted + 1)), finished=False)


def test_a_sequence_has_its_own_rate_and_a_new_one_that_of_all() -> None:
    rates, easy, hard = DraftRates(), sequence(), sequence()
    for _ in range(100):
        observe(rates, easy, accepted=4, rounds=1)
        observe(rates, hard, accepted=0, rounds=1)
    mean = rates.mean_rate(sampled=False)
    assert mean == pytest.approx(0.8, abs=0.05), "four of five tokens whose outcome is known"
    assert rates.rate_of(sequence()) == pytest.approx(mean)
    assert rates.rate_of(easy) > 0.87
    assert rates.rate_of(hard) < 0.45
    assert rates.mean_rate(sampled=True) == 0.5


def test_what_a_request_cut_off_says_nothing() -> None:
    """Its last round accepts two tokens and ends; whether the third was right is not known."""
    rates, ends = DraftRates(), sequence()
    rates.observe(ends, Proposal(tokens=[5, 6, 7], source=Source.DRAFT, num_drafted=3), path=[0, 1, 2], finished=True)
    assert (ends.verified_drafts.accepted, ends.verified_drafts.proposed) == pytest.approx((1.95, 1.95))


def test_a_new_draft_is_not_blamed_for_the_last_one_and_keeps_its_praise() -> None:
    rates, good, bad = DraftRates(), sequence(), sequence()
    observe(rates, bad, accepted=0, rounds=300)
    observe(rates, good, accepted=4, rounds=20)
    kept = good.verified_drafts
    assert rates.rate_of(bad) < 0.3
    rates.forget([good, bad])
    assert rates.rate_of(bad) == rates.mean_rate(sampled=False) == 0.5
    assert good.verified_drafts is kept
