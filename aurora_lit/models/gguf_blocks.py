"""What is stored in the blocks of a GGUF file: values, or the numbers of a grouped format, not rounded again.

    values_OI = values(file, "blk.0.attn_q.weight")                       # fp32, as the gguf package has them
    codes, weight_format = codes(file, "blk.0.attn_q.weight")

The codes of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have exactly the file's values. In the K types a scale is the product of
an fp16 and a 6-bit or 8-bit number, which fp16 does not hold: scale and minimum are rounded together, such that no
value of a group is off by more than `TOLERANCE` of the group's largest one.

Leaves out the file's header (gguf.py). Source of the blocks' layouts: ggml-common.h.

Shapes: O outputs, I inputs, G groups of an output's inputs, B blocks of an output, R groups that are rounded again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from aurora_lit.errors import SourceError
from aurora_lit.kernels.quantization import Codes
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.gguf import GgufFile

TOLERANCE = 2.0**-10
"""Largest difference of a value from the file's, as a share of the largest absolute value of its group."""
FORMATS = {
    GGMLQuantizationType.Q4_0: WeightFormat.INT4_GROUPED,
    GGMLQuantizationType.Q4_1: WeightFormat.INT4_GROUPED,
    GGMLQuantizationType.Q4_K: WeightFormat.INT4_GROUPED,
    GGMLQuantizationType.Q5_0: WeightFormat.INT5_GROUPED,
    GGMLQuantizationType.Q5_1: WeightFormat.INT5_GROUPED,
    GGMLQuantizationType.Q5_K: WeightFormat.INT5_GROUPED,
    GGMLQuantizationType.Q6_K: WeightFormat.INT6_GROUPED,
    GGMLQuantizationType.Q8_0: WeightFormat.INT8_GROUPED,
}
"""The format that holds the codes of a type."""


def values(file: GgufFile, name: str, begin: int = 0, end: int | None = None) -> Tensor:
    """The values of a tensor's rows from `begin` to `end`, fp32; a vector is returned whole. Raises SourceError."""
    entry = file.tensors[name]
    try:
        found = dequantize(file.rows(name, begin, end), entry.type)
    except NotImplementedError as error:
        raise SourceError(
            f"target.source: {name} in {file.path} is in {entry.type.name}, which is not read; name a file in another "
            "quantisation, such as Q4_K_M or Q8_0"
        ) from error
    shape = entry.shape if len(entry.shape) == 1 else (-1, *entry.shape[1:])
    return torch.from_numpy(found.astype(np.float32, copy=False)).view(shape)


def codes(file: GgufFile, name: str, begin: int = 0, end: int | None = None) -> tuple[Codes, WeightFormat] | None:
    """The numbers of a matrix's rows in a grouped format; None if none holds them within `TOLERANCE`."""
    kind = file.tensors[name].type
    if kind not in FORMATS:
        return None
    found = _codes_of(file.rows(name, begin, end), kind)
    return None if found is None else (found, FORMATS[kind])


# -- blocks to codes ---------------------------------------------------------------------------------------------------
#
# Eight codes are computed at a time, as bytes of one integer of 64 bits; W counts these words of a block.

_LOW = 0x0F0F0F0F0F0F0F0F
"""The low half of each of eight bytes."""
_FIFTH = np.array([sum((byte >> bit & 1) << 8 * bit + 4 for bit in range(8)) for byte in range(256)], dtype=np.uint64)
"""The bits of a byte, each as the fifth bit of a byte of its own."""
_LAYOUTS: dict[GGMLQuantizationType, list[Any]] = {
    GGMLQuantizationType.Q4_0: [("d", "<f2"), ("q", "<u8", 2)],
    GGMLQuantizationType.Q4_1: [("d", "<f2"), ("m", "<f2"), ("q", "<u8", 2)],
    GGMLQuantizationType.Q5_0: [("d", "<f2"), ("fifth", "u1", 4), ("q", "<u8", 2)],
    GGMLQuantizationType.Q5_1: [("d", "<f2"), ("m", "<f2"), ("fifth", "u1", 4), ("q", "<u8", 2)],
    GGMLQuantizationType.Q8_0: [("d", "<f2"), ("q", "<u8", 4)],
    GGMLQuantizationType.Q4_K: [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("q", "<u8", (4, 4))],
    GGMLQuantizationType.Q5_K: [
        *[("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12)],
        *[("fifth", "<u8", 4), ("q", "<u8", (4, 4))],
    ],
    GGMLQuantizationType.Q6_K: [
        *[("q", "<u8", (2, 8)), ("high", "<u8", (2, 4))],
        *[("scales", "i1", 16), ("d", "<f2")],
    ],
}
"""A block's fields; d and m are its scale and minimum, or their factors."""


def _codes_of(rows: np.ndarray, kind: GGMLQuantizationType) -> Codes | None:
    """The codes of some rows of blocks [O, bytes]; None if fp16 does not hold their scales within `TOLERANCE`."""
    blocks = rows.view(np.dtype(_LAYOUTS[kind]))  # [O, B]
    scale_OB, low_OBW = _float(blocks["d"]), np.ascontiguousarray(blocks["q"])
    if kind is GGMLQuantizationType.Q8_0:
        return Codes(_bytes(low_OBW ^ 0x8080808080808080), scale_OB, None)
    if kind is GGMLQuantizationType.Q6_K:
        return _q6_k(blocks, low_OBW, scale_OB)
    if "scales" in (blocks.dtype.names or ()):
        words = np.stack([low_OBW & _LOW, low_OBW >> 4 & _LOW], axis=3)  # [O, B, 4, 2, 4]: a group is four words
        if kind is GGMLQuantizationType.Q5_K:
            fifth = blocks["fifth"][:, :, None, :] >> np.arange(8, dtype=np.uint64)[:, None] & 0x0101010101010101
            words |= (fifth << 4).reshape(words.shape)
        most = 31 if kind is GGMLQuantizationType.Q5_K else 15
        return _rounded_affine(_bytes(words), *_k_scales(blocks["scales"], scale_OB, _float(blocks["m"])), most)
    words = np.concatenate([low_OBW & _LOW, low_OBW >> 4 & _LOW], axis=2)
    if "fifth" in (blocks.dtype.names or ()):
        words |= _FIFTH[blocks["fifth"]]
    if "m" in (blocks.dtype.names or ()):
        return Codes(_bytes(words), scale_OB, _float(blocks["m"]))
    return Codes(_bytes(words), scale_OB, scale_OB * (-16 if kind is GGMLQuantizationType.Q5_0 else -8))


def _float(numbers: np.ndarray) -> Tensor:
    """fp16 numbers as fp32."""
    return torch.from_numpy(numbers.astype(np.float32))


def _bytes(words: np.ndarray) -> Tensor:
    """Codes [O, I] of words [O, ...]."""
    return torch.from_numpy(words.reshape(len(words), -1).view(np.uint8))


def _q6_k(blocks: np.ndarray, low_OBW: np.ndarray, scale_OB: Tensor) -> Codes | None:
    words = np.stack([low_OBW & _LOW, low_OBW >> 4 & _LOW], axis=3).reshape(*blocks.shape, 2, 4, 4)
    high = blocks["high"][:, :, :, None, :] >> np.arange(0, 8, 2, dtype=np.uint64)[:, None] & 0x0303030303030303
    words |= high << 4
    own_OG = (scale_OB.unsqueeze(-1) * torch.from_numpy(blocks["scales"].astype(np.float32))).flatten(1)
    scale_OG = own_OG.half().float()
    # All values of a group are off by the same share.
    if not bool(((scale_OG - own_OG).abs() <= TOLERANCE * own_OG.abs()).all()):
        return None
    return Codes(_bytes(words), scale_OG, None)


def _k_scales(packed: np.ndarray, scale_OB: Tensor, min_OB: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the groups of Q4_K and Q5_K before they are rounded, fp32 [O, G]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1).astype(np.float32)
    return (
        (scale_OB.unsqueeze(-1) * torch.from_numpy(scales)).flatten(1),
        (-min_OB.unsqueeze(-1) * torch.from_numpy(minima)).flatten(1),
    )


def _rounded_affine(q_OI: Tensor, own_scale_OG: Tensor, own_min_OG: Tensor, most: int) -> Codes | None:
    """Codes whose scales and minima are rounded to fp16; None if they are not within `TOLERANCE`.

    Where rounding to the nearest is not enough, scale and minimum are chosen together, since their errors may cancel,
    or the group is counted from its largest value down. A value's error is linear in its code, so the errors at the
    group's smallest and largest codes bound it.
    """
    q_GI = q_OI.view(-1, 32)
    low_G, high_G = (each.float() for each in q_GI.aminmax(dim=-1))
    own_G = (own_scale_OG.flatten(), own_min_OG.flatten())
    largest_G = TOLERANCE * torch.maximum(*((own_G[0] * code_G + own_G[1]).abs() for code_G in (low_G, high_G)))
    scale_G, min_G = (each.half().float() for each in own_G)
    error_G = torch.maximum(*(((scale_G - own_G[0]) * code_G + min_G - own_G[1]).abs() for code_G in (low_G, high_G)))
    rest_R = (~(error_G <= largest_G)).nonzero()[:, 0]
    if len(rest_R):
        own_scale_R, own_min_R = (each[rest_R] for each in own_G)
        code_2R = torch.stack([low_G[rest_R], high_G[rest_R]])
        value_2R = own_scale_R * code_2R + own_min_R
        choices, errors = [], []
        for is_down in (False, True):
            scale_C1R = _neighbours(-own_scale_R if is_down else own_scale_R)[:, None]
            min_1CR = _neighbours(own_min_R + most * own_scale_R if is_down else own_min_R)[None]
            low_R, high_R = most - code_2R if is_down else code_2R
            error_CCR = torch.maximum(
                (scale_C1R * low_R + min_1CR - value_2R[0]).abs(), (scale_C1R * high_R + min_1CR - value_2R[1]).abs()
            )
            numbers = (scale_C1R, min_1CR, torch.tensor(float(is_down)))
            choices.append(torch.stack([each.expand_as(error_CCR).flatten(0, 1) for each in numbers]))
            errors.append(error_CCR.flatten(0, 1).nan_to_num(torch.inf))
        error_R, best_R = torch.cat(errors).min(dim=0)
        if not bool((error_R <= largest_G[rest_R]).all()):
            return None
        scale_G[rest_R], min_G[rest_R], is_down_R = torch.cat(choices, dim=1)[:, best_R, torch.arange(len(rest_R))]
        down = rest_R[is_down_R.bool()]
        q_GI[down] = most - q_GI[down]
    return Codes(q_OI, scale_G.view_as(own_scale_OG), min_G.view_as(own_min_OG))


def _neighbours(value_R: Tensor) -> Tensor:
    """The five fp16 numbers nearest to each of some, fp32 [5, R]."""
    nearest_R = value_R.half()
    infinite_R = torch.full_like(nearest_R, torch.inf)
    up_R, down_R = (torch.nextafter(nearest_R, limit_R) for limit_R in (infinite_R, -infinite_R))
    further = [torch.nextafter(up_R, infinite_R), torch.nextafter(down_R, -infinite_R)]
    return torch.stack([nearest_R, up_R, down_R, *further]).float()
