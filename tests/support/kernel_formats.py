"""Reference values of weights and inputs in each weight format, computed from the formats' definitions."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import pack_linears
from aurora_lit.kernels.weight_format import WeightFormat

UNQUANTIZED = [WeightFormat.FP32, WeightFormat.BF16]
GROUPED = [
    WeightFormat.INT8_GROUPED,
    WeightFormat.INT6_GROUPED,
    WeightFormat.INT5_GROUPED,
    WeightFormat.INT4_GROUPED,
]
HEADS = [WeightFormat.INT8_SPLIT]
"""Formats that no layers have."""
PER_OUTPUT = [WeightFormat.INT8_PER_OUTPUT] if native.has_int8_tiles() else []


def stored_weight(weight: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """A weight's values in its format, float64; grouped formats round in fp32, as llama.cpp's Q8_0 and Q4_1 do."""
    if weight_format in UNQUANTIZED:
        return weight.to(weight_format.storage_dtype).double()
    if weight_format is WeightFormat.INT8_PER_OUTPUT:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale.clamp_min(1e-30)).round().double() * scale.double()
    grouped = in_groups(weight, 16 if weight_format is WeightFormat.INT6_GROUPED else 32).float()
    if weight_format.grouped_bits in (6, 8):
        most = 127 if weight_format.grouped_bits == 8 else 31
        scale, low = (grouped.abs().amax(-1, keepdim=True) / most).half().double(), torch.zeros(1).double()
        q = (grouped / scale.float()).round().clamp(-most, most)
    else:
        most = 15 if weight_format is WeightFormat.INT4_GROUPED else 31
        low = grouped.amin(-1, keepdim=True)
        scale, low = ((grouped.amax(-1, keepdim=True) - low) / most).half().double(), low.half().double()
        q = ((grouped - low.float()) / scale.float()).round().clamp(0, most)
    return torch.where(scale > 0, q * scale + low, low).flatten(-2)[..., : weight.shape[-1]]


def rounded_inputs(x: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """Inputs as the kernels round them, float64.

    Grouped formats have 8 bits and a scale per group; INT8_PER_OUTPUT has 16 bits and a scale per row.
    """
    if weight_format in UNQUANTIZED:
        return x.to(weight_format.storage_dtype).double()
    if weight_format is WeightFormat.INT8_PER_OUTPUT:
        largest = x.abs().amax(-1, keepdim=True)
        limit = 127 * 256 + 127
        return (x * (limit / largest)).round().double() * largest.double() / limit
    largest = in_groups(x).float().abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, 127) / largest  # "127 / largest" would be 127 times the reciprocal
    q = (in_groups(x).float() * factor).round()  # in fp32 like the kernel, so that ties round alike
    return (q.double() * largest.double() / 127).flatten(-2)[..., : x.shape[-1]]


def pack_in_turn(model: nn.Module, *, shift: int = 0, **_: Any) -> None:
    """Pack a model's linear layers in the grouped formats in turn, of which the first layer has number `shift`."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    formats = itertools.islice(itertools.cycle(GROUPED), shift, None)
    pack_linears(model, weight_format=GROUPED[0], others=dict(zip(linears, formats, strict=False)))


def in_groups(x: torch.Tensor, size: int = 32) -> torch.Tensor:
    """[..., inputs] as float64 groups [..., groups, size], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).double()
