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


@pytest.mark.parametrize("prompt_length", [3, 4, 17, 66])
def test_of_short_prompts_all_positions_but_the_first_and_the_last_are_read(prompt_length: int) -> None:
    assert positions_read(prompt_length) == list(range(1, prompt_length - 1))


@pytest.mark.parametrize("prompt_length", [67, 130, 131, 500, 4095])
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


def test_the_mean_is_taken_in_fp32() -> None:
    states = torch.randn(200, 6).bfloat16()
    mean = pool_prompt(states, 60)
    assert mean is not None
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, states[1:59].double().mean(0).float(), atol=1e-6, rtol=1e-6)
