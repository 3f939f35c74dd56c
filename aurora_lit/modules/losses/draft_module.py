"""The draft as a LightningModule: the LK or PPO loss and the value loss over K unrolled steps.

The draft trains on its own hidden states, as it will be served: step 0 reads the target's hidden states, step j the
draft's own of step j − 1 (modules/losses/unroll.py).

Leaves out the training loop and its budget (learn/), where batches come from (learn/data/), and serving (serve/).

Shapes: B traces, T positions, K steps, H draft hidden size (of embeddings and `head_VdH`: the target's),
V target vocabulary, Vd draft vocabulary, N = B·T rows, R rows that have a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.draft.logit_transform import IDENTITY, LogitTransform
from aurora_lit.modules.losses.batch import OnlineBatch, TraceBatch
from aurora_lit.modules.losses.chain_losses import ChainHeads, OldChains, chain_losses
from aurora_lit.modules.losses.fused_lk import TargetRows, fused_lk_loss
from aurora_lit.modules.losses.lk import LKStats
from aurora_lit.modules.losses.muon import BlockMuon
from aurora_lit.modules.losses.objective import OnlineReport, OnlineWeights
from aurora_lit.modules.losses.token_sample import TokenSample, sample_tokens
from aurora_lit.modules.losses.unroll import Embed, StepwiseChains, shift_positions, unroll


class DraftModule(LightningModule):
    """Trains a draft against recorded targets, in a loop of Fabric: Trainer cannot fit it.

    `embed` is the target's input embedding, token ids [...] -> [..., H] on the ids' device, and `head_VdH` its head's
    rows for the draft vocabulary; `logit_transform` belongs to that head. They are frozen and not part of the state.
    """

    head_VdH: torch.Tensor

    def __init__(
        self,
        draft: Eagle3Draft,
        *,
        embed: Embed,
        head_VdH: torch.Tensor,
        logit_transform: LogitTransform = IDENTITY,
        num_steps: int = 4,
        value_weight: float = 0.1,
        online: OnlineWeights | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        """num_steps: K. value_weight: c_v."""
        super().__init__()
        self.draft = draft
        self.embed = embed
        self.register_buffer("head_VdH", head_VdH, persistent=False)
        self.logit_transform = logit_transform
        self.num_steps = num_steps
        self.value_weight = value_weight
        self.online = online or OnlineWeights()
        self._num_samples = 0
        self._before_rest: tuple[Eagle3Draft, ...] = ()
        """The draft as it was when the present rest began, in a tuple so that it is no part of the module's state."""
        self.learning_rate = learning_rate
        self.between_pieces: Callable[[], None] = lambda: None
        """Called between the pieces of an online step, forward and backward, where it can wait."""

    def training_step(self, batch: OnlineBatch) -> OnlineReport:  # type: ignore[override]
        """Each term is an average over its own rows: live positions, or replayed positions.

        Positions whose token the draft does not have add 0: no draft of this vocabulary is accepted there. Others add
        the loss of their chain (modules/losses/chain_losses.py).
        """
        traces, online = batch.traces, self.online
        weight_BT = traces.weight_BT.clone()
        weight_BT[:, 0] = 0.0  # there is no token before the first, so no chain begins there
        needed_BT = weight_BT > 0
        needed_BT[0, 1] |= ~needed_BT.any()  # a batch of prompts only: one row, of weight 0
        live_B1 = batch.live_B[:, None]
        live_BT, replay_BT = weight_BT * live_B1, weight_BT * ~live_B1
        replay_weight = online.replay_weight * batch.replay_fraction
        num_live = live_BT.sum() / max(batch.live_fraction, 1e-9)  # of the whole batch
        share_BT = live_BT / num_live.clamp_min(online.fewest_live)
        share_BT = share_BT + replay_weight * replay_BT / replay_BT.sum().clamp_min(1.0)
        share_BT[:, :-1] *= self.draft.t2d[traces.token_ids_BT[:, 1:]]
        heads = self._heads(batch)
        losses = chain_losses(
            self.draft,
            self._chains(self.draft, traces, needed_BT),
            share_BT,
            traces.last_BTH,
            heads,
            weights=online,
            num_steps=self.num_steps,
            old=self._old_chains(batch, needed_BT, heads),
            between_steps=self.between_pieces,
        )
        mask_KBT, stats = losses.mask_KBT, losses.stats
        row_loss_KBT = stats.loss_N.view_as(mask_KBT) * losses.importance_KBT
        return OnlineReport(
            loss=losses.lk_sum + self.value_weight * losses.value_sum,
            stats=stats,
            mask_KBT=mask_KBT,
            lk_live=(live_BT * row_loss_KBT).sum() / live_BT.sum().clamp_min(1.0),
            lk_replay=(replay_BT * row_loss_KBT).sum() / replay_BT.sum().clamp_min(1.0),
            value_loss=losses.value_sum.detach(),
            tested_K=batch.tested_K,
            accepted_K=batch.accepted_K,
        )

    def forget_rest(self) -> None:
        """The weights have changed otherwise than by steps: q_old of positions that were used before says nothing."""
        self._before_rest = ()

    def _chains(self, draft: Eagle3Draft, traces: TraceBatch, needed_BT: torch.Tensor) -> StepwiseChains:
        return StepwiseChains(
            draft,
            token_ids_BT=traces.token_ids_BT,
            aux_BT3H=traces.aux_BT3H.to(draft.fc.weight.dtype),  # autocast, if it is on, casts them again
            embed=self.embed,
            needed_BT=needed_BT,
        )

    @torch.no_grad()
    def _old_chains(self, batch: OnlineBatch, needed_BT: torch.Tensor, heads: ChainHeads) -> OldChains | None:
        """For PPO at rest, when nothing is new and positions are used again: the draft as it was before this rest.

        In other batches, of which some positions are used again too, q_old is the present q.
        """
        if not (self.online.ppo and batch.at_rest):
            self.forget_rest()
            return None
        if not self._before_rest:
            self._before_rest = (copy.deepcopy(self.draft).requires_grad_(False),)
        (draft,) = self._before_rest
        weight_SH = draft.lm_head.weight
        if heads.sample is not None:
            weight_SH = weight_SH[heads.sample.index_S]
        return OldChains(draft=draft, chains=self._chains(draft, batch.traces, needed_BT), weight_SH=weight_SH)

    def _heads(self, batch: OnlineBatch) -> ChainHeads:
        """Rows of both heads for a sample of the vocabulary, or for all of it."""
        draft = self.draft
        sample = self._sample_tokens(batch)
        if sample is None:
            every = torch.arange(len(draft.lm_head.weight), device=draft.lm_head.weight.device)
            return ChainHeads(
                weight_SH=self._head_rows(every), target_SH=self.head_VdH, logit_transform=self.logit_transform
            )
        ids_S, certain = sample.index_S, sample.num_certain
        # Rows of drawn tokens get no gradient: one that comes seldom is mostly noise to AdamW.
        drawn_SH = draft.lm_head.weight.detach()[ids_S[certain:]]
        return ChainHeads(
            weight_SH=torch.cat([self._head_rows(ids_S[:certain]), drawn_SH]),
            target_SH=self.head_VdH[ids_S],
            logit_transform=self.logit_transform.select(ids_S),
            sample=sample,
        )

    def _head_rows(self, index_X: torch.Tensor) -> torch.Tensor:
        """Rows of the draft's head, whose gradient is sparse."""
        return nn.functional.embedding(index_X, self.draft.lm_head.weight, sparse=True)

    def _sample_tokens(self, batch: OnlineBatch) -> TokenSample | None:
        """The batch's tokens, and what its rounds proposed; None: the whole vocabulary."""
        token_ids = torch.cat([batch.traces.token_ids_BT.flatten(), batch.proposed_P])
        token_ids = token_ids[self.draft.t2d[token_ids]]
        self._num_samples += 1
        return sample_tokens(
            self.draft.draft_index(token_ids),
            vocabulary=len(self.draft.d2t),
            size=self.online.sampled_tokens,
            turn=self._num_samples,
        )

    def unroll(self, batch: TraceBatch, needed_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The draft's hidden states of the K steps by target position [K, B, T, H].

        needed_BT: bool, the target positions that are needed; elsewhere the result may be 0. None: those with a weight.
        """
        return unroll(
            self.draft,
            token_ids_BT=batch.token_ids_BT,
            aux_BT3H=batch.aux_BT3H.to(self.draft.fc.weight.dtype),  # autocast, if it is on, casts them again
            embed=self.embed,
            num_steps=self.num_steps,
            needed_BT=batch.weight_BT > 0 if needed_BT is None else needed_BT,
        )

    def score(self, batch: TraceBatch) -> tuple[LKStats, torch.Tensor]:
        """How well the draft is accepted along traces: statistics of every step at every target position [K, B·T].

        And the mask [K, B, T]: 1 where a step has a target that counts; elsewhere statistics are 0. Raises ValueError
        if the batch has no `lse_BT`.
        """
        if batch.lse_BT is None:
            raise ValueError("batch.lse_BT is None; compute it with the target's head first")
        ones_BT = torch.ones_like(batch.weight_BT)
        reached_KBT = torch.stack([shift_positions(ones_BT, 1 + step) for step in range(self.num_steps)])
        mask_KBT = reached_KBT * (batch.weight_BT > 0)
        # Only rows with a weight go through the heads, which are half of the work.
        row_R = mask_KBT.any(0).flatten().nonzero()[:, 0]
        if not row_R.numel():  # a batch of prompts only: one row, of weight 0
            row_R = row_R.new_zeros(1)
        _, stats = fused_lk_loss(
            h_NH=self.draft.norm(self.unroll(batch).flatten(1, 2)[:, row_R]),
            weight_DH=self.draft.lm_head.weight,
            row_weight_N=mask_KBT.flatten(1)[:, row_R],
            target=TargetRows(
                h_NG=batch.last_BTH.flatten(0, 1)[row_R],
                weight_DG=self.head_VdH,
                logit_transform=self.logit_transform,
                lse_N=batch.lse_BT.flatten()[row_R],
            ),
        )

        def of_all_rows(values_KR: torch.Tensor) -> torch.Tensor:
            return values_KR.new_zeros(self.num_steps, ones_BT.numel()).index_copy(1, row_R, values_KR)

        all_rows: dict[str, Any] = {
            name: of_all_rows(getattr(stats, name)) for name in ("alpha_N", "kl_N", "top1_match_N")
        }
        return LKStats(**all_rows), mask_KBT

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon by blocks for the layer's matrices, AdamW for norms and the value head; without schedules.

        Muon learns more than AdamW from the same number of positions, of which training has few. The draft's head has
        gradients in the rows of sampled tokens alone, and SparseAdam touches no others.
        """
        head = self.draft.lm_head.weight
        heads = {id(head), id(self.draft.value_head.weight)}
        matrices = [p for p in self.draft.parameters() if p.ndim > 1 and id(p) not in heads]
        others = [p for p in self.draft.parameters() if p is not head and (p.ndim <= 1 or id(p) in heads)]
        rate = self.learning_rate
        return [
            BlockMuon(matrices, lr=rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
            torch.optim.SparseAdam([head], lr=rate, betas=(0.9, 0.95)),
        ]


def clip_gradients(parameters: Iterable[nn.Parameter], *, max_norm: float = 1.0) -> torch.Tensor:
    """Clip the gradients of all parameters together, in place, to a norm; returns their norm before.

    Sparse gradients may have rows more than once; they have each row once afterwards.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
