"""Proximal policy optimisation of a draft whose reward is acceptance: advantages, policy loss, value loss.

A round is an episode. In state s_t (the context and the proposals before t) the draft draws a_t ~ q(·|s_t). The target
accepts it with probability c_t, and the first rejection ends the round. The objective is the expected number of
accepted proposals, J = E_{a~q} Σ_t Π_{i≤t} c_i. Acceptance thus has the role of the discount:
J(s_t) = E_a[c_t (1 + J(s_{t+1}))], and J is 0 after a round's last proposal. Proposal t is tested with probability
S_t = Π_{i<t} c_i. All proposals of a round are drawn before any is tested, so c_t is known for every t and replaces the
accept bit: the same expectation with less variance.

c does not depend on q: a proposal is accepted if it equals the target's own token. c(a) = 1[a = argmax p] for greedy
requests. For sampled ones c(a) = p(a): these proposals are drawn to explore, with noise of their own, so the target's
draw is independent of them. By the policy gradient theorem (Sutton et al. 1999),
∇J = E Σ_t S_t ∇log q(a_t)·[c_t (1 + J(s_{t+1})) − b(s_t)] for any baseline b.

This J is the acceptance of rounds that explore. In other rounds of sampled requests draft and target share their noise,
and the LK loss trains that acceptance (modules/losses/lk.py). There the two disagree: J is largest for a draft that
always proposes the target's likeliest token, acceptance with shared noise for q = p.

PPO: Schulman et al., arXiv 1707.06347. Generalised advantage estimation: Schulman et al., arXiv 1506.02438. Advantages
are not normalised.

Leaves out the networks, and which rounds can be used (modules/losses/policy.py).

Shapes: [..., K] proposals of a round; K1 = K + 1 states; D draft vocabulary; N any. Where a round has n < K proposals,
the caller sets c and V to 0 from proposal n on, which makes its advantages 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOG_RATIO = 10.0
"""Log-ratios are clamped to ±this, so that their exponential stays finite."""


def survival(accept_prob_K: Tensor) -> Tensor:
    """S_t = Π_{i<t} c_i: the probability that proposal t is tested."""
    return torch.cat([torch.ones_like(accept_prob_K[..., :1]), accept_prob_K[..., :-1].cumprod(-1)], dim=-1)


def acceptance_gae(accept_prob_K: Tensor, value_K1: Tensor, gae_lambda: float) -> Tensor:
    """Advantages Â_t = δ_t + λ c_t Â_{t+1}, with δ_t = c_t (1 + V_{t+1}) − V_t and Â_K = 0.

    This is arXiv 1506.02438 (eq. 16) with the acceptance probability as discount and 1 + V as the value of acceptance.
    Â_t + V_t is the λ-return G_t = c_t (1 + (1 − λ) V_{t+1} + λ G_{t+1}), the value head's target. With λ = 1 it is
    unbiased for any V, since Â_t = c_t + c_t c_{t+1} + … − V_t (V_K must be 0); with λ < 1 it is unbiased if V is
    exact.
    """
    advantage_K = torch.empty_like(accept_prob_K)
    next_advantage = torch.zeros_like(accept_prob_K[..., 0])
    for t in range(accept_prob_K.shape[-1] - 1, -1, -1):
        accept = accept_prob_K[..., t]
        delta = accept * (1 + value_K1[..., t + 1]) - value_K1[..., t]
        next_advantage = delta + gae_lambda * accept * next_advantage
        advantage_K[..., t] = next_advantage
    return advantage_K


def policy_ratio(logprob: Tensor, behaviour_logprob: Tensor) -> Tensor:
    """ρ = q(a)/q_behaviour(a), from the log-probability logged when the proposal was drawn."""
    return (logprob - behaviour_logprob).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    ratio_K: Tensor, advantage_K: Tensor, survival_K: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """−S_t · min(ρÂ, clip(ρ, 1 ± ε)Â) of each proposal, not reduced; and whether the clip stops its gradient (bool).

    arXiv 1707.06347, eq. 7. Summed over a round's proposals and averaged over rounds, it has the gradient −∇J at ρ = 1.
    S_t and Â are of the round as it was served and get no gradient.
    """
    advantage_K, survival_K = advantage_K.detach(), survival_K.detach()
    unclipped_K = ratio_K * advantage_K
    clipped_K = ratio_K.clamp(1 - clip, 1 + clip) * advantage_K
    return -survival_K * torch.minimum(unclipped_K, clipped_K), clipped_K < unclipped_K


def value_loss(value_K: Tensor, return_K: Tensor, survival_K: Tensor) -> Tensor:
    """Σ S_t (V_t − G_t)² / Σ S_t over all proposals: each counts by its probability of being tested."""
    survival_K = survival_K.detach()
    squares = survival_K * (value_K - return_K.detach()).square()
    return squares.sum() / survival_K.sum().clamp_min(torch.finfo(value_K.dtype).tiny)


def explained_variance(value_N: Tensor, return_N: Tensor, weight_N: Tensor) -> Tensor:
    """1 − Var(G − V) / Var(G), weighted: 1 for an exact value head, 0 for one that predicts the mean."""
    weight_N = weight_N / weight_N.sum().clamp_min(torch.finfo(weight_N.dtype).tiny)

    def variance(x_N: Tensor) -> Tensor:
        return (weight_N * (x_N - (weight_N * x_N).sum()).square()).sum()

    return 1 - variance(return_N - value_N) / variance(return_N).clamp_min(torch.finfo(value_N.dtype).eps)


def entropy(log_q_D: Tensor) -> Tensor:
    """H(q) = −Σ q·log q over the last dim, in nats."""
    return -(log_q_D.exp() * log_q_D).sum(-1)
