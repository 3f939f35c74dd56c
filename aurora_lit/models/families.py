"""The families whose decoder layers run in native calls: a row for each.

A row says by which of the decoder's parts a family's layers are computed (kernels/csrc/decoder.hpp); their weights are
found by the names that transformers gives their modules. What all rows have in common: RMS norms, a rotary embedding
that turns the halves of a head against each other, a gated MLP, residuals, and linear layers that may have biases.

    family = family_of(config)      # or the reason why its layers do not run in native calls

Leaves out the layers themselves (fused_layers.py), and the proof: whatever a row says, native layers are used only if
they compute what the model's own compute (native_target.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aurora_lit.models.kv_cache import head_dim_of


class Family(NamedTuple):
    """What the decoder must know of a family's layers."""

    norm_attention: str = "input_layernorm"
    """The layer's norm before its attention."""
    norm_mlp: str = "post_attention_layernorm"
    """The layer's norm before its MLP."""
    norm_query: str | None = None
    """The attention's norm of each head of the queries, before they are rotated."""
    norm_key: str | None = None
    """The same of the keys."""
    activation: str = "silu"
    """Of the MLP's gate."""
    windows: str = "sliding_window"
    """The field of the configuration that says whether attention has windows, for which the decoder has no code."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(windows="layer_types"),
    "qwen3": Family(norm_query="q_norm", norm_key="k_norm", windows="layer_types"),
}
"""By transformers' `model_type`."""
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE that turn a position alike in every batch; "dynamic" and "longrope" depend on its longest sequence."""


def family_of(config: Any) -> Family | str:
    """The row of a model by its (text) configuration; or what it is that its layers need and the decoder lacks."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"models/families.py has no row for {config.model_type}"
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    has_windows = family.windows == "sliding_window" and getattr(config, "sliding_window", None) is not None
    reasons = {
        f"hidden_act={config.hidden_act}": config.hidden_act != family.activation,
        f"rope_type={rope.get('rope_type')}": rope.get("rope_type", "default") not in _FIXED_ROPE_TYPES,
        "only a part of each head is rotated": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"head_dim={head_dim_of(config)} is no multiple of 32": head_dim_of(config) % 32 != 0,
        "its attention has windows": has_windows
        or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"},
    }
    return next((reason for reason, holds in reasons.items() if holds), family)
