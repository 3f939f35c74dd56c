"""The mean by which a prompt's domain is decided: what it reads, and what it does not."""

from __future__ import annotations

import pytest
import torch

from aurora_lit.modules.domains.embedding import MAX_POOLED_POSITIONS, pool_prompt


def positions_read(prompt_length: int) -> list[int]:
    """The positions that the mean is taken of, all with the same weight."""
    weights = pool_prompt(torch.eye(prompt_length + 3), prompt_length)
    assert weights is not None
    read = weights.nonzero()[:, 0].tolist()
    torch.testing.assert_close(weights[read], torch.full((len(read),), 1 / len(read)))
    return read


@pytest.mark.parametrize("prompt_length", [3, 4, 17, 258])
def test_of_short_prompts_all_positions_but_the_first_and_the_last_are_read(prompt_length: int) -> None:
    assert positions_read(prompt_length) == list(range(1, prompt_length - 1))


@pytest.mark.parametrize("prompt_length", [259, 514, 515, 2000, 4095])
def test_of_long_prompts_a_bounded_number_of_evenly_spaced_positions_is_read(prompt_length: int) -> None:
    read = positions_read(prompt_length)
    (stride,) = {after - before for before, after in zip(read, read[1:], strict=False)}
    assert MAX_POOLED_POSITIONS // 2 <= len(read) <= MAX_POOLED_POSITIONS
    assert (read[0], prompt_length - 2 - read[-1] < stride) == (1, True)


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
    exact = states[1:249].double().mean(0)
    torch.testing.assert_close(mean.double(), exact, atol=0, rtol=2**-8)
    whole = pool_prompt(states.float(), 250)
    assert whole is not None
    torch.testing.assert_close(whole.double(), exact, atol=1e-5, rtol=1e-5)
