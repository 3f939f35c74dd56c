"""The mean by which a prompt's domain is decided: what it reads and what it does not, and what weighs most."""

from __future__ import annotations

import math

import pytest
import torch

from aurora_lit.modules.domains.centroids import MAX_POOLED_POSITIONS, pool_prompt


def weights_of(prompt_length: int) -> torch.Tensor:
    """The weight of each position in the mean."""
    weights_T = pool_prompt(torch.eye(prompt_length + 3), prompt_length)
    assert weights_T is not None
    return weights_T


@pytest.mark.parametrize("prompt_length", [3, 4, 17, MAX_POOLED_POSITIONS + 2])
def test_of_short_prompts_all_positions_but_the_first_and_the_last_are_read(prompt_length: int) -> None:
    assert weights_of(prompt_length).nonzero()[:, 0].tolist() == list(range(1, prompt_length - 1))


@pytest.mark.parametrize("prompt_length", [MAX_POOLED_POSITIONS + 3, 514, 4095])
def test_of_long_prompts_the_last_ones_are_read_and_hardly_any_weight_is_lost(prompt_length: int) -> None:
    read = weights_of(prompt_length).nonzero()[:, 0].tolist()
    assert read == list(range(prompt_length - 1 - MAX_POOLED_POSITIONS, prompt_length - 1))
    distances = torch.arange(prompt_length - 2, dtype=torch.float64)
    weights = torch.exp(-distances / 32)
    assert weights[MAX_POOLED_POSITIONS:].sum() < 0.02 * weights.sum()


@pytest.mark.parametrize("prompt_length", [3, 40, 700])
def test_a_weight_falls_by_e_over_thirty_two_positions_and_all_add_up_to_one(prompt_length: int) -> None:
    weights_T = weights_of(prompt_length)
    read_P = weights_T[weights_T > 0]
    torch.testing.assert_close(weights_T.sum(), torch.tensor(1.0))
    torch.testing.assert_close(read_P[1:] / read_P[:-1], torch.full((len(read_P) - 1,), math.exp(1 / 32)))


def test_two_kinds_of_requests_behind_the_same_instructions_are_told_apart() -> None:
    shared, *kinds = torch.eye(3)
    means = [pool_prompt(torch.cat([shared.expand(300, -1), kind.expand(40, -1)]), 340) for kind in kinds]
    for mean, kind in zip(means, kinds, strict=True):
        assert mean is not None
        assert mean @ kind > 2 * (mean @ shared)


def test_what_the_engine_has_not_computed_when_decoding_begins_is_not_read() -> None:
    states = torch.randn(20, 6)
    before = pool_prompt(states, 12)
    states[11:] = float("nan")
    states[0] = float("nan")
    torch.testing.assert_close(pool_prompt(states, 12), before)


def test_prompts_without_a_position_in_between_have_no_mean() -> None:
    assert [pool_prompt(torch.ones(5, 6), length) for length in (0, 1, 2)] == [None] * 3


def test_the_mean_is_taken_in_fp32_and_rounded_once() -> None:
    states = (torch.randn(300, 96) + 5).bfloat16()
    mean = pool_prompt(states, 250)
    assert mean is not None
    assert mean.dtype == torch.float32
    weights_P = weights_of(250)[1:249].double()
    exact = weights_P @ states[1:249].double()
    torch.testing.assert_close(mean.double(), exact, atol=0, rtol=2**-7)
    whole = pool_prompt(states.float(), 250)
    assert whole is not None
    torch.testing.assert_close(whole.double(), exact, atol=1e-5, rtol=1e-5)
