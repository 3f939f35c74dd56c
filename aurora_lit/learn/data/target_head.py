"""What learning needs of the target: its input embedding, its head, and what a draft must fit. No layers.

Shapes: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aurora_lit.models.target import Target
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.sampling.distribution import GREEDY_BELOW


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the head says of some hidden states."""

    lse_N: Tensor
    """fp32. Log-sum-exp of the logits."""
    tempered_lse_N: Tensor
    """fp32. The same of the logits divided by the temperature; of the logits as they are for a greedy one."""
    top_N: Tensor
    """int64. Token of the largest logit."""


class TargetHead(nn.Module):
    """The two ends of a target whose layers were let go.

    >>> ends = TargetHead(Target.load(folder, precision="bf16"))
    >>> ends.read(last_NH, temperature=0.7).tempered_lse_N
    """

    embedding_VH: Tensor
    head_VH: Tensor

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size = target.vocab_size, target.hidden_size
        self.aux_layer_ids = target.aux_layer_ids
        self.finish = target.finish
        self.register_buffer("embedding_VH", target.embedding_rows())
        head_VH = target.head_rows(torch.arange(target.vocab_size))
        # As serving stores it, but no larger than a training step in bf16 wants it.
        self.register_buffer("head_VH", head_VH if target.kv_dtype == torch.float32 else head_VH.bfloat16())

    def fit_head(self, module: DraftModule) -> None:
        """Give a module the head's part for the vocabulary that its draft has now."""
        ids_D = module.draft.draft_token_ids.to(self.head_VH.device)
        module.head_VdH = self.head_VH[ids_D].to(module.embedding_VH.device)
        module.finish = self.finish.rows(ids_D)

    @torch.no_grad()
    def read(self, last_NH: Tensor, *, temperature: float, chunk: int = 64) -> Reading:
        """Read hidden states, in chunks of rows so that their logits stay in cache; the result lies on the CPU."""
        parts = []
        for rows_CH in torch.split(last_NH, chunk):
            logits_CV = self.finish((rows_CH.to(self.head_VH.device, self.head_VH.dtype) @ self.head_VH.T).float())
            lse_C = logits_CV.logsumexp(-1)
            tempered = lse_C if temperature < GREEDY_BELOW else (logits_CV / temperature).logsumexp(-1)
            parts.append((lse_C, tempered, logits_CV.argmax(-1)))
        if not parts or not len(last_NH):
            none = torch.zeros(0)
            return Reading(lse_N=none, tempered_lse_N=none, top_N=none.long())
        lse_N, tempered_N, top_N = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return Reading(lse_N=lse_N, tempered_lse_N=tempered_N, top_N=top_N)
