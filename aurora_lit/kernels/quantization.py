"""Weights quantised to 8 or 4 bits and laid out as the kernels read them.

Grouped formats (csrc/grouped.hpp) have scales for groups of inputs. 4 bits: w = scale · q + min with q in 0…15, as
llama.cpp's Q4_1. 8 bits: w = scale · q with q in -127…127, as its Q8_0, stored as q + 128. Scales and minima are fp16.
A weight that was read from such a file, with the same groups, is packed into the very same numbers. Source:
ggml-quants.c (quantize_row_q4_1_ref, quantize_row_q8_0_ref).

The per-output format (csrc/int8_tiles.hpp) has one fp32 scale for each output: w = scale · q with q in -127…127. It is
less precise and faster to multiply. It is used where numbers need not be exact (a draft), or where an exact
computation follows (`matmul.Screen`).

Shapes: O outputs, I inputs, both padded to whole blocks and groups; N blocks, G groups, F vectors of 16 outputs in a
block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LANES = 16
"""Outputs of one vector: half a block."""
_TILE_INPUTS = 64
"""Inputs of one int8 tile."""
_MIN_FP16_SCALE = 2.0**-24  # the smallest positive fp16; if all weights of a group are equal, any scale will do
_MIN_FP32_SCALE = 1e-30


def pack_grouped(weight_OI: Tensor, *, bits: int, block: int, group: int) -> Tensor:
    """Quantise an fp32 weight in groups of inputs; flat uint8.

    For each block of outputs and each group of inputs: scales, minima (4 bits only) and words of weights.
    """
    outputs, inputs = weight_OI.shape
    padded_OI = functional.pad(weight_OI, (0, -inputs % group, 0, -outputs % block))
    N, G, F = len(padded_OI) // block, padded_OI.shape[1] // group, block // _LANES
    q_OI, headers = _symmetric(padded_OI.view(-1, G, group)) if bits == 8 else _affine(padded_OI.view(-1, G, group))
    shares = 16 // bits  # pairs of inputs in a lane
    # [block, vector, output, group, line, share, half] -> a group's lines of lanes, each half word from its low bits up
    words = q_OI.view(N, F, _LANES, G, -1, shares, 2).permute(0, 3, 1, 4, 2, 6, 5)
    if bits == 4:
        words = words[..., 0::2] | words[..., 1::2] << 4
    parts = [header.half().view(N, block, G).transpose(1, 2).contiguous().view(torch.uint8) for header in headers]
    return torch.cat([*parts, words.reshape(N, G, -1)], dim=-1).flatten()


def dequantized_grouped(weight_OI: Tensor, *, bits: int, group: int) -> Tensor:
    """The values, in fp32, that a weight has after `pack_grouped`."""
    outputs, inputs = weight_OI.shape
    padded_OGI = functional.pad(weight_OI, (0, -inputs % group)).view(outputs, -1, group)
    q_OGI, (scale_OG1, *minima) = _symmetric(padded_OGI) if bits == 8 else _affine(padded_OGI)
    value_OGI = scale_OG1 * (q_OGI.float() - 128) if bits == 8 else scale_OG1 * q_OGI + minima[0]
    return value_OGI.view(outputs, -1)[:, :inputs]


def is_lossless_grouped(weight_OI: Tensor, *, bits: int, group: int) -> bool:
    """True if `pack_grouped` changes no value: the weight was read from a file in that format."""
    error = float((dequantized_grouped(weight_OI, bits=bits, group=group) - weight_OI).abs().max())
    return error <= 1e-6 * float(weight_OI.abs().max())


def _symmetric(weight_OGI: Tensor) -> tuple[Tensor, list[Tensor]]:
    scale_OG1 = (weight_OGI.abs().amax(-1, keepdim=True) / 127).half().float()
    q_OGI = (weight_OGI / scale_OG1.clamp_min(_MIN_FP16_SCALE)).round_().clamp_(-127, 127).add_(128)
    return q_OGI.to(torch.uint8), [scale_OG1]


def _affine(weight_OGI: Tensor) -> tuple[Tensor, list[Tensor]]:
    low_OG1, high_OG1 = weight_OGI.aminmax(dim=-1, keepdim=True)
    scale_OG1, min_OG1 = ((high_OG1 - low_OG1) / 15).half().float(), low_OG1.half().float()
    q_OGI = ((weight_OGI - min_OG1) / scale_OG1.clamp_min(_MIN_FP16_SCALE)).round_().clamp_(0, 15)
    return q_OGI.to(torch.uint8), [scale_OG1, min_OG1]


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


def per_output_error_norms(weight_OI: Tensor, q_OI: Tensor, scale_O: Tensor) -> tuple[Tensor, Tensor]:
    """Two L2 norms for each output, fp32 [O]: of the quantisation error, and of the larger of both weights."""
    dequantized_OI = q_OI.float() * scale_O[:, None]
    error_O = (dequantized_OI - weight_OI).norm(dim=-1)
    return error_O, torch.maximum(dequantized_OI.norm(dim=-1), weight_OI.norm(dim=-1))
