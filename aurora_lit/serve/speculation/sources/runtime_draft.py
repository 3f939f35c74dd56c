"""Prepares a draft to run on this machine: packs its weights, sets up its native calls, and checks its outputs.

Left out: drafting itself (serve/speculation/sources/drafter.py).

Shapes: T positions, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aurora_lit.errors import CheckpointError
from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Decoder
from aurora_lit.kernels.draft_steps import DraftSteps
from aurora_lit.kernels.packed_linear import PackedLinear, pack_linears
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.attention import causal_attention
from aurora_lit.models.fused_layers import draft_steps, fuse_draft
from aurora_lit.models.interface import Target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft, rotary_table

_CHECK_POSITIONS, _CHECK_SCALE = 4, 30.0
_HAS_COARSE_HEAD = (WeightFormat.INT8_PER_OUTPUT, WeightFormat.INT8_GROUPED)
"""Formats of a draft whose head has a copy in four bits, which chains of few sequences read first."""


@dataclass(frozen=True, kw_only=True)
class RuntimeDraft:
    """A draft that is prepared to run, so that a swap only exchanges references."""

    draft: Eagle3Draft
    decoder: Decoder | None
    """Its layer as one native call; None without kernels."""
    steps: DraftSteps | None
    """Whole draft steps as native calls; None without kernels, or if the target's embedding is no plain table."""
    target_id_D: torch.Tensor
    """int64. The target's id of each token of its vocabulary."""


def prepare_draft(draft: Eagle3Draft, target: Target, *, capacity: int) -> RuntimeDraft:
    """Prepare a draft, packing its weights in place, for slots of `capacity` positions; from any thread.

    Raises CheckpointError if it computes values that are not finite.
    """
    config, device = draft.config, target.device
    draft.eval().requires_grad_(False)
    coarse_head = None
    if uses_kernels(device):
        weight_format = _draft_format(target)
        pack_linears(draft, weight_format=weight_format)
        if weight_format in _HAS_COARSE_HEAD:
            coarse_head = _in_four_bits(draft.lm_head)
    else:
        draft.to(device, target.kv_dtype)
    draft.cos_LD, draft.sin_LD = (table.to(device) for table in rotary_table(capacity, config))
    _check_outputs(draft, target)
    target_id_D = draft.draft_token_ids.to(device)
    decoder = fuse_draft(draft) if config.is_plain else None
    steps = None
    if decoder is not None:
        steps = draft_steps(draft, decoder, target.embedding, target_id_D, coarse_head)
    return RuntimeDraft(draft=draft, decoder=decoder, steps=steps, target_id_D=target_id_D)


def _in_four_bits(head: nn.Module) -> PackedLinear:
    """A copy of a packed head without a bias."""
    assert isinstance(head, PackedLinear)
    unpacked = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    unpacked.weight = nn.Parameter(head.rows(torch.arange(head.out_features)), requires_grad=False)
    return PackedLinear(unpacked, WeightFormat.INT4_GROUPED)


def _draft_format(target: Target) -> WeightFormat:
    """Format of the draft's weights. A step takes as long as reading them, and proposals need not be exact."""
    if target.kv_dtype != torch.float32 and native.has_int8_tiles():
        return WeightFormat.INT8_PER_OUTPUT
    if target.kv_dtype != torch.float32 and native.has_byte_products():
        return WeightFormat.INT8_GROUPED
    return WeightFormat.of_dtype(target.kv_dtype)


def uses_kernels(device: torch.device) -> bool:
    """True if drafts run on the native kernels there; these take and return fp32."""
    return device.type == "cpu" and native.library() is not None


@torch.no_grad()
def _check_outputs(draft: Eagle3Draft, target: Target) -> None:
    """Run a few positions with large features, and raise CheckpointError if an output is not finite."""
    positions_1T = torch.arange(_CHECK_POSITIONS, device=target.device)[None]
    embeds_1TH = target.embedding(positions_1T % target.vocab_size)
    generator = torch.Generator().manual_seed(0)
    size = (1, _CHECK_POSITIONS, 3 * target.hidden_size)
    aux_1T3H = _CHECK_SCALE * torch.randn(size, generator=generator).to(embeds_1TH)
    fused_1TH = draft.combine_hidden_states(aux_1T3H)
    query, key, value = draft.project_qkv(embeds_1TH, fused_1TH, positions_1T)
    attended = causal_attention(query, key, value, scale=draft.config.head_dim**-0.5)
    hidden_1TH = draft.complete_layer(attended.reshape(1, _CHECK_POSITIONS, -1), fused_1TH)
    for name, outputs in (("logits", draft.compute_logits(hidden_1TH)), ("values", draft.compute_value(hidden_1TH))):
        if not bool(outputs.isfinite().all()):
            raise CheckpointError(f"the draft is refused: it computes {name} that are NaN or infinite")
