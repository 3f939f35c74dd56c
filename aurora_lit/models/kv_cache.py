"""The KV cache: one preallocated slot for each running sequence.

Keys are stored transposed, head dimension before positions, so that the scores of neighbouring positions are adjacent
in memory. On the CPU they are stored in blocks of `KEY_BLOCK` positions, which the kernels read sequentially; on other
devices all positions form one block.

A round writes its new keys and values after the committed length of each sequence. A rejection only lowers that
length: every position beyond it is overwritten before any query attends to it.

Leaves out: attention over the cache (attention.py).

Shapes: S slots, G key-value heads, D head size, L positions, C blocks of P positions, B sequences.
"""

from __future__ import annotations

import torch

from aurora_lit.kernels import huge_pages, native


def padded_positions(capacity: int) -> int:
    """Positions that a slot of this capacity occupies in memory: whole blocks of keys."""
    return -(-capacity // native.KEY_BLOCK) * native.KEY_BLOCK


class KVCache:
    """Keys and values of every layer for `num_slots` sequences of up to `capacity` positions each."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        padded = padded_positions(capacity)
        block = native.KEY_BLOCK if torch.device(device).type == "cpu" else padded
        key_shape = (num_slots, num_kv_heads, padded // block, head_dim, block)
        value_shape = (num_slots, num_kv_heads, padded, head_dim)
        self.capacity = capacity
        self.keys_SGCDP = [_zeros(key_shape, dtype, device) for _ in range(num_layers)]
        self.values_SGLD = [_zeros(value_shape, dtype, device) for _ in range(num_layers)]

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to `slot`, in every layer."""
        for keys_SGCDP, values_SGLD in zip(self.keys_SGCDP, self.values_SGLD, strict=True):
            blocks, rest = divmod(length, keys_SGCDP.shape[-1])
            keys_SGCDP[slot, :, :blocks] = keys_SGCDP[source, :, :blocks]
            if rest:
                keys_SGCDP[slot, :, blocks, :, :rest] = keys_SGCDP[source, :, blocks, :, :rest]
            values_SGLD[slot, :, :length] = values_SGLD[source, :, :length]


def keys_by_position(keys_BGCDP: torch.Tensor) -> torch.Tensor:
    """Join the blocks of keys: [B, G, D, C·P]."""
    return keys_BGCDP.transpose(2, 3).flatten(3)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return huge_pages.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
