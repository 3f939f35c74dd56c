"""The KV cache: one preallocated slot for each running sequence.

Keys are stored transposed, head dimension before positions, so that the scores of neighbouring positions are adjacent
in memory. On the CPU they are stored in blocks of `KEY_BLOCK` positions, which the kernels read sequentially; on other
devices all positions form one block.

Where the kernels use matrix tiles, which multiply pairs of bf16 values, E = 2 neighbouring dimensions of a key and E
neighbouring positions of a value are stored together; elsewhere E = 1.

Slots of at most `TAKEN_POSITIONS` are on huge pages and take their memory at the start. Longer ones are seldom filled,
and with huge pages a slot's first token would take one for every head of every layer, which may be all of it; so they
are on small pages, and take memory as they fill.

Beside the slots, a pool holds blocks of prompts that have left theirs: a cache whose slots are one block long.

A round writes its new keys and values after the committed length of each sequence. A rejection only lowers that
length: every position beyond it is overwritten before any query attends to it.

Leaves out: attention over the cache (attention.py).

Shapes: S slots, G key-value heads, D head size (Q = D / E), L positions (M = L / E), C blocks of P positions,
N slots of a pool, T positions in a row, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
        is_pool: bool = False,
    ) -> None:
        """`is_pool`: some of its many slots may never be used, so that memory is taken as they fill, on small pages."""
        padded, on_cpu = padded_positions(capacity), torch.device(device).type == "cpu"
        block = native.KEY_BLOCK if on_cpu else padded
        pair = native.cache_pair(dtype, head_dim) if on_cpu else 1
        key_shape = (num_slots, num_kv_heads, padded // block, head_dim // pair, block, pair)
        value_shape = (num_slots, num_kv_heads, padded // pair, head_dim, pair)
        self.capacity = capacity
        zeros = (
            huge_pages.zeros
            if on_cpu and capacity <= TAKEN_POSITIONS and not is_pool
            else partial(huge_pages.growing, device=device)
        )
        self.keys_SGCQPE = [zeros(key_shape, dtype) for _ in range(num_layers)]
        self.values_SGMDE = [zeros(value_shape, dtype) for _ in range(num_layers)]

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

    def blocks(self) -> Iterator[torch.Tensor]:
        """Views [S, C, …] of every layer's keys and values by blocks of `KEY_BLOCK` positions."""
        for keys_SGCQPE, values_SGMDE in zip(self.keys_SGCQPE, self.values_SGMDE, strict=True):
            (S, G, C, Q, P, E), block = keys_SGCQPE.shape, native.KEY_BLOCK
            # On a GPU all positions of keys are one block: one of the dimensions that are joined has size 1.
            in_blocks = keys_SGCQPE.view(S, G, C, Q, P // block, block, E).permute(0, 2, 4, 1, 3, 5, 6)
            yield in_blocks.flatten(1, 2)
            yield values_SGMDE.view(S, G, C * P // block, block // E, *values_SGMDE.shape[3:]).transpose(1, 2)

    def copy_blocks(self, pool: KVCache, *, slot: int, first: int, places: Sequence[int], to_pool: bool) -> None:
        """Copy the blocks of a slot from number `first` on to the pool's slots `places`, or back from there."""
        kept = (blocks_NCX[:, 0] for blocks_NCX in pool.blocks())
        copy_blocks(zip(self.blocks(), kept, strict=True), slot=slot, first=first, places=places, to_pool=to_pool)

    def read(self, slot: int, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [T, G, Q, E] and values [T, G, D] of the first layer."""
        (keys_GCQPE, values_GMDE), block, pair = self._first_layer(slot), *self._block_and_pair
        keys_TGQE = keys_GCQPE[:, positions_T // block, :, positions_T % block]
        return keys_TGQE, values_GMDE[:, positions_T // pair, :, positions_T % pair]

    def write(self, slot: int, positions_T: torch.Tensor, keys_TGQE: torch.Tensor, values_TGD: torch.Tensor) -> None:
        """Write keys and values of the first layer, as `read` returns them."""
        (keys_GCQPE, values_GMDE), block, pair = self._first_layer(slot), *self._block_and_pair
        keys_GCQPE[:, positions_T // block, :, positions_T % block] = keys_TGQE
        values_GMDE[:, positions_T // pair, :, positions_T % pair] = values_TGD

    def _first_layer(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys_SGCQPE[0][slot], self.values_SGMDE[0][slot]

    @property
    def _block_and_pair(self) -> tuple[int, int]:
        return self.keys_SGCQPE[0].shape[-2], self.values_SGMDE[0].shape[-1]


def state_blocks(states_SLX: torch.Tensor) -> torch.Tensor:
    """A view [S, C, P, X] of what is stored by slot and position: its whole blocks of `KEY_BLOCK` positions."""
    block = native.KEY_BLOCK
    num_blocks = states_SLX.shape[1] // block
    return states_SLX[:, : num_blocks * block].view(len(states_SLX), num_blocks, block, *states_SLX.shape[2:])


def state_pool(states_SLX: torch.Tensor, num_places: int) -> torch.Tensor:
    """Room [N, P, X] for as many blocks of such states, on the CPU on small pages."""
    shape = (num_places, native.KEY_BLOCK, *states_SLX.shape[2:])
    return huge_pages.growing(shape, states_SLX.dtype, device=states_SLX.device)


def copy_blocks(
    tables: Iterable[tuple[torch.Tensor, torch.Tensor]], *, slot: int, first: int, places: Sequence[int], to_pool: bool
) -> None:
    """Copy blocks number `first`, … of a slot [S, C, …] to `places` of a pool [N, …], or back, in each pair of tables.

    Neighbouring places are copied at once.
    """
    runs: list[tuple[int, int, int]] = []  # block of the slot, place in the pool, how many
    for block, place in enumerate(places, first):
        if runs and place == runs[-1][1] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((block, place, 1))
    for slots_SCX, pool_NX in tables:
        for block, place, count in runs:
            own, kept = slots_SCX[slot, block : block + count], pool_NX[place : place + count]
            if to_pool:
                kept.copy_(own)
            else:
                own.copy_(kept)


def keys_by_position(keys_BGCQPE: torch.Tensor) -> torch.Tensor:
    """Join the blocks of keys: [B, G, D, C·P]."""
    return keys_BGCQPE.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(2, 3)


def values_by_position(values_BGMDE: torch.Tensor) -> torch.Tensor:
    """Values [B, G, L, D]."""
    return values_BGMDE.transpose(-1, -2).flatten(2, 3)
