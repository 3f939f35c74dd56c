"""The parts of benchmarks/sampled_rules.py that hold by an exact law."""

from __future__ import annotations

import pytest
import torch

from aurora_lit.modules.losses.unroll import UnrolledChains
from benchmarks.sampled_rules import Sample, posterior_noise, walk


def sample(p_AD: torch.Tensor, label_A: torch.Tensor) -> Sample:
    """A sample without a draft."""
    none = torch.empty(0)
    chains = UnrolledChains(hidden_KBTH=none, root_hidden_BTH=none, root_key_BGTD=none, root_value_BGTD=none)
    return Sample(domain="", first=1, p_AD=p_AD, label_A=label_A, chains=chains)


def test_noise_given_the_answer_makes_the_target_draw_it() -> None:
    torch.manual_seed(0)
    p_AD = torch.randn(2000, 6).softmax(-1)
    label_A = torch.multinomial(p_AD, 1)[:, 0]
    inside_A = label_A < 5
    e_AD = posterior_noise(sample(p_AD, label_A))
    assert torch.equal((p_AD[:, :-1] / e_AD).argmax(-1)[inside_A], label_A[inside_A])


def test_noise_given_sampled_answers_is_exponential_and_independent_of_p() -> None:
    torch.manual_seed(0)
    p_D = torch.tensor([0.6, 0.3, 0.1])
    p_AD = p_D.expand(200_000, 3)
    e_AD = posterior_noise(sample(p_AD, torch.multinomial(p_AD, 1)[:, 0]))
    for e_A in e_AD.T:
        for bound in (0.1, 0.7, 2.0):
            assert float((e_A > bound).float().mean()) == pytest.approx(float(torch.tensor(-bound).exp()), abs=5e-3)
    assert abs(float(torch.corrcoef(e_AD.T)[0, 1])) < 1e-2


def test_a_walk_with_a_constant_rate_has_the_length_of_the_geometric_series() -> None:
    tokens, rounds = walk((0.5 ** torch.arange(1, 4)).expand(1000, 3))
    assert tokens / rounds == pytest.approx((1 - 0.5**4) / (1 - 0.5))


def test_a_walk_counts_only_the_rounds_that_follow_each_other() -> None:
    # The first round accepts two proposals, so the rounds at roots 1 and 2 never happen.
    tokens, rounds = walk(torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    assert (tokens, rounds) == (4.0, 2.0)
