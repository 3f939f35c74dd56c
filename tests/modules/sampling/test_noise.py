"""Seeded uniform numbers, and drawing tokens with them."""

import torch

from aurora_lit.modules.sampling.noise import draw, seeded_uniforms


def test_seeded_uniforms_are_uniform_uncorrelated_and_a_function_of_seed_and_output_index() -> None:
    u = seeded_uniforms(torch.arange(1000), output_index_B=torch.zeros(1000, dtype=torch.int64), count=1000)
    assert torch.equal(u[3:4, 40:50], seeded_uniforms(torch.tensor([3]), output_index_B=torch.tensor([40]), count=10))
    assert u.min() >= 0
    assert u.max() < 1
    assert u.unique().numel() == u.numel()
    cells = torch.bincount((u.flatten() * 100).long(), minlength=100).double()
    assert ((cells - 1e4) ** 2 / 1e4).sum() < 160  # 99 degrees of freedom: above with probability 1e-4
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # next output index, next seed
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 5e-3


def test_draw_never_gives_a_token_without_weight() -> None:
    weight = torch.tensor([[0.0, 0.3, 0.0, 0.5, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.375 - 1e-9, 0.375 + 1e-6, 1 - 2**-53], dtype=torch.float64)
    assert draw(weight, uniform).tolist() == [1, 1, 3, 3]
