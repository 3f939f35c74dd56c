"""Sampling in native code: the noise that tokens are drawn with (csrc/noise.hpp).

Shapes: V tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aurora_lit.kernels import native


def noise(key: int, position: int, token_id_V: Tensor) -> tuple[Tensor, Tensor]:
    """The hash's bits, int64 [V], and the noise, fp32 [V], that the kernels use for some tokens of one draw.

    `gumbel` in modules/sampling/noise.py is the reference.
    """
    kernels = native.library()
    assert kernels is not None
    token_id_V = token_id_V.long().contiguous()
    bits_V, noise_V = torch.empty_like(token_id_V), torch.empty(len(token_id_V))
    draw = (ctypes.c_int64(key), ctypes.c_int64(position))
    tensors = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (bits_V, noise_V))
    kernels.aurora_noise(*draw, ctypes.c_void_p(token_id_V.data_ptr()), ctypes.c_int64(len(token_id_V)), *tensors)
    return bits_V, noise_V
