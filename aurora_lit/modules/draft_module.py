"""The draft as a LightningModule: K unrolled steps (EAGLE-3's training-time test), LK loss, value loss.

The draft learns on its own hidden states: step 0 starts from the target's features, step j from what step j - 1 put
out, as in serving. Steps are indexed by their root position t: at step j the draft holds token t + 1 + j and proposes
token t + 2 + j, so its target is the target's distribution at position t + 1 + j.

What is left out: the loop and its budget (pretrain.py), batches (learn/dataset.py), inference (serve/).

Shapes: B rows, T positions, K steps, H hidden, N heads, G key-value heads, D head size, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from aurora_lit.modules.acceptance import LKStats, fused_lk_loss
from aurora_lit.modules.draft import Draft
from aurora_lit.modules.draft_batch import DraftBatch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one batch showed, by draft step; rows are target positions."""

    loss: torch.Tensor
    stats: LKStats
    weight_KBT: torch.Tensor
    """0 where the step has no target."""


class DraftModule(LightningModule):
    """Trains a `Draft` against recorded targets.

    `embedding_VH` and `head_VdH` are the target's input embedding and its head's rows for the draft vocabulary; both
    stay frozen and are not part of the state.
    """

    embedding_VH: torch.Tensor
    head_VdH: torch.Tensor

    def __init__(
        self,
        draft: Draft,
        *,
        embedding_VH: torch.Tensor,
        head_VdH: torch.Tensor,
        num_steps: int = 4,
        step_decay: float = 0.8,
        value_weight: float = 0.1,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        total_steps: int = 10_000,
        final_factor: float = 0.05,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.register_buffer("embedding_VH", embedding_VH, persistent=False)
        self.register_buffer("head_VdH", head_VdH, persistent=False)
        self.num_steps = num_steps
        self.step_decay = step_decay
        self.value_weight = value_weight
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_factor = final_factor

    def training_step(self, batch: DraftBatch, batch_idx: int = 0) -> StepReport:  # type: ignore[override]
        """Loss and statistics of one batch (`loss` is divided by the summed weights of all steps)."""
        hidden_KBTH = self.unroll(batch)
        K, B, T, H = hidden_KBTH.shape
        valid_KBT = torch.stack([_shift(torch.ones_like(batch.weight_BT), 1 + step) for step in range(K)])
        valid_KBT = valid_KBT * (batch.weight_BT > 0)
        decay_K = self.step_decay ** torch.arange(K, device=hidden_KBTH.device)
        weight_KBT = valid_KBT * batch.weight_BT * decay_K[:, None, None]
        # Rows that no step weighs cost nothing: the head is half of the work.
        kept_N = (weight_KBT > 0).any(0).flatten().nonzero()[:, 0]
        if not kept_N.numel():  # only prompts that are not learnt from
            kept_N = kept_N.new_zeros(1)
        loss_sum, kept = fused_lk_loss(
            h_NH=self.draft.norm(hidden_KBTH.view(K, B * T, H)[:, kept_N]),
            weight_DH=self.draft.lm_head.weight,
            row_weight_N=weight_KBT.view(K, B * T)[:, kept_N],
            target_h_NG=batch.last_BTH.flatten(0, 1)[kept_N],
            target_weight_DG=self.head_VdH,
            target_lse_N=batch.lse_BT.flatten()[kept_N],
        )
        stats = LKStats(
            alpha_N=_spread(kept.alpha_N, kept_N, B * T),
            kl_N=_spread(kept.kl_N, kept_N, B * T),
            top1_match_N=_spread(kept.top1_match_N, kept_N, B * T),
        )
        total_weight = weight_KBT.sum().clamp_min(1.0)
        value_KBT = self.draft.value(hidden_KBTH.detach())
        to_go_KBT = _accepted_to_go(stats.alpha_N.view(K, B, T) * (valid_KBT > 0))
        value_loss = ((value_KBT - to_go_KBT).square() * weight_KBT).sum()
        loss = (loss_sum + self.value_weight * value_loss) / total_weight
        return StepReport(loss=loss, stats=stats, weight_KBT=valid_KBT)

    def unroll(self, batch: DraftBatch) -> torch.Tensor:
        """Hidden states of the K steps [K, B, T, H], shifted so that row m of every step aims at target position m."""
        draft = self.draft
        B, T = batch.token_ids_BT.shape
        device = batch.token_ids_BT.device
        embeds_BTH = nn.functional.embedding(batch.token_ids_BT, self.embedding_VH)
        causal_TT = torch.full((T, T), float("-inf"), device=device).triu(1)
        hidden_BTH = draft.fuse(batch.aux_BT3H)
        chain: list[tuple[torch.Tensor, torch.Tensor]] = []
        shifted = []
        for step in range(self.num_steps):
            positions_BT = (torch.arange(T, device=device) + step).expand(B, T)
            query, key, value = draft.project(_shift(embeds_BTH, -(1 + step)), hidden_BTH, positions_BT)
            chain.append((key, value))
            hidden_BTH = draft.finish(_chain_attention(query, chain, causal_TT), hidden_BTH)
            shifted.append(_shift(hidden_BTH, 1 + step))
        return torch.stack(shifted)

    def configure_optimizers(self) -> Any:
        """Muon for the layer's matrices, AdamW for heads and norms; linear warm-up and cosine decay for both.

        Muon (Jordan et al. 2024; its rate scaled to AdamW's as in Liu et al., arXiv 2502.16982) learns more from as
        many positions, and positions are what is dear.
        """
        heads = {id(self.draft.lm_head.weight), id(self.draft.value_head.weight)}
        matrices = [p for p in self.draft.parameters() if p.ndim > 1 and id(p) not in heads]
        others = [p for p in self.draft.parameters() if p.ndim <= 1 or id(p) in heads]
        rate = self.learning_rate
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        return optimizers, [LambdaLR(optimizer, self.rate_factor) for optimizer in optimizers]

    def rate_factor(self, step: int) -> float:
        """Learning-rate factor at an optimiser step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def _chain_attention(
    query_BNTD: torch.Tensor, chain: list[tuple[torch.Tensor, torch.Tensor]], causal_TT: torch.Tensor
) -> torch.Tensor:
    """Attend to step 0's keys causally and to the own chain's later keys; returns [B, T, N*D].

    `chain` holds keys and values [B, G, T, D] of step 0, 1, …, of which the last belongs to the query's step.
    """
    B, N, T, D = query_BNTD.shape
    groups = N // chain[0][0].shape[1]
    keys = [key.repeat_interleave(groups, dim=1) for key, _ in chain]
    values = [value.repeat_interleave(groups, dim=1) for _, value in chain]
    scaled_BNTD = query_BNTD * D**-0.5
    scores = (scaled_BNTD @ keys[0].transpose(2, 3)).float() + causal_TT
    own = [(scaled_BNTD * key).sum(-1, keepdim=True).float() for key in keys[1:]]
    weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1).to(values[0].dtype)
    out_BNTD = weights[..., :T] @ values[0]
    for step, value in enumerate(values[1:]):
        out_BNTD = out_BNTD + weights[..., T + step, None] * value
    return out_BNTD.transpose(1, 2).reshape(B, T, N * D)


def _spread(values_KR: torch.Tensor, rows_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Values of some rows as those of all [K, N], zero elsewhere."""
    return values_KR.new_zeros(len(values_KR), num_rows).index_copy(1, rows_R, values_KR)


def _shift(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """Move along dim 1 by `by` positions (later if positive), zeros moving in."""
    out = torch.zeros_like(x_BT)
    if by >= x_BT.shape[1] or -by >= x_BT.shape[1]:
        return out
    if by >= 0:
        out[:, by:] = x_BT[:, : x_BT.shape[1] - by]
    else:
        out[:, :by] = x_BT[:, -by:]
    return out


def _accepted_to_go(alpha_KBT: torch.Tensor) -> torch.Tensor:
    """G_j = α_j (1 + G_{j+1}), G_K = 0, along each chain: the value head's target.

    Step j of a chain aims at target position m, step j + 1 of the same chain at m + 1.
    """
    to_go = torch.zeros_like(alpha_KBT)
    ahead_BT = torch.zeros_like(alpha_KBT[0])
    for step in range(len(alpha_KBT) - 1, -1, -1):
        to_go[step] = alpha_KBT[step] * (1 + ahead_BT)
        ahead_BT = _shift(to_go[step], -1)
    return to_go
