"""Tensors on huge pages, for memory that every forward pass reads from end to end: weights, keys and values.

With pages of 4 KiB, a pass spends as long on address translation as on reading, and neighbouring pages compete for the
same cache lines. On systems without huge pages the tensors are ordinary ones. Tensors that are rarely read are on small
pages instead, so that they take memory only where they were written (`growing`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

_PAGE_BYTES = 1 << 21
_ARENA_BYTES = 16 << 20
"""Size of a mapping that several small tensors share."""
_arenas: list[torch.Tensor] = []
"""At most one: the unused rest of the current arena."""
_arena_lock = threading.Lock()  # a new draft is packed in another thread while serving


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor; small ones share an arena, which lives as long as any of them."""
    num_bytes = numel * dtype.itemsize
    if num_bytes > _ARENA_BYTES // 4:
        return _map(num_bytes)[:num_bytes].view(dtype)
    with _arena_lock:
        if not _arenas or _arenas[0].numel() < num_bytes:
            _arenas[:] = [_map(_ARENA_BYTES)]
        raw = _arenas[0]
        _arenas[0] = raw[-(-num_bytes // 64) * 64 :]
    return raw[:num_bytes].view(dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros with its own mapping, whose memory the system allocates now.

    Otherwise whoever first writes to a page waits for it, 4 ms on a virtual machine.
    """
    raw = _map(math.prod(shape) * dtype.itemsize)
    raw[::_PAGE_BYTES] = 0
    return raw.view(dtype).view(tuple(shape))


def growing(shape: Sequence[int], dtype: torch.dtype, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of zeros on small pages; the system gives each page its memory when it is first written.

    On another device it is an ordinary one.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    raw = _map(math.prod(shape) * dtype.itemsize, advice="MADV_NOHUGEPAGE")
    return raw.view(dtype).view(tuple(shape))


def _map(num_bytes: int, *, advice: str = "MADV_HUGEPAGE") -> torch.Tensor:
    """A new mapping of its own: memory from malloc may have been used before, and then it stays as it is."""
    if sys.platform != "linux" or num_bytes < _PAGE_BYTES:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    area = mmap.mmap(-1, num_bytes + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(getattr(mmap, advice))
    raw = torch.frombuffer(area, dtype=torch.uint8)
    offset = -raw.data_ptr() % _PAGE_BYTES
    return raw[offset : offset + num_bytes]
