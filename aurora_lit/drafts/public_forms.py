"""EAGLE-3 checkpoints as SGLang, SpecForge and speculators write them, brought to the one form that we read.

    SpecForge, SGLang   tensors under midlayer.; LlamaForCausalLMEagle3; the layers' ids, if at all, in eagle_config:
                        those whose outputs are read, one less than of the layers whose inputs these are
    speculators         tensors under layers.0.; the layer's shape in transformer_layer_config; norms by flags

Tensors that repeat what the target has (the embedding) are left out, and the vocabulary's masks are computed if only
the offsets are there. What would compute something else than Eagle3Draft can is refused with its name. Leaves out
files, digests and shapes (drafts/checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aurora_lit.errors import CheckpointError
from aurora_lit.modules.draft.eagle3 import Llama3Scaling

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
ARCHITECTURE = "LlamaForCausalLMEagle3"
_OWN_EMBEDDING = "embed_tokens.weight"
_UNSUPPORTED = {
    "attention_bias": "biases in the attention",
    "mlp_bias": "biases in the MLP",
    "norm_output": "the normed output as the next step's state",
    "parallel_drafting": "parallel drafting",
}
"""Flags, and what they stand for, that a draft must not have."""


def common_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json of any of these forms, by the names that SGLang and SpecForge use.

    Raises CheckpointError, without the folder's name, for a form that cannot be learned from.
    """
    fields = dict(raw)
    if raw.get("speculators_model_type") == "eagle3":
        layer = _object(raw, "transformer_layer_config")
        if layer.get("model_type", "llama") != "llama":
            raise CheckpointError(f"its layer is of model_type {layer['model_type']!r}, not 'llama'")
        flags = {"norm_before_residual": raw.get("norm_before_residual", True)}
        fields = {**layer, **raw, **flags, "architectures": [ARCHITECTURE]}
    if ARCHITECTURE not in fields.get("architectures", []):
        raise CheckpointError(f"architectures is {fields.get('architectures')}, expected {[ARCHITECTURE]}")
    for flag, meaning in _UNSUPPORTED.items():
        if fields.get(flag):
            raise CheckpointError(f"{flag} is {fields[flag]}: {meaning} cannot be learned here")
    if "sliding_attention" in (fields.get("layer_types") or ()) or fields.get("use_sliding_window"):
        window = fields.get("sliding_window")
        raise CheckpointError(f"sliding_window is {window}: attention with a window cannot be learned here")
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {fields['hidden_act']!r}; a draft has 'silu'")
    if fields.get("num_hidden_layers", 1) != 1:
        raise CheckpointError(f"num_hidden_layers is {fields['num_hidden_layers']}; a draft has 1")
    eagle = _object(fields, "eagle_config")
    if fields.get("norm_before_fc") is None and "norm_before_fc" in eagle:
        fields["norm_before_fc"] = eagle["norm_before_fc"]
    if fields.get(LAYER_IDS):
        _check_layer_ids(fields[LAYER_IDS], LAYER_IDS)
    elif fields.get(LAYER_IDS) is None and eagle.get(LAYER_IDS):
        _check_layer_ids(eagle[LAYER_IDS], f"eagle_config.{LAYER_IDS}")
        fields[LAYER_IDS] = [layer + 1 for layer in eagle[LAYER_IDS]]
    rope = _object(fields, "rope_parameters")
    fields.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    fields["rope_scaling"] = _rope_scaling(_object(fields, "rope_scaling") or rope)
    if fields.get("head_dim") is None and "num_attention_heads" in fields:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields.setdefault("draft_vocab_size", fields.get("vocab_size"))
    return fields


def eagle_config(aux_layer_ids: Sequence[int]) -> dict[str, Any]:
    """What SGLang reads of a config.json: it takes the outputs of layers, and we the inputs of those after them."""
    return {"use_aux_hidden_state": True, LAYER_IDS: [layer - 1 for layer in aux_layer_ids]}


def common_tensors(tensors: dict[str, torch.Tensor], *, vocab_size: int) -> dict[str, torch.Tensor]:
    """The tensors under our names, with `d2t` and `t2d`."""
    renamed = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix("model.")
        renamed[f"midlayer.{ours.removeprefix('layers.0.')}" if ours.startswith("layers.0.") else ours] = tensor
    renamed.pop(_OWN_EMBEDDING, None)
    head = renamed.get("lm_head.weight")
    if head is not None and "d2t" not in renamed and len(head) == vocab_size:
        renamed["d2t"] = torch.zeros(vocab_size, dtype=torch.int64)
    if "d2t" in renamed and "t2d" not in renamed:
        ids = renamed["d2t"].long() + torch.arange(len(renamed["d2t"]))
        renamed["t2d"] = torch.zeros(vocab_size, dtype=torch.bool)
        renamed["t2d"][ids[(ids >= 0) & (ids < vocab_size)]] = True
    return renamed


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is {value!r}; give a JSON object, or leave it out")
    return value


def _check_layer_ids(ids: Any, name: str) -> None:
    if not isinstance(ids, list) or len(ids) != 3 or not all(isinstance(layer, int) for layer in ids):
        raise CheckpointError(
            f"{name} is {ids!r}; a draft that can be learned here reads three layers, listed by number"
        )


def _rope_scaling(fields: dict[str, Any]) -> Llama3Scaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_scaling is of type {kind!r}; 'llama3' and none are known")
    return Llama3Scaling(
        factor=float(fields["factor"]),
        low_freq_factor=float(fields["low_freq_factor"]),
        high_freq_factor=float(fields["high_freq_factor"]),
        original_max_position_embeddings=int(fields["original_max_position_embeddings"]),
    )
