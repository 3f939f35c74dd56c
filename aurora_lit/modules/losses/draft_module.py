"""The draft as a LightningModule: LK loss and value loss over K unrolled steps, and online the policy terms.

The draft learns on its own hidden states: step 0 starts from the target's features, step j from what step j - 1 put
out, as in serving (modules/losses/unroll.py).

What is left out: the loop and its budget (pretrain.py, learn/), batches (learn/), inference (serve/).

Shapes: B rows, T positions, K steps, Q rounds, H hidden, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from lightning import LightningModule
from torch.optim.lr_scheduler import LambdaLR

from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.draft.logit_transform import LINEAR, LogitTransform
from aurora_lit.modules.losses.batch import DraftBatch, OnlineBatch
from aurora_lit.modules.losses.lk import KL_DECAY, LKStats, fused_lk_loss
from aurora_lit.modules.losses.policy import PolicyTerms, evidence, policy_terms, usable_rounds
from aurora_lit.modules.losses.unroll import Unrolled, shift, unroll, unroll_rounds


@dataclass(frozen=True, kw_only=True)
class OnlineWeights:
    """What the online loss is made of: LK(live) + w·PPO + β·LK(replay) + c_v·value − β_H·entropy."""

    base_loss: Literal["lk", "kl", "none"] = "lk"
    """"kl": KL alone in LK's place. "none": nothing in its place, the policy loss alone."""
    ppo_weight: float = 1.0
    """w = ppo_weight·(1 − exp(−3ᾱ))·e: the policy grows as the draft becomes competent, and as there is evidence:
    e = M / (M + N) with M sampled proposals and N targets of a base loss. 0 leaves it out."""
    clip: float = 0.2
    """PPO's ε."""
    gae_lambda: float = 0.95
    entropy_weight: float = 0.0
    """β_H."""
    replay_weight: float = 1.0
    """β."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one batch showed, by draft step; rows are target positions."""

    loss: torch.Tensor
    stats: LKStats
    weight_KBT: torch.Tensor
    """0 where the step has no target."""


@dataclass(frozen=True, kw_only=True)
class OnlineReport(StepReport):
    """The same for an online batch, and each term of its loss. Scalars; those of `policy` have a gradient."""

    lk_live: torch.Tensor
    lk_replay: torch.Tensor
    value_loss: torch.Tensor
    """Of all positions and, where there are policy terms, of the rounds too."""
    policy: PolicyTerms
    policy_weight: torch.Tensor
    """w; 0 without policy terms."""
    tested_K: torch.Tensor
    """Rounds of the batch, usable or not, in which proposal i was reached."""
    accepted_K: torch.Tensor
    """Rounds in which it was accepted: acceptance by position as it was served."""


class DraftModule(LightningModule):
    """Trains a `Draft` against recorded targets.

    `embedding_VH` and `head_VdH` are the target's input embedding and its head's rows for the draft vocabulary,
    `finish` is what else its head does there; all stay frozen and are not part of the state.
    """

    embedding_VH: torch.Tensor
    head_VdH: torch.Tensor

    def __init__(
        self,
        draft: Draft,
        *,
        embedding_VH: torch.Tensor,
        head_VdH: torch.Tensor,
        finish: LogitTransform = LINEAR,
        num_steps: int = 4,
        step_decay: float = 0.8,
        value_weight: float = 0.1,
        online: OnlineWeights | None = None,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        total_steps: int = 10_000,
        final_factor: float = 0.05,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.register_buffer("embedding_VH", embedding_VH, persistent=False)
        self.register_buffer("head_VdH", head_VdH, persistent=False)
        self.finish = finish
        self.num_steps = num_steps
        self.step_decay = step_decay
        self.value_weight = value_weight
        self.online = online or OnlineWeights()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_factor = final_factor

    @overload  # type: ignore[override]
    def training_step(self, batch: DraftBatch, batch_idx: int = 0) -> StepReport: ...

    @overload
    def training_step(self, batch: OnlineBatch, batch_idx: int = 0) -> OnlineReport: ...

    def training_step(self, batch: DraftBatch | OnlineBatch, batch_idx: int = 0) -> StepReport:
        """Loss and statistics of one batch; LK and value loss are divided by the summed weights of all steps."""
        if isinstance(batch, OnlineBatch):
            return self._online_step(batch)
        unrolled = self._unroll(batch, batch.weight_BT > 0)
        valid_KBT, weight_KBT = self._weights(batch)
        loss_sum, value_sum, stats = self._supervised(batch, unrolled, valid_KBT, weight_KBT)
        loss = (loss_sum + self.value_weight * value_sum) / weight_KBT.sum().clamp_min(1.0)
        return StepReport(loss=loss, stats=stats, weight_KBT=valid_KBT)

    def _online_step(self, batch: OnlineBatch) -> OnlineReport:
        """One total of all terms, each an average over what it is about."""
        traces, online = batch.traces, self.online
        wanted_BT = traces.weight_BT > 0
        wanted_BT[batch.row_Q, batch.root_Q] = True  # rounds begin there
        unrolled = self._unroll(traces, wanted_BT)
        valid_KBT, weight_KBT = self._weights(traces)
        live_B1 = batch.live_B[:, None]
        live_KBT, replay_KBT = weight_KBT * live_B1, weight_KBT * ~live_B1
        replay_weight = online.replay_weight * batch.replay_part
        share_KBT = batch.live_part * live_KBT / live_KBT.sum().clamp_min(1.0)
        share_KBT = share_KBT + replay_weight * replay_KBT / replay_KBT.sum().clamp_min(1.0)
        kl_decay = 0.0 if online.base_loss == "kl" else KL_DECAY
        lk_loss, value_loss, stats = self._supervised(traces, unrolled, valid_KBT, share_KBT, kl_decay=kl_decay)
        if online.base_loss == "none":
            lk_loss = lk_loss.new_zeros(())
        policy, policy_weight = PolicyTerms.none(lk_loss), lk_loss.new_zeros(())
        if online.ppo_weight > 0 or online.entropy_weight > 0:
            policy = self._policy_terms(batch, unrolled)
            counted_KBT = valid_KBT * live_B1 if batch.live_B.any() else valid_KBT
            mean_alpha = (stats.alpha_N.view_as(valid_KBT) * counted_KBT).sum() / counted_KBT.sum().clamp_min(1.0)
            policy_weight = online.ppo_weight * (1 - torch.exp(-KL_DECAY * mean_alpha))
            if online.base_loss != "none":
                policy_weight = policy_weight * evidence(batch, policy.num_proposals, counted_KBT.sum())
            value_loss = value_loss + batch.rounds_part * policy.value_loss
        rounds_loss = policy_weight * policy.policy_loss - online.entropy_weight * policy.entropy
        loss = lk_loss + self.value_weight * value_loss + batch.rounds_part * rounds_loss
        row_loss_KBT = stats.loss_N.view_as(valid_KBT)
        place_K = torch.arange(batch.proposal_QK.shape[1], device=batch.row_Q.device)
        within_QK = place_K < batch.num_proposed_Q[:, None]
        return OnlineReport(
            loss=loss,
            stats=stats,
            weight_KBT=valid_KBT,
            lk_live=(live_KBT * row_loss_KBT).sum() / live_KBT.sum().clamp_min(1.0),
            lk_replay=(replay_KBT * row_loss_KBT).sum() / replay_KBT.sum().clamp_min(1.0),
            value_loss=value_loss.detach(),
            policy=policy,
            policy_weight=policy_weight,
            tested_K=(within_QK & (place_K <= batch.num_accepted_Q[:, None])).sum(0),
            accepted_K=(within_QK & (place_K < batch.num_accepted_Q[:, None])).sum(0),
        )

    def unroll(self, batch: DraftBatch, wanted_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of the K steps [K, B, T, H], shifted so that row m of every step aims at target position m.

        wanted_BT: bool, positions that matter; None: those that have a weight. Elsewhere they may be 0.
        """
        return self._unroll(batch, batch.weight_BT > 0 if wanted_BT is None else wanted_BT).hidden_KBTH

    def _unroll(self, batch: DraftBatch, wanted_BT: torch.Tensor) -> Unrolled:
        return unroll(
            self.draft,
            token_ids_BT=batch.token_ids_BT,
            aux_BT3H=batch.aux_BT3H.to(self.draft.fc.weight.dtype),  # the draft's own precision, unless autocast is on
            embedding_VH=self.embedding_VH,
            num_steps=self.num_steps,
            wanted_BT=wanted_BT,
        )

    def _weights(self, batch: DraftBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a step has a target (1 or 0), and how much that counts; both [K, B, T]."""
        K, ones_BT = self.num_steps, torch.ones_like(batch.weight_BT)
        valid_KBT = torch.stack([shift(ones_BT, 1 + step) for step in range(K)]) * (batch.weight_BT > 0)
        decay_K = self.step_decay ** torch.arange(K, device=ones_BT.device)
        return valid_KBT, valid_KBT * batch.weight_BT * decay_K[:, None, None]

    def _supervised(
        self,
        batch: DraftBatch,
        unrolled: Unrolled,
        valid_KBT: torch.Tensor,
        weight_KBT: torch.Tensor,
        *,
        kl_decay: float = KL_DECAY,
    ) -> tuple[torch.Tensor, torch.Tensor, LKStats]:
        """Weighted sums of the LK loss and of the value head's squared error; statistics."""
        hidden_KBTH = unrolled.hidden_KBTH
        K, B, T, H = hidden_KBTH.shape
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
            target_finish=self.finish,
            target_lse_N=batch.lse_BT.flatten()[kept_N],
            kl_decay=kl_decay,
        )
        stats = LKStats(
            alpha_N=_spread(kept.alpha_N, kept_N, B * T),
            kl_N=_spread(kept.kl_N, kept_N, B * T),
            top1_match_N=_spread(kept.top1_match_N, kept_N, B * T),
            kl_decay=kl_decay,
        )
        value_KBT = self.draft.value(hidden_KBTH.detach())
        to_go_KBT = _accepted_to_go(stats.alpha_N.view(K, B, T) * (valid_KBT > 0))
        return loss_sum, ((value_KBT - to_go_KBT).square() * weight_KBT).sum(), stats

    def _policy_terms(self, batch: OnlineBatch, unrolled: Unrolled) -> PolicyTerms:
        """Policy and value loss of those rounds that have a policy ratio."""
        rounds = usable_rounds(batch, self.draft)
        if not len(rounds.row_Q):
            return PolicyTerms.none(unrolled.hidden_KBTH)
        hidden_QKH = unroll_rounds(
            self.draft,
            unrolled,
            row_Q=rounds.row_Q,
            root_Q=rounds.root_Q,
            proposal_QK=rounds.proposal_QK,
            embedding_VH=self.embedding_VH,
        )
        return policy_terms(
            rounds,
            self.draft,
            hidden_QKH,
            head_VH=self.head_VdH,
            finish=self.finish,
            clip=self.online.clip,
            gae_lambda=self.online.gae_lambda,
        )

    def configure_optimizers(self) -> Any:
        """The optimizers, with linear warm-up and cosine decay for each."""
        optimizers = self.make_optimizers()
        return optimizers, [LambdaLR(optimizer, self.rate_factor) for optimizer in optimizers]

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layer's matrices, AdamW for heads and norms; for schedules of any kind.

        Muon (Jordan et al. 2024; its rate scaled to AdamW's as in Liu et al., arXiv 2502.16982) learns more from as
        many positions, and positions are what is dear.
        """
        heads = {id(self.draft.lm_head.weight), id(self.draft.value_head.weight)}
        matrices = [p for p in self.draft.parameters() if p.ndim > 1 and id(p) not in heads]
        others = [p for p in self.draft.parameters() if p.ndim <= 1 or id(p) in heads]
        rate = self.learning_rate
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def rate_factor(self, step: int) -> float:
        """Learning-rate factor at an optimiser step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def _spread(values_KR: torch.Tensor, rows_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Values of some rows as those of all [K, N], zero elsewhere."""
    return values_KR.new_zeros(len(values_KR), num_rows).index_copy(1, rows_R, values_KR)


def _accepted_to_go(alpha_KBT: torch.Tensor) -> torch.Tensor:
    """G_j = α_j (1 + G_{j+1}), G_K = 0, along each chain: the value head's target.

    Step j of a chain aims at target position m, step j + 1 of the same chain at m + 1.
    """
    to_go = torch.zeros_like(alpha_KBT)
    ahead_BT = torch.zeros_like(alpha_KBT[0])
    for step in range(len(alpha_KBT) - 1, -1, -1):
        to_go[step] = alpha_KBT[step] * (1 + ahead_BT)
        ahead_BT = shift(to_go[step], -1)
    return to_go
