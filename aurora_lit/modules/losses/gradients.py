"""Clipping of gradients, some of which are sparse.

Leaves out the optimizers (modules/losses/draft_module.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def clip_gradients(parameters: Iterable[torch.nn.Parameter], *, max_norm: float = 1.0) -> torch.Tensor:
    """Clip the gradients of all parameters together, in place, to a norm; returns their norm before.

    Sparse gradients may have rows more than once; they have each row once afterwards.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
