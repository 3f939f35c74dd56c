"""The LK and value losses of chains, step by step, ending chains that are hardly reached.

A position's loss is Σ_j S_j · LK_j over the steps j of its chain, where S_j = Π_{i<j} α_i is the probability that the
chain is still accepted there, without gradient. Steps that are hardly reached cost as much as others and teach little,
so chains end by chance: in expectation the sum is the same (Russian roulette; see `OnlineWeights.certain_survival`).

For PPO LK_j has (1 + V_{j+1}) (1 − α_j) in the place of 1 − α_j, with the value head's V, which is 0 after step K − 1.
The estimate of V_{j+1} is 0 for a chain that ends by chance, and V_{j+1} / P(goes on) for others.

Leaves out running a chain's steps (modules/losses/unroll.py), the loss of a row (modules/losses/fused_lk.py), and which
positions count how much (modules/losses/draft_module.py).

Shapes: B traces, T positions, K steps, N = B·T rows, M chains of a step with padding, C those that count, S tokens of
the heads, H hidden size (of last_BTH and the target's rows: the target's).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.draft.logit_transform import LogitTransform
from aurora_lit.modules.losses.fused_lk import OldRows, TargetRows, fused_lk_loss
from aurora_lit.modules.losses.lk import KL_DECAY, LKStats
from aurora_lit.modules.losses.objective import OnlineWeights
from aurora_lit.modules.losses.ppo import Q_RANGES
from aurora_lit.modules.losses.token_sample import TokenSample
from aurora_lit.modules.losses.unroll import StepwiseChains, shift_positions
from aurora_lit.modules.sampling.noise import noise_bits

_HASHED = tuple(31**i for i in range(8))
"""Factors of the first entries of a hidden state, by which states are told apart."""


@dataclass(frozen=True, kw_only=True)
class ChainHeads:
    """The rows of the draft's and the target's head that a batch's losses take."""

    weight_SH: torch.Tensor
    """The draft's."""
    target_SH: torch.Tensor
    """The target's, for the same tokens."""
    logit_transform: LogitTransform
    """The target's, for the same tokens."""
    sample: TokenSample | None = None
    """What the tokens are a sample of; None: they are the draft's whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class OldChains:
    """The same chains of the draft as it was when their positions were first used."""

    draft: Eagle3Draft
    chains: StepwiseChains
    weight_SH: torch.Tensor
    """The rows of its head for the tokens of `ChainHeads`."""

    def rows(self) -> OldRows:
        """Of the present step."""
        return OldRows(h_NH=self.draft.norm(self.chains.hidden_MH), weight_DH=self.weight_SH)


@dataclass(frozen=True, kw_only=True)
class ChainLosses:
    """Losses of the chains of a batch."""

    lk_sum: torch.Tensor
    """Weighted sum, with gradient."""
    value_sum: torch.Tensor
    """The same of the value head's squared errors."""
    stats: LKStats
    """[K, N]; 0 where a chain has no step."""
    mask_KBT: torch.Tensor
    """1 where a chain has a step with that target."""
    importance_KBT: torch.Tensor
    """How much the step counts: in expectation, the probability that its proposals were accepted so far. 0 where there
    is no step."""


def chain_losses(
    draft: Eagle3Draft,
    chains: StepwiseChains,
    share_BT: torch.Tensor,
    last_BTH: torch.Tensor,
    heads: ChainHeads,
    *,
    weights: OnlineWeights,
    num_steps: int,
    old: OldChains | None = None,
    between_steps: Callable[[], None] = lambda: None,
) -> ChainLosses:
    """The LK and value losses of chains, which are at step 0.

    The target's distribution is that within the tokens of the heads: its whole head would cost a fifth of a step.

    Args:
        draft: the draft.
        chains: its chains; they are advanced.
        share_BT: weight of each position in the sums; 0: it does not count.
        last_BTH: the target's last hidden states.
        heads: the heads' rows.
        weights: which loss, and which chains go on.
        num_steps: K.
        old: of PPO on positions that are used again. Advanced like `chains`.
        between_steps: called between two steps, forward and backward.
    """
    kl_decay = 0.0 if weights.base_loss == "kl" else KL_DECAY
    T = share_BT.shape[1]
    share_N, last_NH = share_BT.flatten(), last_BTH.flatten(0, 1)
    next_share_N = shift_positions(share_BT, -1).flatten()
    found = _StepResults(num_steps, share_BT)
    lk_sum = share_N.new_zeros(())
    importance_M = torch.ones(len(chains.row_M), device=share_N.device)
    value_M = draft.compute_value(chains.hidden_MH.detach())
    for step in range(num_steps):
        place_M = chains.row_M * T + chains.target_M
        share_M = share_N[place_M]
        share_M[chains.count :] = 0.0
        if chains.hidden_MH.requires_grad:
            chains.hidden_MH.register_hook(lambda _: between_steps())  # type: ignore[no-untyped-call]
        loss_of = functools.partial(
            fused_lk_loss,
            h_NH=draft.norm(chains.hidden_MH),
            weight_DH=heads.weight_SH,
            row_weight_N=share_M * importance_M,
            target=TargetRows(
                h_NG=last_NH[place_M],
                weight_DG=heads.target_SH,
                logit_transform=heads.logit_transform,
                sample=heads.sample,
            ),
            kl_decay=kl_decay,
        )
        # PPO's loss needs V of the next step, and whether a chain goes on depends on α: it is computed twice.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not weights.ppo):
            step_sum, stats = loss_of()
        old_rows = None if old is None else old.rows()
        counted_C = (share_M > 0).nonzero()[:, 0]
        place_C, importance_C, alpha_C = place_M[counted_C], importance_M[counted_C], stats.alpha_N[counted_C]
        found.add(
            step, counted_C, place_C, stats, importance_C, (share_M * importance_M)[counted_C], value_M[counted_C]
        )
        if step < num_steps - 1:
            between_steps()
        survival_C = importance_C * alpha_C
        chance_C = torch.ones_like(survival_C)
        if weights.certain_survival > 0:
            chance_C = (survival_C / weights.certain_survival).clamp_max(1.0)
        goes_on_C = (next_share_N[place_C] > 0) & (_uniform(last_NH[place_C], step=step) < chance_C)
        goes_on_C &= step < num_steps - 1
        carry_C = (1 / chance_C).where(goes_on_C, 0.0).float()
        found.table_KN["carry"][step, place_C] = carry_C
        gain_M = torch.ones_like(share_M)
        if goes_on_C.any():
            kept_N = counted_C[goes_on_C]
            chains.advance(kept_N)
            if old is not None:
                old.chains.advance(kept_N)
            importance_M = torch.ones(len(chains.row_M), device=share_N.device)
            importance_M[: chains.count] = survival_C[goes_on_C].clamp_min(weights.certain_survival)
            value_M = draft.compute_value(chains.hidden_MH.detach())
            left = num_steps - 1 - step
            gain_M[kept_N] += carry_C[goes_on_C] * value_M[: chains.count].detach().float().clamp(0, left)
        if weights.ppo:
            step_sum, of_loss = loss_of(gain_N=gain_M, old=old_rows)
            found.stopped_R2 += of_loss.stopped_R2
        lk_sum = lk_sum + step_sum
        if not goes_on_C.any():
            break
    return found.losses(lk_sum, kl_decay=kl_decay)


class _StepResults:
    """What the steps of a batch's chains came to, by target position; 0 where a chain has no step."""

    def __init__(self, num_steps: int, share_BT: torch.Tensor) -> None:
        self._shape = (num_steps, *share_BT.shape)
        self.table_KN = {
            name: torch.zeros(num_steps, share_BT.numel(), device=share_BT.device)
            for name in ("alpha", "kl", "match", "mask", "importance", "carry")
        }
        """`carry`: 1 / the probability with which the chain went on; 0 where it ended."""
        self.stopped_R2 = torch.zeros(len(Q_RANGES), 2, device=share_BT.device)
        self._by_step: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Places, weights and predicted values of the chains that count."""

    def add(
        self,
        step: int,
        counted_C: torch.Tensor,
        place_C: torch.Tensor,
        stats: LKStats,
        importance_C: torch.Tensor,
        weight_C: torch.Tensor,
        value_C: torch.Tensor,
    ) -> None:
        """Add the chains of a step that count: their indices, target positions, and what was found of them."""
        found = {"alpha": stats.alpha_N, "kl": stats.kl_N, "match": stats.top1_match_N}
        for name, found_M in found.items():
            self.table_KN[name][step, place_C] = found_M[counted_C].to(self.table_KN[name].dtype)
        self.table_KN["mask"][step, place_C], self.table_KN["importance"][step, place_C] = 1.0, importance_C.float()
        self._by_step.append((place_C, weight_C, value_C))

    def losses(self, lk_sum: torch.Tensor, *, kl_decay: float) -> ChainLosses:
        """The losses, when all steps were added."""
        table_KBT = {name: values_KN.view(self._shape) for name, values_KN in self.table_KN.items()}
        return_KN = accepted_proposals(table_KBT["alpha"], table_KBT["carry"]).flatten(1)
        value_sum = lk_sum.new_zeros(())
        for step, (place_C, weight_C, value_C) in enumerate(self._by_step):
            value_sum = value_sum + (weight_C * (value_C - return_KN[step, place_C]).square()).sum()
        stats = LKStats(
            alpha_N=self.table_KN["alpha"],
            kl_N=self.table_KN["kl"],
            top1_match_N=self.table_KN["match"] > 0,
            kl_decay=kl_decay,
            stopped_R2=self.stopped_R2,
        )
        return ChainLosses(
            lk_sum=lk_sum,
            value_sum=value_sum,
            stats=stats,
            mask_KBT=table_KBT["mask"],
            importance_KBT=table_KBT["importance"],
        )


def _uniform(last_CH: torch.Tensor, *, step: int) -> torch.Tensor:
    """Numbers in [0, 1), one for each row: a hash of the target's hidden state, so the same in whatever batch it is."""
    bits_CX = last_CH[:, : len(_HASHED)].float().contiguous().view(torch.int32).long()
    key_C = (bits_CX * torch.tensor(_HASHED, device=bits_CX.device)).sum(1)
    return noise_bits(key_C, torch.full_like(key_C, step), torch.zeros_like(key_C)[:, None])[:, 0] * 2.0**-32


def accepted_proposals(alpha_KBT: torch.Tensor, carry_KBT: torch.Tensor) -> torch.Tensor:
    """G_j = α_j (1 + c_j G_{j+1}), G_K = 0, along each chain: proposals accepted from step j on, for the value head.

    `carry_KBT`: c = 1, and G is what is expected; or, if chains end by chance, 0 for those that do and 1 / P(goes on)
    for others, which estimates the same without bias. If step j of a chain has target position m, step j + 1 has m + 1.
    """
    return_KBT = torch.zeros_like(alpha_KBT)
    next_return_BT = torch.zeros_like(alpha_KBT[0])
    for step in range(len(alpha_KBT) - 1, -1, -1):
        return_KBT[step] = alpha_KBT[step] * (1 + carry_KBT[step] * next_return_BT)
        next_return_BT = shift_positions(return_KBT[step], -1)
    return return_KBT
