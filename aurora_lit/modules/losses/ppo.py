"""Proximal policy optimisation of a draft whose reward is acceptance: advantages, policy loss, value loss.

A round is an episode. In state s_t (the context and the proposals before t) the draft draws a_t ~ q(·|s_t). The target
accepts it with probability c_t, and the first rejection ends the round. The objective is the expected number of
accepted proposals, J = E_{a~q} Σ_t Π_{i≤t} c_i. Acceptance thus has the role of the discount:
J(s_t) = E_a[c_t (1 + J(s_{t+1}))], and J is 0 after a round's last proposal. Proposal t is tested with probability
S_t = Π_{i<t} c_i. All proposals of a round are drawn before any is tested, so c_t is known for every t and replaces the
accept bit: the same expectation with less variance.

Two kinds of verification give two gradients (policy gradient theorem, Sutton et al. 1999, for this objective):

- c does not depend on q: a proposal is accepted if it equals the target's own token. c(a) = 1[a = argmax p] at
  temperature 0, and c(a) = p(a) where that token is drawn (seeded requests). Then
  ∇J = E Σ_t S_t ∇log q(a_t)·[c_t (1 + J(s_{t+1})) − b(s_t)] for any baseline b.
- c = min(1, p/q), the ratio test (Leviathan et al., arXiv 2211.17192). J(s) = Σ_a min(q, p)(1 + J(s')), and min(q, p)
  grows with q only where q ≤ p, so
  ∇J = E Σ_t S_t ∇log q(a_t)·[1[q ≤ p](1 + J(s_{t+1})) − b(s_t)]. The accept bit itself would be a biased reward.

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


def ratio_test_advantage(
    gae_K: Tensor,
    value_K1: Tensor,
    gae_lambda: float,
    *,
    is_underweighted_K: Tensor,
    underweighted_share_K: Tensor,
) -> Tensor:
    """The policy's advantages under the ratio test min(1, p/q): 1[q(a_t) ≤ p(a_t)]·(1 + V_{t+1} + λ Â_{t+1}) − b_t.

    A proposal is rewarded only where the draft gives it too little probability, since only there more q means more
    acceptance. Later proposals count through `acceptance_gae`, whose c is min(1, p/q). The baseline is the reward's
    expectation Σ_a q·1[q ≤ p]·(1 + V̄), with the mean next value V̄ from V_t = α (1 + V̄): b_t = V_t · the underweighted
    share. V̄ must not be the value of the state that a_t itself led to: that would bias the gradient.

    Args:
        gae_K: advantages Â of `acceptance_gae`.
        value_K1: V.
        gae_lambda: λ.
        is_underweighted_K: bool, 1[q(a_t) ≤ p(a_t)].
        underweighted_share_K: `underweighted_share` of each state.
    """
    next_gae_K = torch.cat([gae_K[..., 1:], torch.zeros_like(gae_K[..., :1])], -1)
    follows_K = 1 + value_K1[..., 1:] + gae_lambda * next_gae_K
    return is_underweighted_K * follows_K - value_K1[..., :-1] * underweighted_share_K


def underweighted_share(p_D: Tensor, q_D: Tensor) -> Tensor:
    """Σ q·1[q ≤ p] / Σ min(p, q) over the last dim, in [0, 1]: the share of the acceptance that more q would raise."""
    least_D = torch.minimum(p_D, q_D)
    return (q_D * (q_D <= p_D)).sum(-1) / least_D.sum(-1).clamp_min(torch.finfo(q_D.dtype).tiny)


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
