"""A transformers model's decoder layers, and the draft's one layer, as one native call.

A model's layers qualify if they have the plain Llama form. No code is copied from transformers: the packed weights of
the loaded modules are used in place, and `Target.fuse_layers` compares the result with the model's own forward pass.

Leaves out: the layers' arithmetic (kernels/csrc/decoder.hpp) and the KV cache (kv_cache.py).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aurora_lit.kernels.decoder import Decoder, LayerWeights
from aurora_lit.kernels.draft_steps import DraftSteps
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear
from aurora_lit.models.kv_cache import head_dim_of
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN_LLAMA_TYPES = ("llama", "mistral", "qwen2")
"""Model types whose layers are: norm, attention with RoPE on halves, residual, norm, SiLU-gated MLP, residual."""
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE that turn a position alike in every batch; "dynamic" and "longrope" depend on its longest sequence."""


def fuse_target(model: PreTrainedModel, aux_layer_ids: tuple[int, int, int]) -> Decoder | None:
    """A `Decoder` over the model's packed layers; None if its layers do not have the plain Llama form."""
    parts = decoder_parts(model)
    return None if parts is None else make_decoder(**parts, aux_layer_ids=aux_layer_ids)


def make_decoder(*, frequencies_F: torch.Tensor, rotary_scale: float, **parts: Any) -> Decoder:
    """A `Decoder` of `decoder_parts`. Its rotary tables are as long as slots are, not as the model's longest context.

    `frequencies_F`: of the rotary embedding, F = D / 2. `rotary_scale`: factor of its cosines and sines.
    """
    return Decoder(**parts, rotary=functools.partial(_rotary_tables, frequencies_F, rotary_scale))


def decoder_parts(model: PreTrainedModel) -> dict[str, Any] | None:
    """What a `Decoder` over the model's packed layers consists of, as `make_decoder` takes it; None as above."""
    config = model.config.get_text_config()
    base: Any = model.base_model
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    head_dim = head_dim_of(config)
    is_plain_llama = (
        config.model_type in _PLAIN_LLAMA_TYPES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _FIXED_ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and head_dim % 32 == 0
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (config.model_type == "qwen2" or getattr(config, "sliding_window", None) is None)
    )
    if not is_plain_llama:
        return None
    layers = [_layer_weights(layer, norm_attention=layer.input_layernorm) for layer in base.layers]
    if any(layer is None for layer in layers):
        return None
    return {
        "layers": layers,
        "final_norm": base.norm.weight.detach(),
        "frequencies_F": base.rotary_emb.inv_freq.detach(),
        "rotary_scale": float(base.rotary_emb.attention_scaling),
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "eps": float(config.rms_norm_eps),
    }


def fuse_draft(draft: Eagle3Draft) -> Decoder | None:
    """A `Decoder` over a draft's packed layer and final norm; None if its linear layers are not packed."""
    layer, config = draft.midlayer, draft.config
    weights = _layer_weights(layer, norm_embeds=layer.input_layernorm, norm_attention=layer.hidden_norm)
    if weights is None or config.head_dim % 32:
        return None
    return Decoder(
        [weights],
        final_norm=draft.norm.weight.detach(),
        rotary=lambda _: (draft.cos_LD, draft.sin_LD),  # prepared for its slots
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
    )


def embedding_table(embedding: nn.Module) -> torch.Tensor | PackedEmbedding | None:
    """An embedding that native calls can read; None if it is neither packed nor a plain fp32 table."""
    if isinstance(embedding, PackedEmbedding):
        return embedding
    if type(embedding) is nn.Embedding and embedding.weight.dtype == torch.float32:
        return embedding.weight.detach()
    return None


def draft_steps(
    draft: Eagle3Draft,
    decoder: Decoder,
    embedding: nn.Module,
    target_id_D: torch.Tensor,
    coarse_head: PackedLinear | None = None,
) -> DraftSteps | None:
    """Drafting as one native call; None if `embedding` is neither packed nor a plain fp32 table.

    `coarse_head`: see `DraftSteps`.
    """
    table = embedding_table(embedding)
    if table is None:
        return None
    linears: list[Any] = [draft.fc, draft.lm_head, draft.value_head]
    fuse, head, value = linears
    return DraftSteps(
        decoder,
        fuse=fuse,
        head=head,
        value=value,
        coarse_head=coarse_head,
        target_id_D=target_id_D,
        embedding=table,
    )


def _rotary_tables(frequencies_F: torch.Tensor, scale: float, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [P, D] of the first positions, as transformers' models compute them (halves as in Llama)."""
    angles_PF = torch.arange(length, dtype=torch.float32)[:, None] * frequencies_F.float()
    angles_PD = torch.cat([angles_PF, angles_PF], dim=-1)
    return angles_PD.cos() * scale, angles_PD.sin() * scale


def _layer_weights(layer: Any, *, norm_attention: Any, norm_embeds: Any = None) -> LayerWeights | None:
    """None if the layer's linear layers are not packed, or its attention has norms of its own."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    attention_norms = [name for name, _ in attention.named_children() if "norm" in name]
    if attention_norms or not all(isinstance(linear, PackedLinear) for linear in linears):
        return None
    query, key, value, output, gate, up, down = linears
    return LayerWeights(
        norm_embeds=None if norm_embeds is None else _norm_weight(norm_embeds),
        norm_attention=_norm_weight(norm_attention),
        norm_mlp=_norm_weight(layer.post_attention_layernorm),
        query=query,
        key=key,
        value=value,
        output=output,
        gate=gate,
        up=up,
        down=down,
    )


def _norm_weight(norm: Any) -> torch.Tensor:
    weight: torch.Tensor = norm.weight
    return weight.detach().float().contiguous()
