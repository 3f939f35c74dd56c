"""A draft made ready to run here: its weights packed, its native calls prepared, its numbers tried.

What is left out: drafting itself (serve/speculation/drafter.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_lit.errors import CheckpointError
from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Decoder
from aurora_lit.kernels.draft_steps import DraftSteps
from aurora_lit.kernels.packed_linear import pack_linears
from aurora_lit.models.fused_layers import draft_steps, fuse_draft
from aurora_lit.models.slots import read_attention
from aurora_lit.models.target import Target
from aurora_lit.modules.draft.eagle3 import Draft, rope_table
from aurora_lit.modules.sampling.verification import DraftVocabulary

_TRIAL_POSITIONS, _TRIAL_SCALE = 4, 30.0


@dataclass(frozen=True, kw_only=True)
class RuntimeDraft:
    """A draft ready to run here, so that swapping it in is a matter of references."""

    draft: Draft
    decoder: Decoder | None
    """Its layer as a native call, where there are kernels."""
    steps: DraftSteps | None
    """Whole steps of a proposal as one, where the target's embedding is a plain table too."""
    vocabulary: DraftVocabulary


def prepare_draft(draft: Draft, target: Target, *, capacity: int) -> RuntimeDraft:
    """Pack a draft's weights in place, for sequences of up to `capacity`; from any thread.

    Raises CheckpointError when it computes numbers that are not finite.
    """
    config, device = draft.config, target.model.device
    draft.eval().requires_grad_(False)
    if on_kernels(device):
        pack_linears(draft, dtype=_draft_dtype(target))
    else:
        draft.to(device, target.kv_dtype)
    draft.cos_LD, draft.sin_LD = (
        table.to(device) for table in rope_table(capacity, config.head_dim, config.rope_theta)
    )
    _try(draft, target)
    vocabulary = DraftVocabulary.of_offsets(draft.d2t.to(device), vocab_size=config.vocab_size)
    decoder = fuse_draft(draft)
    steps = None if decoder is None else draft_steps(draft, decoder, target.embedding, vocabulary.target_id_D)
    return RuntimeDraft(draft=draft, decoder=decoder, steps=steps, vocabulary=vocabulary)


def _draft_dtype(target: Target) -> torch.dtype:
    """How its weights are stored: a step is the time to read them, and eight bits propose as well as sixteen."""
    if target.kv_dtype != torch.float32 and native.has_byte_tiles():
        return native.BYTES
    return torch.int8 if target.kv_dtype != torch.float32 and native.has_vnni() else target.kv_dtype


def on_kernels(device: torch.device) -> bool:
    """Whether drafts run on the native kernels there, which take and give fp32."""
    return device.type == "cpu" and native.library() is not None


@torch.no_grad()
def _try(draft: Draft, target: Target) -> None:
    """Run a few positions of strong features: what serving computes must be finite."""
    positions_1T = torch.arange(_TRIAL_POSITIONS, device=target.model.device)[None]
    embeds_1TH = target.embedding(positions_1T % target.vocab_size)
    generator = torch.Generator().manual_seed(0)
    size = (1, _TRIAL_POSITIONS, 3 * target.hidden_size)
    aux_1T3H = _TRIAL_SCALE * torch.randn(size, generator=generator).to(embeds_1TH)
    fused_1TH = draft.fuse(aux_1T3H)
    query, key, value = draft.project(embeds_1TH, fused_1TH, positions_1T)
    attended = read_attention(query, key, value, scale=draft.config.head_dim**-0.5)
    hidden_1TH = draft.finish(attended.reshape(1, _TRIAL_POSITIONS, -1), fused_1TH)
    for what, numbers in (("logits", draft.logits(hidden_1TH)), ("values", draft.value(hidden_1TH))):
        if not bool(numbers.isfinite().all()):
            raise CheckpointError(f"the draft is refused: it computes {what} that are NaN or infinite")
