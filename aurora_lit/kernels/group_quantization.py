"""Weights of four and eight bits that share a scale in groups along the inputs, laid out as groups.hpp reads them.

Four bits: w = scale · q + min with q in 0…15, as llama.cpp's Q4_1. Eight bits: w = scale · q with q in -127…127, as its
Q8_0, stored as q + 128. Scales and minima are fp16. A weight that comes from such a file, group for group, is packed
into the very same numbers. Source: ggml-quants.c (quantize_row_q4_1_ref, quantize_row_q8_0_ref).

Shapes: O outputs, I inputs, both padded to whole blocks and groups; N blocks, G groups, F vectors of 16 outputs in a
block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BITS = {torch.int8: 8, torch.uint8: 4}
"""By the type that stands for it among packed weights."""
_LANES = 16


def pack(weight_OI: Tensor, *, bits: int, block: int, group: int) -> Tensor:
    """Quantise an fp32 weight; flat uint8: for each block of outputs and group of inputs scales, minima and words."""
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


def loses_nothing(weight_OI: Tensor, *, bits: int, group: int) -> bool:
    """Whether a weight's numbers are those of its packed form, so that it comes from a file of that form."""
    off = float((stored(weight_OI, bits=bits, group=group) - weight_OI).abs().max())
    return off <= 1e-6 * float(weight_OI.abs().max())


def stored(weight_OI: Tensor, *, bits: int, group: int) -> Tensor:
    """The numbers, in fp32, that a weight becomes by being packed."""
    outputs, inputs = weight_OI.shape
    padded_OGI = functional.pad(weight_OI, (0, -inputs % group)).view(outputs, -1, group)
    q_OGI, (scale_OG1, *minima) = _symmetric(padded_OGI) if bits == 8 else _affine(padded_OGI)
    found_OGI = scale_OG1 * (q_OGI.float() - 128) if bits == 8 else scale_OG1 * q_OGI + minima[0]
    return found_OGI.view(outputs, -1)[:, :inputs]


def _symmetric(weight_OGI: Tensor) -> tuple[Tensor, list[Tensor]]:
    scale_OG1 = (weight_OGI.abs().amax(-1, keepdim=True) / 127).half().float()
    q_OGI = (weight_OGI / scale_OG1.clamp_min(_SMALLEST)).round_().clamp_(-127, 127).add_(128)
    return q_OGI.to(torch.uint8), [scale_OG1]


def _affine(weight_OGI: Tensor) -> tuple[Tensor, list[Tensor]]:
    low_OG1, high_OG1 = weight_OGI.aminmax(dim=-1, keepdim=True)
    scale_OG1, min_OG1 = ((high_OG1 - low_OG1) / 15).half().float(), low_OG1.half().float()
    q_OGI = ((weight_OGI - min_OG1) / scale_OG1.clamp_min(_SMALLEST)).round_().clamp_(0, 15)
    return q_OGI.to(torch.uint8), [scale_OG1, min_OG1]


_SMALLEST = 2.0**-24  # of fp16 above zero: where all weights of a group are one number, any scale does
