"""Packs weights for the CPU kernels, and multiplies by them: products, their argmax, a choice for each row.

Leaves out: how weights are quantised (quantization.py), and layers with packed weights (packed_linear.py).

Shapes: N rows, I inputs, O outputs, D rows whose outputs are stored.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from aurora_lit.kernels import huge_pages, native, quantization
from aurora_lit.kernels.quantization import Codes
from aurora_lit.kernels.weight_format import WeightFormat

_CHUNK = 4096
"""Outputs that are quantised at a time, whole blocks: a large head at once would take gigabytes."""

# -- packing weights -----------------------------------------------------------------------------------------------


def pack_weight(weight_OI: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """Lay out a linear layer's weight for `linear`; a flat tensor of the format's `storage_dtype`."""
    kernels = native.library()
    assert kernels is not None
    weight_OI = weight_OI.detach().float().contiguous()
    outputs, inputs = weight_OI.shape
    block = kernels.aurora_block()
    blocks = -(-outputs // block)
    if weight_format is WeightFormat.FP32:
        packed = huge_pages.empty(blocks * block * inputs, torch.float32)
        kernels.aurora_pack_fp32(native.address(weight_OI), outputs, inputs, native.address(packed))
        return packed
    if weight_format is WeightFormat.BF16:
        padded = -(-inputs // 32) * 32
        packed = huge_pages.empty(blocks * block * padded, torch.bfloat16)
        kernels.aurora_pack_bf16(native.address(weight_OI), outputs, inputs, padded, native.address(packed))
        return packed
    if weight_format is WeightFormat.INT8_PER_OUTPUT:
        contents = quantization.pack_per_output(*quantization.quantize_per_output(weight_OI), block=block)
        return huge_pages.empty(contents.numel(), torch.uint8).copy_(contents)
    parts = (quantization.quantize_grouped(part_OI, weight_format) for part_OI in torch.split(weight_OI, _CHUNK))
    return pack_codes(parts, weight_format, (outputs, inputs))


def pack_codes(parts: Iterable[Codes], weight_format: WeightFormat, shape: Sequence[int]) -> torch.Tensor:
    """Lay out a weight in a grouped format for `linear`, with exactly these numbers; flat uint8.

    `parts`: its outputs in their order, in all but the last part a multiple of 32; `shape`: outputs and inputs in all.
    """
    kernels = native.library()
    assert kernels is not None
    outputs, inputs = shape
    block = kernels.aurora_block()
    block_bytes = getattr(kernels, f"aurora_block_bytes_{weight_format.suffix}")(-(-inputs // kernels.aurora_group()))
    packed = huge_pages.empty(-(-outputs // block) * block_bytes, torch.uint8)
    first = 0
    for q_OI, scale_OG, min_OG in parts:
        assert first % block == 0
        assert q_OI.dtype == torch.uint8
        assert scale_OG.shape == (len(q_OI), -(-inputs // weight_format.scale_inputs))
        assert (min_OG is not None) == weight_format.has_minima
        assert min_OG is None or min_OG.shape == scale_OG.shape
        numbers = [q_OI.contiguous(), scale_OG.half().contiguous()]
        minima = None if min_OG is None else min_OG.half().contiguous()
        getattr(kernels, f"aurora_pack_{weight_format.suffix}")(
            *map(native.address, numbers),
            None if minima is None else native.address(minima),
            len(q_OI),
            inputs,
            ctypes.c_void_p(packed.data_ptr() + first // block * block_bytes),
        )
        first += len(q_OI)
    assert first == outputs
    return packed


def packed_values(weight_OI: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """The values, in fp32, that a weight has after packing; not for INT8_PER_OUTPUT."""
    weight_OI = weight_OI.detach().float()
    if weight_format.grouped_bits is not None:
        return quantization.dequantize_grouped(quantization.quantize_grouped(weight_OI, weight_format), weight_format)
    return weight_OI.to(weight_format.storage_dtype).float()


def is_lossless(weight_OI: torch.Tensor, weight_format: WeightFormat) -> bool:
    """True if packing a weight in this grouped format changes none of its values: it was read from a file in it."""
    weight_OI = weight_OI.detach().float()
    error = float((packed_values(weight_OI, weight_format) - weight_OI).abs().max())
    return error <= 1e-6 * float(weight_OI.abs().max())


class RowTable(ctypes.Structure):
    """A table that the kernels read row by row: its address, and a function that reads a row; RowTable in rows.hpp."""

    _fields_ = (("data", ctypes.c_void_p), ("read", ctypes.c_void_p))

    @staticmethod
    def of(table: torch.Tensor, weight_format: WeightFormat | None) -> RowTable:
        """`weight_format`: of a packed weight; None for rows of fp32. The caller keeps the tensor alive."""
        reader = getattr(native.library(), f"aurora_row_{'plain' if weight_format is None else weight_format.suffix}")
        return RowTable(table.data_ptr(), ctypes.cast(reader, ctypes.c_void_p))


def read_rows(
    packed: torch.Tensor, weight_format: WeightFormat, indices: torch.Tensor, *, outputs: int, inputs: int
) -> torch.Tensor:
    """Rows of a packed weight, with exactly the values that `linear` multiplies by: [*indices.shape, inputs] fp32.

    Raises IndexError for an index outside 0 … `outputs` - 1.
    """
    kernels = native.library()
    assert kernels is not None
    indices = indices.long().contiguous()
    rows = torch.empty(*indices.shape, inputs)
    shape, count = (ctypes.c_int64(outputs), ctypes.c_int64(inputs)), ctypes.c_int64(indices.numel())
    call = getattr(kernels, f"aurora_rows_{weight_format.suffix}")
    if not call(native.address(packed), *shape, native.address(indices), count, native.address(rows)):
        raise IndexError(f"an index of {indices.tolist()} is no row of a weight of {outputs} rows")
    return rows


# -- products ------------------------------------------------------------------------------------------------------


def linear(
    x_NI: torch.Tensor, packed: torch.Tensor, weight_format: WeightFormat, outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [N, I] fp32 times a packed weight, plus bias: [N, O] fp32."""
    y_NO = torch.empty(len(x_NI), outputs)
    results = (native.address(y_NO), None if bias is None else native.address(bias))
    _multiply("linear", x_NI, packed, weight_format, outputs, *results)
    return y_NO


def argmax_linear(x_NI: torch.Tensor, packed: torch.Tensor, weight_format: WeightFormat, outputs: int) -> torch.Tensor:
    """Index of the largest output of `linear` without a bias, for each row: [N] int64; the first of equal outputs."""
    index_N = torch.empty(len(x_NI), dtype=torch.int64)
    draws = Draws(tokens=index_N.data_ptr())
    _multiply("choose", x_NI, packed, weight_format, outputs, ctypes.byref(draws))
    return index_N


class ColumnDraws(NamedTuple):
    """How the tokens of some columns are drawn; see `PackedLinear.choose`."""

    temperatures: Sequence[float]
    """0: the largest output."""
    keys: Sequence[int]
    """Of the noise."""
    positions: Sequence[int]
    """Index in the output of the token that is chosen."""


class Draws(ctypes.Structure):
    """How tokens are chosen; Draws in choose.hpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("temperatures", "keys", "positions", "dense", "dense_logits", "tokens")
    )


def choose_linear(
    x_NI: torch.Tensor,
    packed: torch.Tensor,
    weight_format: WeightFormat,
    outputs: int,
    *,
    temperature_N: torch.Tensor,
    key_N: torch.Tensor,
    position_N: torch.Tensor,
    dense_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An output of `linear` without a bias for each row; the arguments and results of `PackedLinear.choose`."""
    rows = len(x_NI)
    assert temperature_N.shape == key_N.shape == position_N.shape == (rows,)
    index_N = torch.empty(rows, dtype=torch.int64)
    num_dense = 0
    if dense_N is not None:
        assert dense_N.shape == (rows,)
        dense_N = dense_N.long().contiguous()
        num_dense = int(dense_N.max()) + 1 if rows else 0
    dense_logits_DO = torch.empty(num_dense, outputs)
    given = [temperature_N.float().contiguous(), key_N.long().contiguous(), position_N.long().contiguous()]
    draws = Draws(
        *(tensor.data_ptr() for tensor in given),
        None if dense_N is None else dense_N.data_ptr(),
        dense_logits_DO.data_ptr(),
        index_N.data_ptr(),
    )
    _multiply("choose", x_NI, packed, weight_format, outputs, ctypes.byref(draws))
    return index_N, dense_logits_DO


def _multiply(
    kernel: str,
    x_NI: torch.Tensor,
    packed: torch.Tensor,
    weight_format: WeightFormat,
    outputs: int,
    *results: Any,
) -> None:
    """Call a kernel of the format on inputs and a packed weight; `results`: its last arguments."""
    kernels = native.library()
    assert kernels is not None
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    rows, inputs = x_NI.shape
    call = getattr(kernels, f"aurora_{kernel}_{weight_format.suffix}")
    stride = ctypes.c_int64(x_NI.stride(0))
    call(native.address(x_NI), stride, rows, native.address(packed), inputs, outputs, *results)
