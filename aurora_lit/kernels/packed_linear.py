"""Linear layers with weights packed for the native kernels, which replace a model's own linear layers.

Only weights are stored in a `WeightFormat`; sums, norms and attention stay fp32. That keeps results close to fp32, and
since the kernels are batch-invariant, speculative decoding is exact in every format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Self

import torch
from torch import nn

from aurora_lit.kernels import matmul, native
from aurora_lit.kernels.weight_format import WeightFormat

_SAMPLED_ROWS = 8
TENSOR_NAMES = ("weight", "bias")
"""Of `PackedLinear.tensors`; the second may be absent."""


class PackedLinear(nn.Module):
    """Replacement for `nn.Linear` at inference: [..., inputs] fp32 -> [..., outputs] fp32."""

    def __init__(self, linear: nn.Linear, weight_format: WeightFormat) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight_format = weight_format
        self.packed = matmul.pack_weight(linear.weight, weight_format)
        self.bias: torch.Tensor | None = None if linear.bias is None else linear.bias.detach().float().contiguous()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], weight_format: WeightFormat, shape: Sequence[int]
    ) -> Self:
        """The layer whose `tensors()` these are; `shape`: its outputs and inputs."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = shape
        layer.weight_format = weight_format
        layer.packed = tensors["weight"]
        layer.bias = tensors.get("bias")
        return layer

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer consists of, besides its format and its shape."""
        tensors = {"weight": self.packed}
        if self.bias is not None:
            tensors["bias"] = self.bias
        return tensors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply inputs of any leading shape."""
        x_NI = x.reshape(-1, self.in_features)
        y_NO = matmul.linear(x_NI, self.packed, self.weight_format, self.out_features, self.bias)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the largest output, int64 of x's leading shape; for a layer without a bias."""
        assert self.bias is None
        x_NI = x.reshape(-1, self.in_features)
        index_N = matmul.argmax_linear(x_NI, self.packed, self.weight_format, self.out_features)
        return index_N.view(x.shape[:-1])

    def choose(
        self,
        x_NI: torch.Tensor,
        *,
        temperature_N: torch.Tensor,
        key_N: torch.Tensor,
        position_N: torch.Tensor,
        dense_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose one output of each row while they are computed; for a layer without a bias. Batch-invariant.

        A row's output is the largest at temperature 0, otherwise the argmax of output / temperature + noise, which is
        distributed as the softmax at that temperature (`gumbel` in modules/sampling/noise.py); the first of equal ones.

        Args:
            x_NI: inputs, fp32.
            temperature_N: fp32, at least 0.
            key_N: int64, keys of the noise.
            position_N: int64, index in its request's output of the token that is chosen.
            dense_N: int64. A row with an index gets all its outputs there instead of a choice; -1: none. Indices are
                0 … D - 1, each used once. None: no row has one.

        Returns:
            Index of the chosen output, int64 [N], arbitrary for rows with an index in `dense_N`; and these rows'
            outputs, fp32 [D, outputs].
        """
        assert self.bias is None
        return matmul.choose_linear(
            x_NI,
            self.packed,
            self.weight_format,
            self.out_features,
            temperature_N=temperature_N,
            key_N=key_N,
            position_N=position_N,
            dense_N=dense_N,
        )

    @torch.no_grad()
    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight [len(indices), inputs], fp32, with the values that the kernel multiplies by."""
        shape = {"outputs": self.out_features, "inputs": self.in_features}
        return matmul.read_rows(self.packed, self.weight_format, indices, **shape)


class PackedEmbedding(nn.Module):
    """The rows of a packed weight as an embedding: token ids of any shape -> [..., H] fp32.

    A target whose head and embedding are one tensor needs it only once in memory.
    """

    def __init__(self, table: PackedLinear) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up. Raises IndexError for an id that is not in the vocabulary."""
        return self.table.rows(ids)


def row_table(embedding: torch.Tensor | PackedEmbedding) -> matmul.RowTable:
    """An embedding as the kernels read it; a tensor is fp32 [V, H] and contiguous. The caller keeps it alive."""
    if isinstance(embedding, PackedEmbedding):
        return matmul.RowTable.of(embedding.table.packed, embedding.table.weight_format)
    assert embedding.dtype == torch.float32
    assert embedding.is_contiguous()
    return matmul.RowTable.of(embedding, None)


def pack_model(model: nn.Module, *, precision: str, head: nn.Module) -> None:
    """Pack a language model's linear layers; `precision`: fp32, bf16, int8, int4 or auto.

    "auto" is the fewest bits that change none of the model's weights, if the processor is fast with them, otherwise
    bf16. With int4 layers the head has 8 bits, as in llama.cpp's files, because its errors directly change logits. All
    other parameters are copied.
    """
    if precision == "auto":
        grouped = (WeightFormat.INT4_GROUPED, WeightFormat.INT8_GROUPED)
        lossless = [each for each in grouped if native.has_byte_products() and _is_lossless_for(model, each, head)]
        weight_format = [*lossless, WeightFormat.BF16][0]
    else:
        weight_format = WeightFormat(precision)
    pack_linears(model, weight_format=weight_format, others={head: head_format(weight_format)})
    for parameter in model.parameters():  # else they would keep the whole mapping of their file in memory
        parameter.data = parameter.data.clone()


def head_format(weight_format: WeightFormat) -> WeightFormat:
    """The format of the head of a model whose layers have this one."""
    return WeightFormat.INT8_SPLIT if weight_format is WeightFormat.INT4_GROUPED else weight_format.of_head


def _is_lossless_for(model: nn.Module, weight_format: WeightFormat, head: nn.Module) -> bool:
    """True if the format changes none of a few rows of every linear layer: a file stores all rows of a layer alike."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    return all(
        matmul.is_lossless(
            linear.weight[:: max(1, linear.out_features // _SAMPLED_ROWS)],
            head_format(weight_format) if linear is head else weight_format,
        )
        for linear in linears
    )


def pack_linears(
    model: nn.Module,
    *,
    weight_format: WeightFormat,
    others: Mapping[nn.Module, WeightFormat] = MappingProxyType({}),
) -> int:
    """Replace every `nn.Linear` of a CPU model by a `PackedLinear`; returns how many.

    `others`: formats of layers that differ from `weight_format`.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = PackedLinear(child, others.get(child, weight_format))
                setattr(parent, name, packed)
                count += 1
    return count
