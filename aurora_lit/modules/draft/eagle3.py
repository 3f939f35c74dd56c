"""The draft: EAGLE-3's one-layer head over the target's hidden states, with a value head of our own beside it.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of LLMs via Training-Time Test", arXiv 2503.01840. The
module's parameter names are the tensor names of the checkpoint layout that vLLM and SGLang load. What is left out:
training (modules/losses/draft_module.py), files (checkpoints.py), and the rounds (serve/engine/engine.py).

A draft position t holds the target's features of position t and the embedding of token t + 1, and proposes token
t + 2. Features of later positions are not known yet while a chain is drafted, so the draft's own output (before the
final norm) stands in for them.

Shapes: B rows, T positions, H hidden, Vd draft vocabulary, V target vocabulary, N heads, G key-value heads, D head
size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Shape of a draft; the fields are those of its `config.json`."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, int, int]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048


class RMSNorm(nn.RMSNorm):
    """In the weight's precision, whatever autocast hands in: torch has no fused kernel for a mixture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return super().forward(x.to(self.weight.dtype))


class DraftAttention(nn.Module):
    """Projections of the draft's attention; the caller attends, over slots or over an unrolled chain."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def project(
        self, x_BT2H: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [B, N, T, D], rotated keys and values [B, G, T, D]."""
        shape = (*x_BT2H.shape[:-1], -1, self.head_dim)
        query = self.q_proj(x_BT2H).view(shape).transpose(1, 2)
        key = self.k_proj(x_BT2H).view(shape).transpose(1, 2)
        value = self.v_proj(x_BT2H).view(shape).transpose(1, 2)
        return rotate(query, cos_BTD, sin_BTD), rotate(key, cos_BTD, sin_BTD), value


class DraftMLP(nn.Module):
    """Gated MLP, as in Llama."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """The one decoder layer: attention over [normed embedding, normed hidden], then the MLP."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)


class Draft(nn.Module):
    """EAGLE-3 draft. Buffers `d2t` [Vd] (offset: target id = i + d2t[i]) and `t2d` [V] map the reduced vocabulary."""

    d2t: torch.Tensor
    t2d: torch.Tensor
    cos_LD: torch.Tensor
    sin_LD: torch.Tensor

    def __init__(self, config: DraftConfig, draft_token_ids: torch.Tensor | None = None) -> None:
        """`draft_token_ids`: sorted target ids of the draft vocabulary [Vd]; the first Vd ids when left out."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.value_head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("d2t", torch.empty(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.empty(config.vocab_size, dtype=torch.bool))
        self.set_vocabulary(torch.arange(config.draft_vocab_size) if draft_token_ids is None else draft_token_ids)
        cos, sin = rope_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos_LD", cos, persistent=False)
        self.register_buffer("sin_LD", sin, persistent=False)

    def set_vocabulary(self, draft_token_ids: torch.Tensor) -> None:
        """Fill the two maps from the sorted target ids of the draft vocabulary."""
        ids = draft_token_ids.long()
        self.d2t.copy_(ids - torch.arange(len(ids)))
        self.t2d.zero_()
        self.t2d[ids] = True

    @property
    def draft_token_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary [Vd]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def fuse(self, aux_BT3H: torch.Tensor) -> torch.Tensor:
        """The target's three hidden states as one feature [B, T, H]."""
        fused: torch.Tensor = self.fc(aux_BT3H)
        return fused

    def project(
        self, embeds_BTH: torch.Tensor, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of draft positions, rotated."""
        layer = self.midlayer
        joined_BT2H = torch.cat([layer.input_layernorm(embeds_BTH), layer.hidden_norm(hidden_BTH)], dim=-1)
        return layer.self_attn.project(joined_BT2H, self.cos_LD[positions_BT], self.sin_LD[positions_BT])

    def finish(self, attended_BTC: torch.Tensor, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Output projection, residuals and MLP [B, T, H]; a chain continues with the result as it is (no norm)."""
        layer = self.midlayer
        hidden_BTH = hidden_BTH + layer.self_attn.o_proj(attended_BTC)
        out: torch.Tensor = hidden_BTH + layer.mlp(layer.post_attention_layernorm(hidden_BTH))
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary [..., Vd]."""
        out: torch.Tensor = self.lm_head(self.norm(hidden))
        return out

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """Predicted number of tokens accepted from here on [...]."""
        out: torch.Tensor = self.value_head(self.norm(hidden)).squeeze(-1)
        return out


def rope_table(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions [L, D] (RoFormer, arXiv 2104.09864; halves as in Llama)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BNTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys to their positions."""
    low, high = x_BNTD.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x_BNTD * cos_BTD[:, None].to(x_BNTD.dtype) + turned * sin_BTD[:, None].to(x_BNTD.dtype)
