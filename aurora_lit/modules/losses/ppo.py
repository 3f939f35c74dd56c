"""Proximal policy optimisation of a draft whose reward is being accepted: advantages, policy loss, value loss.

A round is an episode. In state s_t (the context and the proposals before t) the draft draws a_t ~ q(·|s_t); the target
accepts it with probability c_t, and the first refusal ends the round. With S_t = Π_{i<t} c_i the objective is the
expected number of accepted proposals, J = E_{a~q} Σ_t Π_{i≤t} c_i, so acceptance plays the discount's part:
J(s_t) = E_a[c_t (1 + J(s_{t+1}))], and J is 0 behind a round's last proposal. All proposals of a round are drawn before
any is tested, so c_t is known for every t and stands for the accept bit itself: less noise, the same expectation.

Two kinds of verification give two gradients (both: policy gradient theorem, Sutton et al. 1999, for this objective):

- c does not depend on q. Proposals are accepted when they equal the target's own token: c(a) = 1[a = argmax p] at
  temperature 0, c(a) = p(a) where that token is drawn (seeded requests). Then
  ∇J = E Σ_t S_t ∇log q(a_t)·[c_t (1 + J(s_{t+1})) − b(s_t)] for any baseline b.
- c = min(1, p/q), the ratio test (Leviathan et al., arXiv 2211.17192). J(s) = Σ_a min(q, p)(1 + J(s')), and min(q, p)
  grows with q only where q ≤ p, so
  ∇J = E Σ_t S_t ∇log q(a_t)·[1[q ≤ p](1 + J(s_{t+1})) − b(s_t)]: the accept bit itself would be a biased reward.

PPO: Schulman et al., arXiv 1707.06347. Generalised advantage estimation: Schulman et al., arXiv 1506.02438.

What is left out: networks, and which rounds may be learnt from (modules/losses/policy.py). Nothing here normalises advantages.

Shapes: [..., K] proposals of a round; D draft vocabulary. Where a round has n < K proposals, the caller sets c and V to
0 from place n on; then its advantages are 0 there too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_LOG_RATIO = 10.0  # beyond it a ratio is held, so that its exponential stays a number


def survival(accept_prob_K: Tensor) -> Tensor:
    """S_t = Π_{i<t} c_i: the chance that proposal t is tested at all."""
    return torch.cat([torch.ones_like(accept_prob_K[..., :1]), accept_prob_K[..., :-1].cumprod(-1)], dim=-1)


def acceptance_gae(accept_prob_K: Tensor, value_K1: Tensor, gae_lambda: float) -> Tensor:
    """Advantages Â_t = δ_t + λ c_t Â_{t+1}, with δ_t = c_t (1 + V_{t+1}) − V_t and Â_K = 0.

    This is arXiv 1506.02438 (eq. 16) with the acceptance probability as discount and 1 + V as what follows acceptance.
    Â_t + V_t is the λ-return G_t = c_t (1 + (1 − λ) V_{t+1} + λ G_{t+1}), the value head's target. λ = 1: unbiased
    whatever V, since Â_t = c_t + c_t c_{t+1} + … − V_t (V_K must be 0); λ < 1: unbiased where V is exact.
    """
    advantage_K = torch.empty_like(accept_prob_K)
    ahead = torch.zeros_like(accept_prob_K[..., 0])
    for t in range(accept_prob_K.shape[-1] - 1, -1, -1):
        accept = accept_prob_K[..., t]
        delta = accept * (1 + value_K1[..., t + 1]) - value_K1[..., t]
        ahead = delta + gae_lambda * accept * ahead
        advantage_K[..., t] = ahead
    return advantage_K


def ratio_test_advantage(
    gae_K: Tensor, value_K1: Tensor, gae_lambda: float, *, can_rise_K: Tensor, rise_share_K: Tensor
) -> Tensor:
    """The actor's advantages under min(1, p/q): 1[q(a) ≤ p(a)]·(1 + V_{t+1} + λ Â_{t+1}) − b_t.

    The own step is rewarded only where more q means more acceptance; what follows comes from `acceptance_gae`, whose c
    is min(1, p/q). can_rise_K: 1[q(a_t) ≤ p(a_t)] (bool). The baseline is that reward's expectation,
    Σ_a q·1[q ≤ p]·(1 + V̄), with the mean value ahead V̄ taken from V_t = α (1 + V̄): b_t = V_t·rise_share_K, see
    `rise_share`. V̄ must not be the value of the state that a_t itself led to: that would bias the gradient.
    """
    follows_K = 1 + value_K1[..., 1:] + gae_lambda * torch.cat([gae_K[..., 1:], torch.zeros_like(gae_K[..., :1])], -1)
    return can_rise_K * follows_K - value_K1[..., :-1] * rise_share_K


def rise_share(p_D: Tensor, q_D: Tensor) -> Tensor:
    """Σ q·1[q ≤ p] / Σ min(p, q) over the last dim, in [0, 1]: how much of the acceptance more q would raise."""
    least_D = torch.minimum(p_D, q_D)
    return (q_D * (q_D <= p_D)).sum(-1) / least_D.sum(-1).clamp_min(torch.finfo(q_D.dtype).tiny)


def policy_ratio(logprob: Tensor, behaviour_logprob: Tensor) -> Tensor:
    """ρ = q(a)/q_behaviour(a), from the log-probability logged when the proposal was drawn."""
    return (logprob - behaviour_logprob).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def clipped_policy_loss(
    ratio_K: Tensor, advantage_K: Tensor, survival_K: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """−S_t·min(ρÂ, clip(ρ, 1 ± ε)Â) a proposal, not reduced, and whether the clip has stopped its gradient (bool).

    arXiv 1707.06347, eq. 7. The sum over a round's proposals, averaged over rounds, has the gradient −∇J at ρ = 1. S_t
    and Â are numbers of the round as it was served and get no gradient.
    """
    advantage_K, survival_K = advantage_K.detach(), survival_K.detach()
    free_K = ratio_K * advantage_K
    held_K = ratio_K.clamp(1 - clip, 1 + clip) * advantage_K
    return -survival_K * torch.minimum(free_K, held_K), held_K < free_K


def value_loss(value_K: Tensor, return_K: Tensor, survival_K: Tensor) -> Tensor:
    """Σ S_t (V_t − G_t)² / Σ S_t over everything: proposals that are hardly ever tested hardly count."""
    survival_K = survival_K.detach()
    squares = survival_K * (value_K - return_K.detach()).square()
    return squares.sum() / survival_K.sum().clamp_min(torch.finfo(value_K.dtype).tiny)


def explained_variance(value_N: Tensor, return_N: Tensor, weight_N: Tensor) -> Tensor:
    """1 − Var(G − V)/Var(G), weighted: 1 for a perfect value head, 0 for one that knows the mean only."""
    weight_N = weight_N / weight_N.sum().clamp_min(torch.finfo(weight_N.dtype).tiny)

    def variance(x_N: Tensor) -> Tensor:
        return (weight_N * (x_N - (weight_N * x_N).sum()).square()).sum()

    return 1 - variance(return_N - value_N) / variance(return_N).clamp_min(torch.finfo(value_N.dtype).eps)


def entropy(log_q_D: Tensor) -> Tensor:
    """H(q) = −Σ q·log q over the last dim, in nats."""
    return -(log_q_D.exp() * log_q_D).sum(-1)
