"""Linear layers whose weight is packed for the native kernel, and the swap of a model's own layers for them.

`precision` names what the weights are stored in. Activations, sums, norms and attention stay fp32 in both precisions,
which keeps bf16 close to fp32 and, since the kernels are batch-invariant, speculation exact in either.
"""

from __future__ import annotations

import torch
from torch import nn

from aurora_lit.kernels import native


class PackedLinear(nn.Module):
    """Drop-in for `nn.Linear` at inference: [..., inputs] fp32 -> [..., outputs] fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.packed = native.pack(linear.weight, dtype=dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; rows may have any leading shape."""
        y = native.linear(x.reshape(-1, self.in_features), self.packed, self.out_features, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight [len(indices), inputs], fp32, as the kernel sees them."""
        identity = torch.eye(self.in_features)
        return native.linear(identity, self.packed, self.out_features, None).t()[indices]


def pack_linears(model: nn.Module, *, dtype: torch.dtype) -> int:
    """Swap every `nn.Linear` of a CPU model for a `PackedLinear`; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, dtype))
                count += 1
    return count
