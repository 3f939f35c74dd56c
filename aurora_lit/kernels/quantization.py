"""Weights quantised to integers, with the scales that give their values.

Grouped formats (csrc/grouped.hpp) have fp16 scales for groups of inputs, and integers from 0 up. With 4 and 5 bits,
w = scale · q + min with q in 0…15 or 0…31, as llama.cpp's Q4_1 and Q5_1. With 6 and 8 bits, w = scale · (q - offset)
with offsets of 32 and 128, as its Q6_K and Q8_0. A weight that was read from a file in Q4_1, Q5_1 or Q8_0 is quantised
to the very same numbers. Source: ggml-quants.c (quantize_row_q4_1_ref, quantize_row_q5_1_ref, quantize_row_q8_0_ref,
dequantize_row_q6_K).

The per-output format (csrc/int8_tiles.hpp) has one fp32 scale for each output: w = scale · q with q in -127…127. It is
less precise and faster to multiply. It is used where numbers need not be exact (a draft).

Shapes: O outputs, I inputs, G groups of an output's inputs; N blocks of outputs, F vectors of 16 outputs in a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from aurora_lit.kernels.weight_format import WeightFormat

_LANES = 16
"""Outputs of one vector: half a block."""
_TILE_INPUTS = 64
"""Inputs of one int8 tile."""
_MIN_FP16_SCALE = 2.0**-24  # the smallest positive fp16; if all weights of a group are equal, any scale will do
_MIN_FP32_SCALE = 1e-30


class Codes(NamedTuple):
    """A weight in a grouped format, or some rows of it; the last group of an output may be shorter."""

    q_OI: Tensor
    """uint8."""
    scale_OG: Tensor
    """A value of fp16 for every `WeightFormat.scale_inputs` inputs."""
    min_OG: Tensor | None
    """Likewise; None in formats without minima."""


def quantize_grouped(weight_OI: Tensor, weight_format: WeightFormat) -> Codes:
    """Quantise an fp32 weight to a grouped format."""
    bits, span = weight_format.grouped_bits, weight_format.scale_inputs
    assert bits is not None
    outputs, inputs = weight_OI.shape
    weight_OGI = functional.pad(weight_OI, (0, -inputs % span)).view(outputs, -1, span)
    if weight_format.has_minima:
        most = 2**bits - 1
        low_OG1, high_OG1 = weight_OGI.aminmax(dim=-1, keepdim=True)
        scale_OG1, min_OG1 = ((high_OG1 - low_OG1) / most).half().float(), low_OG1.half().float()
        q_OGI = ((weight_OGI - min_OG1) / scale_OG1.clamp_min(_MIN_FP16_SCALE)).round_().clamp_(0, most)
        min_OG = min_OG1.squeeze(-1)
    else:
        offset = _offset(weight_format)
        scale_OG1, min_OG = (weight_OGI.abs().amax(-1, keepdim=True) / (offset - 1)).half().float(), None
        q_OGI = (weight_OGI / scale_OG1.clamp_min(_MIN_FP16_SCALE)).round_().clamp_(1 - offset, offset - 1).add_(offset)
    return Codes(q_OGI.to(torch.uint8).view(outputs, -1)[:, :inputs], scale_OG1.squeeze(-1), min_OG)


def dequantize_grouped(codes: Codes, weight_format: WeightFormat) -> Tensor:
    """The values of a weight in a grouped format, fp32."""
    (outputs, inputs), span = codes.q_OI.shape, weight_format.scale_inputs
    q_OGI = functional.pad(codes.q_OI, (0, -inputs % span)).view(outputs, -1, span).float()
    scale_OG1 = codes.scale_OG.float().unsqueeze(-1)
    if codes.min_OG is None:
        value_OGI = scale_OG1 * (q_OGI - _offset(weight_format))
    else:
        value_OGI = scale_OG1 * q_OGI + codes.min_OG.float().unsqueeze(-1)
    return value_OGI.view(outputs, -1)[:, :inputs]


def _offset(weight_format: WeightFormat) -> int:
    """The code of weight 0 in a format without minima."""
    assert weight_format.grouped_bits is not None
    return int(2 ** (weight_format.grouped_bits - 1))


def quantize_per_output(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [O, I] and the scale of each output, fp32 [O]."""
    scale_O = weight_OI.abs().amax(-1) / 127
    q_OI = (weight_OI / scale_O.clamp_min(_MIN_FP32_SCALE)[:, None]).round_().clamp_(-127, 127)
    return q_OI.to(torch.int8), scale_O


def pack_per_output(q_OI: Tensor, scale_O: Tensor, *, block: int) -> Tensor:
    """Lay out the result of `quantize_per_output`; flat uint8: for each block of outputs scales, then weights."""
    outputs, inputs = q_OI.shape
    q_OI = functional.pad(q_OI, (0, -inputs % _TILE_INPUTS, 0, -outputs % block))
    N, G = len(q_OI) // block, q_OI.shape[1] // _TILE_INPUTS
    # [block, vector, output, group, line, input] -> a line of a tile holds four inputs of each output
    words = q_OI.view(N, block // _LANES, _LANES, G, _TILE_INPUTS // 4, 4).permute(0, 3, 1, 4, 2, 5)
    scales = functional.pad(scale_O, (0, -outputs % block)).view(N, block).view(torch.uint8)
    return torch.cat([scales, words.reshape(N, -1).view(torch.uint8)], dim=-1).flatten()
