"""Muon by blocks of rows, in units of the gradient: momentum whose blocks are orthogonalised, for a layer's matrices.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest matrix with orthonormal rows, or columns, which it
approximates by Newton-Schulz iterations. These cost as much here as 300 positions of a batch. Orthogonalising
blocks of rows instead costs a share of that as small as the block's share of the matrix (the idea of MuonBP, Khaled et
al. 2025, arXiv 2510.16981, which does it to save communication).

A step of Muon is equally large in every direction, but a draft's inputs are not: a few of the target's hidden
dimensions are a hundred times as large as most, and alike in all text, so that steps along them change what was not
asked for. So a matrix is orthogonalised, and stepped, in coordinates whose gradients are equally large: each row and
column is divided by the root mean square of its gradients before and after, as Shampoo with diagonal factors does
(Gupta et al. 2018, arXiv 1802.09568).

Leaves out which parameters it is for (modules/losses/draft_module.py).

Shapes: R rows and C columns of a matrix, N blocks of B rows; a 1 is a dimension to broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK_ROWS = 64
"""Rows of a block at most; a divisor of the matrix's rows."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_RMS = 0.1
"""Root mean square of what `orthogonalise_blocks` returns. Half of AdamW's usual one, which suits whole matrices:
blocks together have a larger spectral norm, and drafts came out worse with 0.2 (docs/log.md)."""
_SCALED_STEP = 2.5
"""Factor of a step in scaled coordinates: along large inputs it is shorter than without them, so it can be longer."""
_SQUARES_DECAY = 0.98
"""A step, of the averages of squared gradients."""
_LEAST_SQUARE = 1e-4
"""Of the mean over rows or columns: one without gradients must not get large steps."""


class BlockMuon(torch.optim.Optimizer):
    """See the file's docstring. Every parameter must be a matrix."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        """With Nesterov's momentum; `weight_decay` is decoupled, as in AdamW."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; `closure`: computes the loss, as for any optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight_RC in group["params"]:
                if weight_RC.grad is None:
                    continue
                grad_RC, state = weight_RC.grad, self.state[weight_RC]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight_RC)
                mean_RC = state["momentum_buffer"].lerp_(grad_RC, 1 - group["momentum"])
                scale_RC = _scale(state, grad_RC)
                scaled_RC = grad_RC.lerp(mean_RC, group["momentum"]).div_(scale_RC)
                weight_RC.mul_(1 - group["lr"] * group["weight_decay"])
                weight_RC.addcdiv_(orthogonalise_blocks(scaled_RC), scale_RC, value=-group["lr"] * _SCALED_STEP)
        return loss


def _scale(state: dict[str, Tensor], grad_RC: Tensor) -> Tensor:
    """What a matrix's coordinates are divided by, [R, C]: the units of its columns, times those of its rows then."""
    square_RC = grad_RC.square()
    columns_1C = _units(state, "column_squares", square_RC.mean(0, keepdim=True))
    # The mean over columns of (gradient / unit)², without another matrix.
    rows_R1 = _units(state, "row_squares", square_RC @ columns_1C.square().reciprocal().T / grad_RC.shape[1])
    return columns_1C * rows_R1


def _units(state: dict[str, Tensor], name: str, square: Tensor) -> Tensor:
    """Root of the average of squares over steps, with a geometric mean of 1."""
    mean = state.setdefault(name, square).lerp_(square, 1 - _SQUARES_DECAY)
    unit = mean.clamp_min(_LEAST_SQUARE * mean.mean() + 1e-30).sqrt_()
    return unit / unit.log().mean().exp()


def orthogonalise_blocks(matrix_RC: Tensor, *, block_rows: int | None = None) -> Tensor:
    """Each block of rows with its singular values near 1, all scaled to `_UPDATE_RMS`; fp32 [R, C].

    The iterations map singular values to between 0.7 and 1.2, not to 1, which is as good for training (Jordan et al.).
    They run on the Gram matrices, and the blocks themselves are multiplied once, which is a third of the work. In fp32,
    because the matrix that they come to has entries of several hundred.
    """
    R, C = matrix_RC.shape
    block_rows = block_rows or _BLOCK_ROWS
    rows = next(size for size in range(min(R, block_rows), 0, -1) if R % size == 0)
    x_NBC = matrix_RC.view(R // rows, rows, C)
    if rows > C:
        x_NBC = x_NBC.mT
    gram_NBB = x_NBC @ x_NBC.mT
    square_N11 = gram_NBB.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-14)[:, None, None]
    gram_NBB = gram_NBB / square_N11
    factor_NBB = square_N11.rsqrt() * (_UPDATE_RMS * math.sqrt(max(rows, C)))
    a, b, c = _COEFFICIENTS
    for iteration in range(_ITERATIONS):
        # X ← (a + b·XXᵀ + c·(XXᵀ)²) X
        step_NBB = torch.baddbmm(gram_NBB, gram_NBB, gram_NBB, beta=b, alpha=c)
        step_NBB.diagonal(dim1=1, dim2=2).add_(a)
        factor_NBB = step_NBB @ factor_NBB if iteration else step_NBB * factor_NBB
        if iteration < _ITERATIONS - 1:
            gram_NBB = step_NBB @ gram_NBB @ step_NBB
    x_NBC = factor_NBB @ x_NBC
    if rows > C:
        x_NBC = x_NBC.mT
    return x_NBC.reshape(R, C)
