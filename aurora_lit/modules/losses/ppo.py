"""PPO of a draft whose reward is acceptance, without sampling: the sum over all actions in the place of LK's 1 − α.

A chain of draft steps is an episode. In step t the draft draws a ~ q; α_t is the probability that it is accepted, and
the first rejection ends the episode, so that acceptance is the discount. The objective is the expected number of
accepted proposals, J = Σ_t Π_{i≤t} α_i. With S_t = Π_{i<t} α_i and V_{t+1}, the value of the state after an accepted
proposal, the policy gradient theorem (Sutton et al. 1999) says ∇J = Σ_t S_t (1 + V_{t+1}) ∇α_t, and α_t is known in
closed form, as is q. So nothing needs to be drawn. An action's credit is c = ∂α/∂q, and

    A(a) = (1 + V_{t+1}) · (c(a) − Σ_b q_old(b) c(b))
    L = −S_t Σ_a q_old(a) · min(ρ(a) A(a), clip(ρ(a), 1 ± ε) A(a)),   ρ = q / q_old.

q_old is the draft's own q when a position was first used. Where positions are used once ρ is 1, and the gradient is
that of S_t (1 + V_{t+1}) (1 − α_t). Where they are used again, tokens that have moved away from q_old as far as they
may get no gradient that would move them further.

PPO: Schulman et al., arXiv 1707.06347; all actions: Asadi et al., arXiv 1709.00503. Advantages are not normalised. V is
the draft's value head along the recorded tokens (modules/losses/chain_losses.py).

Leaves out the loss as training computes it (modules/losses/fused_lk.py).

Shapes: [..., D] draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 0.2
"""ε: how far a token's ρ may be from 1."""
Q_RANGES = ((0.0, 0.01), (0.01, 0.1), (0.1, 2.0))
"""Ranges of q_old, low end included, by which it is reported how much the clip stops."""


def overlap_credit(p_D: Tensor, q_old_D: Tensor) -> Tensor:
    """c = 1[q_old < p] of α = Σ min(p, q), in fp32 or the dtype of p. p held fixed over q would miss a term."""
    return (q_old_D < p_D).to(p_D.dtype)


def advantage(credit_D: Tensor, q_old_D: Tensor, gain: Tensor) -> Tensor:
    """A of every token; gain [...]: 1 + V_{t+1}."""
    return gain[..., None] * (credit_D - (q_old_D * credit_D).sum(-1, keepdim=True))


def is_stopped(q_D: Tensor, q_old_D: Tensor, advantage_D: Tensor) -> Tensor:
    """bool. True where the gradient would move a token further away from q_old than the clip allows."""
    change_D = q_D - q_old_D
    return (change_D.abs() > CLIP * q_old_D) & (advantage_D * change_D > 0)


def stopped_mass(p_ND: Tensor, q_old_ND: Tensor, stopped_ND: Tensor) -> Tensor:
    """By range of q_old, p of the stopped tokens and of all, summed over N rows [len(Q_RANGES), 2].

    A clip of ρ stops a token of q_old = 0.001 that the target wants at 0.0012.
    """
    in_range = [p_ND * ((q_old_ND >= low) & (q_old_ND < high)) for low, high in Q_RANGES]
    return torch.stack([torch.stack([(each * stopped_ND).sum(), each.sum()]) for each in in_range])


def ppo_loss(q_D: Tensor, q_old_D: Tensor, advantage_D: Tensor) -> Tensor:
    """A loss with the gradient of L / S_t for each row; of stopped tokens it has −q A as a constant."""
    stopped_D = is_stopped(q_D, q_old_D, advantage_D)
    return -(torch.where(stopped_D, q_D.detach(), q_D) * advantage_D).sum(-1)
