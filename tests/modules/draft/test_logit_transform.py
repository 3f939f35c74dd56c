"""LogitTransform against its definition, for a whole vocabulary and for a part."""

from __future__ import annotations

import pytest
import torch

from aurora_lit.modules.draft.logit_transform import IDENTITY, LogitTransform

BIAS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_it_equals_its_definition_for_all_tokens_and_for_a_part(
    bias: torch.Tensor | None, softcap: float | None
) -> None:
    transform = LogitTransform(bias_V=bias, softcap=softcap)
    products = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = products if bias is None else products + bias
    expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
    torch.testing.assert_close(transform(products), expected)
    part = torch.tensor([2, 0])
    torch.testing.assert_close(transform.select(part)(products[:, part]), expected[:, part])
    assert transform.is_identity == (bias is None and softcap is None)


def test_the_identity_returns_its_input() -> None:
    products = torch.randn(2, 3)
    assert IDENTITY(products) is products
