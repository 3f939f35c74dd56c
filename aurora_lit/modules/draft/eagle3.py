"""The draft network: EAGLE-3's one decoder layer over the target's hidden states, plus a value head.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of LLMs via Training-Time Test", arXiv 2503.01840. The
module's parameter names are the tensor names of the checkpoint layout that vLLM and SGLang load; the value head is an
addition of this project.

The draft at position t receives the target's hidden states of position t and the embedding of token t + 1, and
proposes token t + 2. While a chain is drafted, the target's hidden states of later positions are not known yet; the
draft's own output of the previous step, before the final norm, replaces them.

Leaves out training (modules/losses/draft_module.py), checkpoints (drafts/checkpoint.py), and drafting with a KV cache
(serve/speculation/sources/drafter.py).

Shapes: B sequences, T positions, H draft hidden size, 3H the target's three hidden states side by side, 2H embedding
and hidden state side by side, C heads · head size, Vd draft vocabulary, V target vocabulary, N heads, G key-value
heads, D head size, L positions of the rotary table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 stretches its rotary embedding; the fields are those of `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Shape of a draft; the fields are those of its checkpoint's `config.json`."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, int, int]
    """The target's layers whose outputs the draft reads."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    rope_scaling: Llama3Scaling | None = None
    norm_before_residual: bool = False
    """True: the residual around the attention is the normed hidden state, as in speculators' drafts."""
    norm_before_fc: bool = False
    """True: the three hidden states are normed together before they are projected."""
    fc_norm: bool = False
    """True: each of the three is normed by itself before that."""

    @property
    def is_plain(self) -> bool:
        """True for EAGLE-3 as published, which the native kernels compute; False with any of the norms above."""
        return not (self.norm_before_residual or self.norm_before_fc or self.fc_norm)


class RMSNorm(nn.RMSNorm):
    """RMS norm that computes in the weight's dtype, also under autocast: torch has no fused kernel for mixed dtypes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return super().forward(x.to(self.weight.dtype))


class Eagle3Attention(nn.Module):
    """Projections of the draft's attention. The caller computes the attention itself, over a KV cache when serving or
    over an unrolled chain in training."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def project_qkv(
        self, x_BT2H: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, N, T, D] and keys [B, G, T, D] with rotary embedding, values [B, G, T, D]."""
        query = self.q_proj(x_BT2H).view(*x_BT2H.shape[:-1], -1, self.head_dim).transpose(1, 2)
        key, value = self.project_kv(x_BT2H, cos_BTD, sin_BTD)
        return apply_rotary_pos_emb(query, cos_BTD, sin_BTD), key, value

    def project_kv(
        self, x_BT2H: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same keys and values alone."""
        shape = (*x_BT2H.shape[:-1], -1, self.head_dim)
        key = self.k_proj(x_BT2H).view(shape).transpose(1, 2)
        value = self.v_proj(x_BT2H).view(shape).transpose(1, 2)
        return apply_rotary_pos_emb(key, cos_BTD, sin_BTD), value


class Eagle3MLP(nn.Module):
    """Gated MLP, as in Llama."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Eagle3DecoderLayer(nn.Module):
    """The decoder layer: attention on [normed embedding, normed hidden state], then the MLP."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Eagle3Attention(config)
        self.mlp = Eagle3MLP(config)


class Eagle3Draft(nn.Module):
    """EAGLE-3 draft.

    Two buffers map its reduced vocabulary: `d2t` [Vd], int64 offsets (target id = draft id + d2t[draft id]), and `t2d`
    [V], True for the target ids that the draft has.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor
    cos_LD: torch.Tensor
    sin_LD: torch.Tensor

    def __init__(self, config: Eagle3Config, draft_token_ids: torch.Tensor | None = None) -> None:
        """`draft_token_ids`: sorted target ids of the draft vocabulary [Vd]; default: the first Vd ids."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(3 * config.target_hidden_size, eps=config.rms_norm_eps)
        if config.fc_norm:
            norms = [RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(3)]
            self.fc_norm = nn.ModuleList(norms)
        self.midlayer = Eagle3DecoderLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("d2t", torch.empty(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.empty(config.vocab_size, dtype=torch.bool))
        self.set_vocabulary(torch.arange(config.draft_vocab_size) if draft_token_ids is None else draft_token_ids)
        cos, sin = rotary_table(config.max_position_embeddings, config)
        self.register_buffer("cos_LD", cos, persistent=False)
        self.register_buffer("sin_LD", sin, persistent=False)

    def set_vocabulary(self, draft_token_ids: torch.Tensor) -> None:
        """Set `d2t` and `t2d` from the sorted target ids of the draft vocabulary [Vd]."""
        ids = draft_token_ids.long()
        self.d2t.copy_(ids - torch.arange(len(ids)))
        self.t2d.zero_()
        self.t2d[ids] = True

    def extend_positions(self, length: int) -> None:
        """Compute the rotary table for at least so many positions, if there are fewer."""
        if len(self.cos_LD) < length:
            cos_LD, sin_LD = rotary_table(length, self.config)
            self.cos_LD, self.sin_LD = cos_LD.to(self.cos_LD), sin_LD.to(self.sin_LD)

    @property
    def draft_token_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary [Vd]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def draft_index(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Draft ids of target ids, in any shape; arbitrary where the draft does not have the token."""
        ids = self.draft_token_ids  # in any order: some tools sort them by frequency
        index_V = torch.zeros_like(self.t2d, dtype=torch.int64)
        index_V[ids] = torch.arange(len(ids), device=ids.device)
        return index_V[token_ids]

    def combine_hidden_states(self, aux_BT3H: torch.Tensor) -> torch.Tensor:
        """The target's three hidden states projected to one [B, T, H]."""
        if self.config.norm_before_fc:
            aux_BT3H = self.input_norm(aux_BT3H)
        if self.config.fc_norm:
            parts = zip(self.fc_norm, aux_BT3H.chunk(3, dim=-1), strict=True)
            aux_BT3H = torch.cat([norm(part_BTH) for norm, part_BTH in parts], dim=-1)
        combined: torch.Tensor = self.fc(aux_BT3H)
        return combined

    def project_qkv(
        self, embeds_BTH: torch.Tensor, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, N, T, D] and keys [B, G, T, D] with rotary embedding at `positions_BT`, values [B, G, T, D]."""
        joined_BT2H = self._attention_input(embeds_BTH, hidden_BTH)
        return self.midlayer.self_attn.project_qkv(joined_BT2H, self.cos_LD[positions_BT], self.sin_LD[positions_BT])

    def project_kv(
        self, embeds_BTH: torch.Tensor, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same keys and values alone, of positions that nothing is proposed from."""
        joined_BT2H = self._attention_input(embeds_BTH, hidden_BTH)
        return self.midlayer.self_attn.project_kv(joined_BT2H, self.cos_LD[positions_BT], self.sin_LD[positions_BT])

    def _attention_input(self, embeds_BTH: torch.Tensor, hidden_BTH: torch.Tensor) -> torch.Tensor:
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embeds_BTH), layer.hidden_norm(hidden_BTH)], dim=-1)

    def complete_layer(self, attended_BTC: torch.Tensor, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """The layer's output [B, T, H] from the attention's: output projection, residuals and MLP.

        The next step of a chain takes the result as its hidden state, without the final norm.
        """
        layer = self.midlayer
        if self.config.norm_before_residual:
            hidden_BTH = layer.hidden_norm(hidden_BTH)
        hidden_BTH = hidden_BTH + layer.self_attn.o_proj(attended_BTC)
        out: torch.Tensor = hidden_BTH + layer.mlp(layer.post_attention_layernorm(hidden_BTH))
        return out

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary [..., Vd] from the layer's output [..., H]."""
        out: torch.Tensor = self.lm_head(self.norm(hidden))
        return out

    def compute_value(self, hidden: torch.Tensor) -> torch.Tensor:
        """Predicted number of proposals accepted from this step on [...], from the layer's output [..., H].

        The norm is that of the logits: what is predicted does not train it.
        """
        norm = self.norm
        normed = F.rms_norm(hidden.to(norm.weight.dtype), norm.normalized_shape, norm.weight.detach(), norm.eps)
        out: torch.Tensor = self.value_head(normed).squeeze(-1)
        return out


def rotary_table(length: int, config: Eagle3Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding [L, D] (RoFormer, arXiv 2104.09864; halves as in Llama)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's frequencies: low ones are divided by the factor, high ones stay, those between are mixed."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept_share + (1 - kept_share) / scaling.factor)


def apply_rotary_pos_emb(x_BNTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor) -> torch.Tensor:
    """Queries or keys with the rotary embedding of their positions."""
    first_half, second_half = x_BNTD.chunk(2, dim=-1)
    rotated_half = torch.cat([-second_half, first_half], dim=-1)
    return x_BNTD * cos_BTD[:, None].to(x_BNTD.dtype) + rotated_half * sin_BTD[:, None].to(x_BNTD.dtype)
