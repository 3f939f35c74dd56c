"""Weights of eight bits with a scale an output: quantised, laid out as byte_tiles.hpp reads them; how far off they are.

w = scale · q with q in -127…127 and an fp32 scale: coarser than a scale a group (kernels/group_quantization.py), and quicker to
multiply. Used where numbers need not be exact, or are looked at again where it matters.

Shapes: O outputs, I inputs, both padded to whole blocks and groups; N blocks, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_GROUP, _HALF = 64, 16
"""Inputs of a tile; outputs of half a block."""


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 [O, I] and the scale of each output, fp32 [O]."""
    scale_O = weight_OI.abs().amax(-1) / 127
    q_OI = (weight_OI / scale_O.clamp_min(_SMALLEST)[:, None]).round_().clamp_(-127, 127)
    return q_OI.to(torch.int8), scale_O


def pack(q_OI: Tensor, scale_O: Tensor, *, block: int) -> Tensor:
    """What `quantise` gave, flat uint8: for each block of outputs their scales, then groups of inputs."""
    outputs, inputs = q_OI.shape
    q_OI = functional.pad(q_OI, (0, -inputs % _GROUP, 0, -outputs % block))
    N, G = len(q_OI) // block, q_OI.shape[1] // _GROUP
    # [block, half, output, group, line, input] -> what a tile's line holds: four inputs of each output
    words = q_OI.view(N, block // _HALF, _HALF, G, _GROUP // 4, 4).permute(0, 3, 1, 4, 2, 5)
    scales = functional.pad(scale_O, (0, -outputs % block)).view(N, block).view(torch.uint8)
    return torch.cat([scales, words.reshape(N, -1).view(torch.uint8)], dim=-1).flatten()


def errors(weight_OI: Tensor, q_OI: Tensor, scale_O: Tensor) -> tuple[Tensor, Tensor]:
    """Norms, fp32 [O]: of what quantising changed in each output's weights, and the larger of both weights'."""
    found_OI = q_OI.float() * scale_O[:, None]
    return (found_OI - weight_OI).norm(dim=-1), torch.maximum(found_OI.norm(dim=-1), weight_OI.norm(dim=-1))


_SMALLEST = 1e-30
