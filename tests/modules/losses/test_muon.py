"""Muon by blocks: with one block it is torch's Muon, and every block's singular values come out near 1."""

from __future__ import annotations

import pytest
import torch

from aurora_lit.modules.losses import muon
from aurora_lit.modules.losses.muon import BlockMuon, orthogonalise_blocks


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_with_one_block_it_is_muon_at_half_the_rate(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_BLOCK_ROWS", 64)
    ours, theirs = (torch.nn.Parameter(random(*shape)) for _ in range(2))
    optimizers = [
        BlockMuon([ours], lr=0.2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = random(*shape, seed=step + 1)
            optimizer.step()
    assert float((ours.detach() - random(*shape)).norm()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-3)  # torch iterates in bf16


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (32, 12)])
def test_iterating_on_the_gram_matrix_is_iterating_on_the_block(shape: tuple[int, int]) -> None:
    matrix_RC = random(*shape) * torch.logspace(-3, 1, shape[0])[:, None]
    matrix_RC = random(shape[0], shape[0], seed=1) @ matrix_RC
    for block_RC, update_RC in zip(
        matrix_RC.double().split(16), orthogonalise_blocks(matrix_RC, block_rows=16).double().split(16), strict=True
    ):
        x_RC = block_RC / block_RC.norm()
        for _ in range(5):
            gram_RR = x_RC @ x_RC.T
            x_RC = 3.4445 * x_RC + (-4.7750 * gram_RR + 2.0315 * gram_RR @ gram_RR) @ x_RC
        expected_RC = x_RC * 0.1 * max(x_RC.shape) ** 0.5
        torch.testing.assert_close(update_RC, expected_RC, rtol=0, atol=0.002 * float(expected_RC.abs().max()))


def test_every_block_is_orthogonalised_and_scaled() -> None:
    matrix_RC = random(48, 96) * torch.logspace(-3, 1, 48)[:, None]
    update_RC = orthogonalise_blocks(matrix_RC, block_rows=16).float()
    assert float(update_RC.square().mean().sqrt()) == pytest.approx(0.1, rel=0.2)
    for block_BC in update_RC.view(3, 16, 96):
        singular = torch.linalg.svdvals(block_BC) / (0.1 * 96**0.5)
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3
    whole = torch.linalg.svdvals(update_RC)
    assert float(whole.max() / whole.min()) > 1.5, "or blocks would not differ from the whole matrix"


def test_rows_that_no_block_size_divides_are_blocks_of_fewer() -> None:
    assert orthogonalise_blocks(random(34, 20), block_rows=16).shape == (34, 20)  # two blocks of 17 are too large
    assert orthogonalise_blocks(random(7, 20), block_rows=5).isfinite().all()
    assert (orthogonalise_blocks(torch.zeros(8, 8)) == 0).all()
