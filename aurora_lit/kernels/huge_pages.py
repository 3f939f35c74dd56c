"""Tensors on huge pages, for what rounds read from end to end: weights, keys and values.

With pages of 4 KiB a pass spends as long looking up addresses as reading what is there, and neighbouring pages lie in
the caches' way. Where the system has none, the tensors are like any others.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

_PAGE = 1 << 21
_AREA_BYTES = 16 << 20
"""Of huge pages, for tensors that are too small for pages of their own."""
_areas: list[torch.Tensor] = []
_area_lock = threading.Lock()  # a new draft is packed beside serving


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor; those smaller than a few pages share an area, which lives as long as any of them."""
    size = numel * dtype.itemsize
    if size > _AREA_BYTES // 4:
        return _map(size)[:size].view(dtype)
    with _area_lock:
        if not _areas or _areas[0].numel() < size:
            _areas[:] = [_map(_AREA_BYTES)]
        raw = _areas[0]
        _areas[0] = raw[-(-size // 64) * 64 :]
    return raw[:size].view(dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros with a mapping of its own; memory is taken when it is written to."""
    return _map(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


def _map(size: int) -> torch.Tensor:
    """Mapped for itself: what malloc gives may have been used before, and then it lies on small pages for good."""
    if sys.platform != "linux" or size < _PAGE:
        return torch.zeros(size, dtype=torch.uint8)
    area = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(area, dtype=torch.uint8)
    offset = -raw.data_ptr() % _PAGE
    return raw[offset : offset + size]
