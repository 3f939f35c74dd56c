"""Causal attention: over the KV cache while serving, over a whole sequence without a cache while learning.

`ATTENTION_NAME` is the name under which transformers' attention interface calls `attention_interface`: over the cache
when the forward pass was given a `kv_cache_view`, otherwise without one.

Leaves out: the native kernel (kernels/native.py) and running the model (target.py).

Shapes: B sequences, T new positions, N query heads, G key-value heads, D head size, L cached positions, S slots,
C blocks of P positions, E values stored together (kv_cache.py), Q = D / E, M pairs of positions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.models.kv_cache import KVCache, keys_by_position, values_by_position

ATTENTION_NAME = "aurora_kv_cache"


class Variant(NamedTuple):
    """In what a family's attention differs from plain causal attention."""

    window: int | None = None
    """Positions that a query sees, its own included."""
    softcap: float | None = None
    """Scores become cap·tanh(score / cap)."""
    sinks_N: torch.Tensor | None = None
    """One score a head that enters the softmax's denominator and contributes no value (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        """True if it does not differ."""
        return self.window is None and self.softcap is None and self.sinks_N is None

    def within(self, length: int) -> Variant:
        """The same for sequences of `length` positions, of which a window as long leaves out none."""
        return self._replace(window=None) if self.window is not None and self.window >= length else self

    def weights(self, scores_BNTL: torch.Tensor, distance_BNTL: torch.Tensor) -> torch.Tensor:
        """Weights of the positions by their scores and their distance before the query; negative after it."""
        L = scores_BNTL.shape[-1]
        if self.softcap is not None:
            scores_BNTL = self.softcap * torch.tanh(scores_BNTL / self.softcap)
        masked_BNTL = (distance_BNTL < 0) | (distance_BNTL >= (self.window or L))
        scores_BNTL = scores_BNTL.masked_fill(masked_BNTL, float("-inf"))
        if self.sinks_N is None:
            return scores_BNTL.softmax(-1)
        sinks_BNT1 = self.sinks_N.float().view(1, -1, 1, 1).expand(*scores_BNTL.shape[:3], 1)
        return torch.cat([scores_BNTL, sinks_BNT1], dim=-1).softmax(-1)[..., :-1]


PLAIN = Variant()


class KVCacheView:
    """The slots and starting positions that one forward pass uses; passed through the model to its attention."""

    def __init__(self, kv_cache: KVCache, *, slots_B: torch.Tensor, starts_B: torch.Tensor) -> None:
        """`slots_B` int64: the slot of each sequence; `starts_B` int64: how many positions it already holds."""
        self.kv_cache = kv_cache
        self.slots_B = slots_B
        self.starts_B = starts_B
        self.attended_layers: set[int] = set()
        """Layers that have called `attend`."""

    def attend(
        self,
        layer: int,
        query_BNTD: torch.Tensor,
        key_BGTD: torch.Tensor,
        value_BGTD: torch.Tensor,
        *,
        scale: float,
        variant: Variant = PLAIN,
    ) -> torch.Tensor:
        """Write the new keys and values to the cache, then attend causally over each sequence; returns [B, T, N, D].

        Raises SourceError if keys or values do not have the cache's number of heads or head size.
        """
        new = (query_BNTD, key_BGTD, value_BGTD)
        cached = (self.kv_cache.keys_SGCQPE[layer], self.kv_cache.values_SGMDE[layer], self.slots_B, self.starts_B)
        G, D = cached[1].shape[1], cached[1].shape[3]
        for name, heads_BGTD in (("keys", key_BGTD), ("values", value_BGTD)):
            if (heads_BGTD.shape[1], heads_BGTD.shape[3]) != (G, D):
                raise SourceError(
                    f"target.source: layer {layer} has {name} of {heads_BGTD.shape[1]} heads of size "
                    f"{heads_BGTD.shape[3]}, but its configuration says {G} heads of size {D}; choose another model"
                )
        self.attended_layers.add(layer)
        variant = variant.within(self.kv_cache.capacity)
        if variant.is_plain and native.can_attend(query_BNTD):
            return native.attend(*new, *cached, scale=scale)
        return cached_attention(*new, *cached, scale=scale, variant=variant)

    def write(self, layer: int, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor) -> None:
        """Write the new keys and values to the cache, as `attend` does, for positions whose outputs nobody needs."""
        positions_BT = self.starts_B[:, None] + torch.arange(key_BGTD.shape[2], device=self.starts_B.device)
        cached = (self.kv_cache.keys_SGCQPE[layer], self.kv_cache.values_SGMDE[layer])
        _write(key_BGTD, value_BGTD, *cached, self.slots_B, positions_BT)


def cached_attention(
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    keys_SGCQPE: torch.Tensor,
    values_SGMDE: torch.Tensor,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    *,
    scale: float,
    variant: Variant = PLAIN,
) -> torch.Tensor:
    """As `KVCacheView.attend`, in torch operations: for any device, and for every variant of attention."""
    B, N, T, D = query_BNTD.shape
    G = key_BGTD.shape[1]
    positions_BT = starts_B[:, None] + torch.arange(T, device=starts_B.device)
    P, E = keys_SGCQPE.shape[-2:]
    _write(key_BGTD, value_BGTD, keys_SGCQPE, values_SGMDE, slots_B, positions_BT)
    L = int(starts_B.max()) + T
    keys_BGDL = keys_by_position(keys_SGCQPE[slots_B, :, : -(-L // P)])[..., :L].float()
    values_BGLD = values_by_position(values_SGMDE[slots_B, :, : -(-L // E)])[:, :, :L].float()
    scores_BNTL = (query_BNTD.reshape(B, G, N // G * T, D).float() @ keys_BGDL * scale).view(B, N, T, L)
    distance_BTL = positions_BT[..., None] - torch.arange(L, device=starts_B.device)
    weights_BNTL = variant.weights(scores_BNTL, distance_BTL[:, None])
    out = weights_BNTL.view(B, G, N // G * T, L) @ values_BGLD
    return out.view(B, N, T, D).transpose(1, 2).to(query_BNTD.dtype)


def _write(
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    keys_SGCQPE: torch.Tensor,
    values_SGMDE: torch.Tensor,
    slots_B: torch.Tensor,
    positions_BT: torch.Tensor,
) -> None:
    """Write keys and values to these positions of the slots."""
    B, G, T, D = key_BGTD.shape
    P, E = keys_SGCQPE.shape[-2:]
    row_B1, new_BTGD = slots_B[:, None], key_BGTD.permute(0, 2, 1, 3).to(keys_SGCQPE.dtype)
    keys_SGCQPE[row_B1, :, positions_BT // P, :, positions_BT % P] = new_BTGD.reshape(B, T, G, D // E, E)
    new_BTGD = value_BGTD.permute(0, 2, 1, 3).to(values_SGMDE.dtype)
    values_SGMDE[row_B1, :, positions_BT // E, :, positions_BT % E] = new_BTGD


def causal_attention(
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    *,
    scale: float,
    variant: Variant = PLAIN,
) -> torch.Tensor:
    """Causal attention over whole sequences without a cache; returns [B, T, N, D]."""
    N, T = query_BNTD.shape[1:3]
    groups = N // key_BGTD.shape[1]
    key_BNTD = key_BGTD.repeat_interleave(groups, dim=1)
    value_BNTD = value_BGTD.repeat_interleave(groups, dim=1)
    variant = variant.within(T)
    if variant.is_plain:
        out = F.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, is_causal=True, scale=scale)
        return out.transpose(1, 2)
    scores_BNTT = query_BNTD.float() @ key_BNTD.float().transpose(2, 3) * scale
    position_T = torch.arange(T, device=query_BNTD.device)
    weights_BNTT = variant.weights(scores_BNTT, position_T[:, None] - position_T)
    return (weights_BNTT @ value_BNTD.float()).transpose(1, 2).to(query_BNTD.dtype)


def attention_interface(
    module: nn.Module,
    query_BNTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kv_cache_view: KVCacheView | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers' layers call; it attends over the cache if a `kv_cache_view` is passed."""
    scale = query_BNTD.shape[-1] ** -0.5 if scaling is None else scaling
    new = (query_BNTD, key_BGTD, value_BGTD)
    variant = Variant(window=sliding_window, softcap=softcap, sinks_N=s_aux)
    if kv_cache_view is None:
        return causal_attention(*new, scale=scale, variant=variant), None
    layer = module.layer_idx
    assert isinstance(layer, int)
    return kv_cache_view.attend(layer, *new, scale=scale, variant=variant), None


@functools.cache
def register_attention() -> None:
    """Make `attention_interface` known to transformers, which is only imported where a model of its own is used."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention_interface)
