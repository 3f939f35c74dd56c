"""A transformers model's decoder layers, and the draft's one layer, as one native call.

No code is copied from transformers: the packed weights of the loaded modules are used in place.

Leaves out: which models qualify (families.py), the layers' arithmetic (kernels/csrc/decoder.hpp), and the KV cache
(kv_cache.py).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aurora_lit.kernels.decoder import Decoder, LayerWeights
from aurora_lit.kernels.draft_steps import DraftSteps
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear
from aurora_lit.models.families import Family
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_parts(model: PreTrainedModel, family: Family) -> dict[str, Any] | None:
    """What a `Decoder` over the model's packed layers consists of, as `make_decoder` takes it.

    None if its linear layers are not packed.
    """
    config = model.config.get_text_config()
    base: Any = model.base_model
    layers = [_layer_weights(layer, family) for layer in base.layers]
    if any(layer is None for layer in layers):
        return None
    return {
        "layers": layers,
        "final_norm": base.norm.weight.detach().float(),
        "frequencies_F": base.rotary_emb.inv_freq.detach().float(),
        "rotary_scale": float(base.rotary_emb.attention_scaling),
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "eps": float(config.rms_norm_eps),
    }


def make_decoder(*, frequencies_F: torch.Tensor, rotary_scale: float, **parts: Any) -> Decoder:
    """A `Decoder` of `decoder_parts`. Its rotary tables are as long as slots are, not as the model's longest context.

    `frequencies_F`: of the rotary embedding, F = D / 2. `rotary_scale`: factor of its cosines and sines.
    """
    return Decoder(**parts, rotary=functools.partial(_rotary_tables, frequencies_F, rotary_scale))


def fuse_draft(draft: Eagle3Draft) -> Decoder | None:
    """A `Decoder` over a draft's packed layer and final norm; None if its linear layers are not packed."""
    layer, config = draft.midlayer, draft.config
    weights = _layer_weights(layer, Family(norm_attention="hidden_norm"), norm_embeds=layer.input_layernorm)
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


def _layer_weights(layer: Any, family: Family, *, norm_embeds: nn.Module | None = None) -> LayerWeights | None:
    """None if the layer's linear layers are not packed."""
    attention, mlp = layer.self_attn, layer.mlp
    matrices = {
        **{"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj, "output": attention.o_proj},
        **{"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj},
    }
    if not all(isinstance(linear, PackedLinear) for linear in matrices.values()):
        return None
    norms = {
        "norm_embeds": norm_embeds,
        "norm_attention": getattr(layer, family.norm_attention),
        "norm_mlp": getattr(layer, family.norm_mlp),
        "norm_query": getattr(attention, family.norm_query) if family.norm_query else None,
        "norm_key": getattr(attention, family.norm_key) if family.norm_key else None,
    }
    vectors = {name: norm.weight.detach().float().contiguous() for name, norm in norms.items() if norm is not None}
    return LayerWeights(**matrices, **vectors)
