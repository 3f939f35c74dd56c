"""What weights and inputs are after a kernel's rounding: the formats written down from their definition."""

from __future__ import annotations

import torch

from aurora_lit.kernels import native

FLOATS = [torch.float32, torch.bfloat16]
GROUPED = {torch.int8: 8, torch.uint8: 4}
BYTES = [native.BYTES] if native.has_byte_tiles() else []


def groups(x: torch.Tensor) -> torch.Tensor:
    """[..., inputs] in groups of 32, zeros behind the last one."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32)).double()


def stored(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as its format has it: llama.cpp's Q8_0 and Q4_1, written down from their definition; a scale a row."""
    if dtype in FLOATS:
        return weight.to(dtype).double()
    if dtype in BYTES:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale.clamp_min(1e-30)).round().double() * scale.double()
    grouped = groups(weight)
    if GROUPED[dtype] == 8:
        scale, low = (grouped.abs().amax(-1, keepdim=True) / 127).half().double(), torch.zeros(1).double()
        q = (grouped / scale).round().clamp(-127, 127)
    else:
        low = grouped.amin(-1, keepdim=True)
        scale, low = ((grouped.amax(-1, keepdim=True) - low) / 15).half().double(), low.half().double()
        q = ((grouped - low) / scale).round().clamp(0, 15)
    return torch.where(scale > 0, q * scale + low, low).flatten(-2)[..., : weight.shape[-1]]


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inputs as the kernels take them: twelve bits a group beside weights of four, sixteen beside those of eight."""
    if dtype in FLOATS:
        return x.to(dtype).double()
    if dtype in BYTES:
        limit, most = 127 * 256 + 127, x.abs().amax(-1, keepdim=True)
        return (x * (limit / most)).round().double() * most.double() / limit
    limit, most = {8: 127 * 256 + 127, 4: 127 * 16 + 7}[GROUPED[dtype]], groups(x).abs().amax(-1, keepdim=True)
    q = (groups(x).float() * (limit / most.float())).round()  # in the kernel's own arithmetic, so that ties fall alike
    return (q * most / limit).flatten(-2)[..., : x.shape[-1]]
