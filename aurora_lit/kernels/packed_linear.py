"""Linear layers whose weight is packed for the native kernel, and the swap of a model's own layers for them.

The type names what the weights are stored in; int8 and uint8 stand for weights of eight and four bits with a scale a
group (kernels/group_quantization.py). Sums, norms and attention stay fp32 whatever it is, which keeps it close to fp32 and, since
the kernels are batch-invariant, speculation exact in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from aurora_lit.kernels import native
from aurora_lit.kernels.native import STORAGE

_ROWS_LOOKED_AT = 8


class PackedLinear(nn.Module):
    """Drop-in for `nn.Linear` at inference: [..., inputs] fp32 -> [..., outputs] fp32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, screened: bool = False) -> None:
        """`screened`: `argmax` reads a coarse copy first, and little of the weight itself; where tiles allow it."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.packed = native.pack(linear.weight, dtype=dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        screened = screened and native.has_byte_tiles()
        self._screen = native.Screen.of(linear.weight.detach(), dtype=dtype) if screened else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; rows may have any leading shape."""
        y = native.linear(x.reshape(-1, self.in_features), self.packed, self.out_features, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """Which output is the largest, int64 of x's leading shape; for a layer without a bias."""
        assert self.bias is None
        x_NI = x.reshape(-1, self.in_features)
        return native.argmax_linear(x_NI, self.packed, self.out_features, screen=self._screen).view(x.shape[:-1])

    @torch.no_grad()
    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight [len(indices), inputs], fp32, as the kernel sees them."""
        identity = torch.eye(self.in_features)
        return native.linear(identity, self.packed, self.out_features, None).t()[indices]


def pack_model(model: nn.Module, *, precision: str, head: nn.Module) -> None:
    """Pack a language model's linear layers in one of `STORAGE`, or as is best for it here ("auto"); copy the rest.

    That is the fewest bits that lose nothing of its weights, where the processor is quick at them, and else bf16.
    Beside layers of four bits the head has eight, as in llama.cpp's files: its errors would go straight into logits.
    """
    if precision == "auto":
        fewest = [name for name in ("int4", "int8") if native.has_vnni() and _loses_nothing(model, name, head)]
        precision = [*fewest, "bf16"][0]
    pack_linears(model, dtype=STORAGE[precision], others={head: _head_storage(precision)}, screened=head)
    for left in model.parameters():  # in their file's mapping, all of which would stay in memory with them
        left.data = left.data.clone()


def _head_storage(precision: str) -> torch.dtype:
    return STORAGE["int8" if precision == "int4" else precision]


def _loses_nothing(model: nn.Module, precision: str, head: nn.Module) -> bool:
    """By a few rows of every linear layer: a file stores all rows of one alike."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    return all(
        native.loses_nothing(
            linear.weight[:: max(1, linear.out_features // _ROWS_LOOKED_AT)],
            dtype=_head_storage(precision) if linear is head else STORAGE[precision],
        )
        for linear in linears
    )


def pack_linears(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    others: Mapping[nn.Module, torch.dtype] = MappingProxyType({}),
    screened: nn.Module | None = None,
) -> int:
    """Swap every `nn.Linear` of a CPU model for a `PackedLinear`; returns how many. `others` have their own type."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, others.get(child, dtype), screened=child is screened))
                count += 1
    return count
