"""The KV cache: one preallocated slot for each running sequence.

Keys are stored transposed, head dimension before positions, so that the scores of neighbouring positions are adjacent
in memory. On the CPU they are stored in blocks of `KEY_BLOCK` positions, which the kernels read sequentially; on other
devices all positions form one block.

Where the kernels use matrix tiles, which multiply pairs of bf16 values, E = 2 neighbouring dimensions of a key and E
neighbouring positions of a value are stored together; elsewhere E = 1.

Slots of at most `TAKEN_POSITIONS` are on huge pages and take their memory at the start. Longer ones are seldom filled,
and with huge pages a slot's first token would take one for every head of every layer, which may be all of it; so they
are on small pages, and take memory as they fill.

A round writes its new keys and values after the committed length of each sequence. A rejection only lowers that
length: every position beyond it is overwritten before any query attends to it.

Leaves out: attention over the cache (attention.py).

Shapes: S slots, G key-value heads, D head size (Q = D / E), L positions (M = L / E), C blocks of P positions,
B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from aurora_lit.kernels import huge_pages, native

TAKEN_POSITIONS = 4096
"""Small pages made passes of eight sequences 4 to 15 % longer (docs/log.md)."""


def padded_positions(capacity: int) -> int:
    """Positions that a slot of this capacity occupies in memory: whole blocks of keys."""
    return -(-capacity // native.KEY_BLOCK) * native.KEY_BLOCK


def cache_bytes(
    *, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, capacity: int, element_bytes: int
) -> int:
    """Memory that a `KVCache` of these sizes takes once all of it has been written."""
    return 2 * num_layers * num_slots * num_kv_heads * head_dim * padded_positions(capacity) * element_bytes


def kv_heads_of(config: Any) -> int:
    """Key-value heads of a model, by its (text) configuration."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim_of(config: Any) -> int:
    """Size of a model's heads, by its (text) configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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
        padded, on_cpu = padded_positions(capacity), torch.device(device).type == "cpu"
        block = native.KEY_BLOCK if on_cpu else padded
        pair = native.cache_pair(dtype, head_dim) if on_cpu else 1
        key_shape = (num_slots, num_kv_heads, padded // block, head_dim // pair, block, pair)
        value_shape = (num_slots, num_kv_heads, padded // pair, head_dim, pair)
        self.capacity = capacity
        zeros = (
            huge_pages.zeros if on_cpu and capacity <= TAKEN_POSITIONS else partial(huge_pages.growing, device=device)
        )
        self.keys_SGCQPE = [zeros(key_shape, dtype) for _ in range(num_layers)]
        self.values_SGMDE = [zeros(value_shape, dtype) for _ in range(num_layers)]

    def touch(self) -> Iterator[None]:
        """Have the system allocate the memory of slots on huge pages, a page a step, before rounds wait for it.

        The layers' slots share pages, so a slot's first positions, or a prefix that is copied to it, take a page of
        every layer's keys and values: a round of half a second.
        """
        if self.keys_SGCQPE[0].device.type == "cpu" and self.capacity <= TAKEN_POSITIONS:
            for each in (*self.keys_SGCQPE, *self.values_SGMDE):
                yield from huge_pages.touch(each)

    def copy_prefix(self, source: int, slot: int, length: int, *, start: int = 0) -> None:
        """Copy the first `length` positions of slot `source` to `slot`, in every layer.

        `start`: positions that `slot` has already; of them only those in a block that is copied whole are written.
        """
        for keys_SGCQPE, values_SGMDE in zip(self.keys_SGCQPE, self.values_SGMDE, strict=True):
            block, pair = keys_SGCQPE.shape[-2], values_SGMDE.shape[-1]
            blocks, rest = divmod(length, block)
            lacking = slice(start // block, blocks)
            keys_SGCQPE[slot, :, lacking] = keys_SGCQPE[source, :, lacking]
            if rest:
                begin = max(0, start - blocks * block)  # on a GPU all positions are one block
                keys_SGCQPE[slot, :, blocks, :, begin:rest] = keys_SGCQPE[source, :, blocks, :, begin:rest]
            pairs, rest = divmod(length, pair)
            lacking = slice(start // pair, pairs)
            values_SGMDE[slot, :, lacking] = values_SGMDE[source, :, lacking]
            if rest:
                values_SGMDE[slot, :, pairs, :, :rest] = values_SGMDE[source, :, pairs, :, :rest]


def keys_by_position(keys_BGCQPE: torch.Tensor) -> torch.Tensor:
    """Join the blocks of keys: [B, G, D, C·P]."""
    return keys_BGCQPE.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)


def values_by_position(values_BGMDE: torch.Tensor) -> torch.Tensor:
    """Values [B, G, L, D]."""
    return values_BGMDE.transpose(-1, -2).flatten(2, 3)
