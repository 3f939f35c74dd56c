"""The attention function `aurora_slots` of transformers' attention interface: over our slots, or over a whole text.

What is left out: the arithmetic (models/slots.py) and who runs a model so (models/target.py).

Shapes: B rows, T positions, N query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from aurora_lit.models.slots import SlotView, read_attention

ATTENTION_NAME = "aurora_slots"


def slot_attention(
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
    slot_view: SlotView | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in the shape transformers calls: over slots when a `slot_view` is passed, else causal."""
    scale = query_BNTD.shape[-1] ** -0.5 if scaling is None else scaling
    new = (query_BNTD, key_BGTD, value_BGTD)
    extra: dict[str, Any] = {"scale": scale, "window": sliding_window, "softcap": softcap, "sinks_N": s_aux}
    if slot_view is None:
        return read_attention(*new, **extra), None
    layer = module.layer_idx
    assert isinstance(layer, int)
    return slot_view.attend(layer, *new, **extra), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
