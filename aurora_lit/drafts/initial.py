"""Initialises an untrained draft: its vocabulary from token counts, its weights from the target's last layer.

Leaves out training (learn/pretrain/trainer.py).

Shapes: V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aurora_lit.kernels.packed_linear import PackedLinear
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft

DRAFT_VOCABULARY_SIZE = 16_384
"""Default size of a new draft's vocabulary."""


def choose_vocabulary(counts_V: torch.Tensor, size: int, *, always: Iterable[int] = ()) -> torch.Tensor:
    """The `size` most frequent ids, always including `always`, sorted, [Vd]. Of equally frequent ids the lower wins."""
    counts_V = counts_V.clone()
    counts_V[list(always)] = counts_V.max() + 1
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


def initial_draft(
    target: TorchTarget,
    draft_token_ids: torch.Tensor,
    *,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 2048,
) -> Eagle3Draft:
    """A draft initialised from the target's last layer, final norm and head, as far as the shapes match.

    The columns of q, k and v that read the hidden state are the last layer's projections, those that read the embedding
    are small noise. `fc` passes the highest auxiliary state through.
    """
    config = target.model.config.get_text_config()
    size, heads = target.hidden_size, config.num_attention_heads
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=size,
            target_hidden_size=size,
            intermediate_size=intermediate_size or getattr(config, "intermediate_size", None) or 4 * size,
            num_attention_heads=heads,
            num_key_value_heads=num_key_value_heads or heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            draft_vocab_size=len(draft_token_ids),
            aux_layer_ids=target.aux_layer_ids,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
            rope_theta=float(target.rope.get("rope_theta", 10_000.0)),
            max_position_embeddings=max_positions,
        ),
        draft_token_ids,
    )
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.head_rows(draft_token_ids))
        draft.fc.weight.normal_(std=0.01)
        draft.fc.weight[:, 2 * size :].add_(torch.eye(size))
        _copy_last_layer(target, draft)
    return draft


def _copy_last_layer(target: TorchTarget, draft: Eagle3Draft) -> None:
    """Copy weights of matching shape from the last decoder layer, by the names of Llama-like models."""
    base: Any = target.model.base_model
    last = getattr(base, "layers", [None])[-1]
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    size = draft.config.hidden_size
    layer = draft.midlayer
    for name, linear in (("q", layer.self_attn.q_proj), ("k", layer.self_attn.k_proj), ("v", layer.self_attn.v_proj)):
        source = _weight(getattr(attention, f"{name}_proj", None))
        linear.weight.normal_(std=0.02)
        if source is None or linear.weight.shape[0] % source.shape[0]:
            continue
        copies = linear.weight.shape[0] // source.shape[0]
        heads = source.view(-1, draft.config.head_dim, source.shape[1]).repeat_interleave(copies, dim=0)
        linear.weight[:, size:] = heads.reshape(-1, source.shape[1])
    source = _weight(getattr(attention, "o_proj", None))
    if source is not None and source.shape == layer.self_attn.o_proj.weight.shape:
        layer.self_attn.o_proj.weight.copy_(source)
    gate, up, down = (_weight(getattr(mlp, f"{name}_proj", None)) for name in ("gate", "up", "down"))
    width = layer.mlp.gate_proj.out_features
    if gate is not None and up is not None and down is not None and len(gate) >= width and gate.shape[1] == size:
        # Of a wider MLP the neurons with the largest weights.
        strongest = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(width).indices.sort().values
        layer.mlp.gate_proj.weight.copy_(gate[strongest])
        layer.mlp.up_proj.weight.copy_(up[strongest])
        layer.mlp.down_proj.weight.copy_(down[:, strongest])
    after_attention = getattr(last, "post_attention_layernorm", None)  # in Gemma 2 and 3 not before the MLP
    for module, norm in (
        (layer.hidden_norm, getattr(last, "input_layernorm", None)),
        (layer.post_attention_layernorm, getattr(last, "pre_feedforward_layernorm", after_attention)),
        (draft.norm, getattr(base, "norm", None)),
    ):
        if norm is not None and norm.weight.shape == module.weight.shape:
            module.weight.copy_(_gains(norm))


def _weight(linear: Any) -> torch.Tensor | None:
    """The weight [out_features, in_features] of a linear layer, packed or not, as fp32; None for other modules."""
    if isinstance(linear, PackedLinear):
        return linear.rows(torch.arange(linear.out_features))
    return linear.weight.detach().float() if isinstance(linear, nn.Linear) else None


def _gains(norm: Any) -> torch.Tensor:
    """The factors of a norm: its weight, or its weight + 1 as in Gemma, found by applying the norm."""
    weight: torch.Tensor = norm.weight.detach().float()
    signs = torch.ones_like(weight)
    signs[1::2] = -1.0  # mean 0 and mean square 1: normalising leaves them unchanged
    factors = (norm(signs.to(norm.weight.dtype)) - norm(-signs.to(norm.weight.dtype))).float() / 2 * signs
    offset: torch.Tensor = (factors - weight).mean().round()
    return weight + offset
