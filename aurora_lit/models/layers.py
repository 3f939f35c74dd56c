"""Where a transformers model keeps its decoder layers, and which of them a draft reads.

What is left out: running them (models/target.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from aurora_lit.errors import SourceError


def aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's three layers (low, middle, high): indices into transformers' `hidden_states`."""
    last = num_layers - 1
    return min(2, last), min(num_layers // 2, last), max(num_layers - 3, 0)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary positions' parameters: those of full attention where kinds of layers have their own (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def decoder_layers(model: PreTrainedModel, num_layers: int) -> nn.ModuleList:
    """The list of a model's decoder layers. Raises SourceError."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise SourceError(f"target.source: {type(model).__name__} has no list of {num_layers} decoder layers to read from")
