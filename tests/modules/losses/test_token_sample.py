"""The sample of the draft vocabulary: what is in it for certain, and that everything else is drawn alike."""

from __future__ import annotations

import torch

from aurora_lit.modules.losses.token_sample import sample_tokens

VOCABULARY = 1000


def test_the_given_tokens_are_certain_and_the_sample_is_filled_with_frequent_ones() -> None:
    given = torch.tensor([900, 5, 5, 700])
    sample = sample_tokens(given, vocabulary=VOCABULARY, size=128, turn=0)
    assert sample is not None
    certain = sample.index_S[: sample.num_certain].tolist()
    assert certain == [*range(94), 700, 900]
    drawn = sample.index_S[sample.num_certain :].tolist()
    assert len({*certain, *drawn}) == len(certain) + len(drawn) == 128
    assert sample.weight == (VOCABULARY - len(certain)) / len(drawn)


def test_every_other_token_is_drawn_equally_often() -> None:
    times = torch.zeros(VOCABULARY)
    for turn in range(400):
        sample = sample_tokens(torch.tensor([3]), vocabulary=VOCABULARY, size=128, turn=turn)
        assert sample is not None
        times[sample.index_S[sample.num_certain :]] += 1
    others = times[times > 0]
    assert len(others) == VOCABULARY - 96
    expected = 400 / sample.weight
    assert float((others - expected).abs().max()) < 0.25 * expected


def test_many_certain_tokens_still_leave_draws_and_a_small_vocabulary_is_not_sampled() -> None:
    many = sample_tokens(torch.arange(500), vocabulary=VOCABULARY, size=128, turn=0)
    assert many is not None
    assert many.num_certain == 500
    assert len(many.index_S) % 16 == 0
    assert len(many.index_S) >= 532
    assert sample_tokens(torch.arange(4), vocabulary=120, size=128, turn=0) is None


def test_raised_logits_estimate_the_sum_over_the_vocabulary() -> None:
    logits_D = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    estimates = []
    for turn in range(200):
        sample = sample_tokens(torch.tensor([3]), vocabulary=VOCABULARY, size=128, turn=turn)
        assert sample is not None
        sampled_S = logits_D[sample.index_S].clone()
        sample.raise_logits(sampled_S)
        estimates.append(sampled_S.exp().sum())
    torch.testing.assert_close(torch.stack(estimates).mean(), logits_D.exp().sum(), rtol=0.03, atol=0)
