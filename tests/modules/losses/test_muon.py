"""Muon by blocks: with one block it is torch's Muon, every block's singular values come out near 1."""

from __future__ import annotations

import pytest
import torch

from aurora_lit.modules.losses.muon import BlockMuon, orthogonalise_blocks


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(gradients: list[torch.Tensor], *, state: dict[str, object] | None = None) -> torch.Tensor:
    """What `BlockMuon` adds to a matrix of zeros."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = BlockMuon([weight], lr=1.0)
    if state is not None:
        optimizer.load_state_dict(state)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_with_one_block_and_equal_units_it_is_muon(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(random(*shape)) for _ in range(2))
    optimizers = [
        BlockMuon([ours], lr=0.2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.25, weight_decay=0.08, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = random(*shape, seed=step + 1).sign()
            optimizer.step()
    assert float((ours.detach() - random(*shape)).norm()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=7e-3)  # torch iterates in bf16


def test_steps_do_not_depend_on_the_units_of_inputs() -> None:
    """Inputs C times as large have gradients C times as large; the same function needs weights C times as small."""
    gradients = [random(24, 40, seed=seed) for seed in range(3)]
    units = random(40, seed=7).exp()
    units /= units.log().mean().exp()
    assert float(units.max() / units.min()) > 30
    scaled = steps([gradient * units for gradient in gradients])
    torch.testing.assert_close(scaled * units, steps(gradients), rtol=1e-3, atol=1e-4)


def test_outputs_with_large_gradients_get_short_steps() -> None:
    gradients = [random(24, 40, seed=seed) for seed in range(3)]
    units = torch.logspace(-1, 1, 24)[:, None]
    scaled = steps([gradient * units for gradient in gradients])
    similarity = torch.nn.functional.cosine_similarity(scaled * units, steps(gradients))
    assert float(similarity.min()) > 0.8
    ratio = (scaled * units).norm(dim=1) / steps(gradients).norm(dim=1)
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4


def test_an_input_without_gradient_gets_no_step_and_leaves_the_others_theirs() -> None:
    gradients = [random(24, 40, seed=seed) for seed in range(3)]
    for gradient in gradients:
        gradient[:, 5] = 0
    added = steps(gradients)
    assert (added[:, 5] == 0).all()
    others = torch.cat([added[:, :5], added[:, 6:]], dim=1)
    expected = steps([torch.cat([gradient[:, :5], gradient[:, 6:]], dim=1) for gradient in gradients])
    assert 0.8 < float(others.norm() / expected.norm()) < 1.25
    assert float(torch.nn.functional.cosine_similarity(others.flatten(), expected.flatten(), dim=0)) > 0.99
    assert (steps([torch.zeros(8, 8)]) == 0).all()


def test_a_state_that_was_saved_without_units_is_continued() -> None:
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    saved = BlockMuon([weight], lr=1.0).state_dict() | {"state": {0: {"momentum_buffer": random(24, 40, seed=3)}}}
    assert (steps([random(24, 40)], state=saved) - steps([random(24, 40)])).abs().max() > 0.01


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


def test_a_matrix_without_gradient_is_left_out_and_those_after_it_are_not() -> None:
    first, second = (torch.nn.Parameter(random(24, 40)) for _ in range(2))
    second.grad = random(24, 40, seed=1)
    BlockMuon([first, second], lr=0.1).step()
    assert torch.equal(first, random(24, 40))
    assert not torch.equal(second, random(24, 40))
