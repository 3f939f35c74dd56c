"""The key-value cache: one preallocated slot a running request, and attention over it.

Keys lie transposed (D before positions), so that the scores of neighbouring positions are neighbours in memory: on the
CPU in blocks of positions, which kernels read as one stream, elsewhere all positions in one block. A round
writes its new keys and values behind each row's committed length; rejection only moves that length back, since what
lies behind it is overwritten before it is ever attended to.

Shapes: S slots, B rows of a batch, T new positions, N query heads, G key-value heads, D head size, L positions,
C blocks of P positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from aurora_lit.errors import SourceError
from aurora_lit.kernels import huge_pages, native


def padded_positions(capacity: int) -> int:
    """Positions that a slot takes in memory."""
    return -(-capacity // native.KEY_BLOCK) * native.KEY_BLOCK


class KVSlots:
    """Keys and values of every layer for `num_slots` requests of up to `capacity` positions."""

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

    def copy(self, source: int, slot: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for keys_SGCDP, values_SGLD in zip(self.keys_SGCDP, self.values_SGLD, strict=True):
            blocks, rest = divmod(length, keys_SGCDP.shape[-1])
            keys_SGCDP[slot, :, :blocks] = keys_SGCDP[source, :, :blocks]
            if rest:
                keys_SGCDP[slot, :, blocks, :, :rest] = keys_SGCDP[source, :, blocks, :, :rest]
            values_SGLD[slot, :, :length] = values_SGLD[source, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return huge_pages.zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


class SlotView:
    """The slots and lengths one forward pass works on; handed through the model to its attention."""

    def __init__(self, slots: KVSlots, *, slots_B: torch.Tensor, starts_B: torch.Tensor) -> None:
        """`slots_B` int64: where each row lives; `starts_B` int64: positions it already holds."""
        self.slots = slots
        self.slots_B = slots_B
        self.starts_B = starts_B
        self.written: set[int] = set()
        """Layers that have attended."""

    def attend(
        self,
        layer: int,
        query_BNTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values, then attend causally over each row; returns [B, T, N, D].

        `window`: positions seen, the own one included; `softcap`: scores become cap·tanh(score / cap); `sinks_N`: a
        score a head that takes part in the softmax and adds nothing (gpt-oss). Raises SourceError where keys or values
        have another shape than the slots.
        """
        new = (query_BNTD, key_BGTD, value_BGTD)
        held = (self.slots.keys_SGCDP[layer], self.slots.values_SGLD[layer], self.slots_B, self.starts_B)
        G, _, D, _ = held[0].shape[1:]
        for name, heads_BGTD in (("keys", key_BGTD), ("values", value_BGTD)):
            if (heads_BGTD.shape[1], heads_BGTD.shape[3]) != (G, D):
                raise SourceError(
                    f"target.source: layer {layer} has {name} of {heads_BGTD.shape[1]} heads of size "
                    f"{heads_BGTD.shape[3]}, not the {G} of {D} that its configuration promises; choose another model"
                )
        self.written.add(layer)
        if sinks_N is None and native.can_attend(query_BNTD, window=window, softcap=softcap):
            return native.attend(*new, *held, scale=scale)
        return torch_attend(*new, *held, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)


def torch_attend(
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    keys_SGCDP: torch.Tensor,
    values_SGLD: torch.Tensor,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `SlotView.attend` does, in torch operations: any device, and all that families add to attention."""
    B, N, T, D = query_BNTD.shape
    G = key_BGTD.shape[1]
    positions_BT = starts_B[:, None] + torch.arange(T, device=starts_B.device)
    P = keys_SGCDP.shape[-1]
    place = (slots_B[:, None], slice(None), positions_BT // P, slice(None), positions_BT % P)
    keys_SGCDP[place] = key_BGTD.permute(0, 2, 1, 3).to(keys_SGCDP.dtype)
    values_SGLD[slots_B[:, None], :, positions_BT] = value_BGTD.permute(0, 2, 1, 3).to(values_SGLD.dtype)

    L = int(starts_B.max()) + T
    keys_BGDL = keys_by_position(keys_SGCDP[slots_B, :, : -(-L // P)])[..., :L].float()
    values_BGLD = values_SGLD[slots_B, :, :L].float()
    scores_BNTL = (query_BNTD.reshape(B, G, N // G * T, D).float() @ keys_BGDL * scale).view(B, N, T, L)
    if softcap is not None:
        scores_BNTL = softcap * torch.tanh(scores_BNTL / softcap)
    distance_BTL = positions_BT[..., None] - torch.arange(L, device=starts_B.device)
    hidden_BTL = (distance_BTL < 0) | (distance_BTL >= (window or L))
    weights_BNTL = _softmax(scores_BNTL.masked_fill(hidden_BTL[:, None], float("-inf")), sinks_N)
    out = weights_BNTL.view(B, G, N // G * T, L) @ values_BGLD
    return out.view(B, N, T, D).transpose(1, 2).to(query_BNTD.dtype)


def keys_by_position(keys_BGCDP: torch.Tensor) -> torch.Tensor:
    """Blocks of keys one after the other: [B, G, D, C·P]."""
    return keys_BGCDP.transpose(2, 3).flatten(3)


def read_attention(
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over a whole sequence without a cache, for reading; returns [B, T, N, D]."""
    N, T = query_BNTD.shape[1:3]
    groups = N // key_BGTD.shape[1]
    key_BNTD = key_BGTD.repeat_interleave(groups, dim=1)
    value_BNTD = value_BGTD.repeat_interleave(groups, dim=1)
    if softcap is None and sinks_N is None and (window is None or window >= T):
        out = F.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, is_causal=True, scale=scale)
        return out.transpose(1, 2)
    scores_BNTT = query_BNTD.float() @ key_BNTD.float().transpose(2, 3) * scale
    if softcap is not None:
        scores_BNTT = softcap * torch.tanh(scores_BNTT / softcap)
    position_T = torch.arange(T, device=query_BNTD.device)
    distance_TT = position_T[:, None] - position_T
    hidden_TT = (distance_TT < 0) | (distance_TT >= (window or T))
    weights_BNTT = _softmax(scores_BNTT.masked_fill(hidden_TT, float("-inf")), sinks_N)
    return (weights_BNTT @ value_BNTD.float()).transpose(1, 2).to(query_BNTD.dtype)


def _softmax(scores_BNTL: torch.Tensor, sinks_N: torch.Tensor | None) -> torch.Tensor:
    """Softmax over L, where a sink takes its share first."""
    if sinks_N is None:
        return scores_BNTL.softmax(-1)
    sinks_BNT1 = sinks_N.float().view(1, -1, 1, 1).expand(*scores_BNTL.shape[:3], 1)
    return torch.cat([scores_BNTL, sinks_BNT1], dim=-1).softmax(-1)[..., :-1]
