"""How well a draft distribution q is accepted by a target distribution p: closed forms, and the LK loss made of them.

The verifier is serving's: the target chooses its own token, argmax_i of log p_i + g_i with Gumbel noise g, and accepts
a proposal that equals it. The draft proposes argmax_i of log q_i + g_i with the same noise g ("shared noise"; Daliri,
Musco, Suresh 2025, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978). Both
choose i if E_j ≥ E_i · max(p_j/p_i, q_j/q_i) for all j, where E = exp(−g) are independent exponential variables, so the
probability of acceptance is

    Σ_i 1 / Σ_j max(p_j/p_i, q_j/q_i).

It lies between α/(2 − α) and α for α = Σ min(p, q) = 1 − TV(p, q), with TV the total variation distance: draws from p
and q, however coupled, are equal with a probability of at most α, and the lower bound is the paper's (1 − TV)/(1 + TV).
The LK loss trains α, the smooth upper bound, with which the lower bound grows; both are 1 only for q = p.

These are the readable definitions. Leaves out the loss as training computes it (modules/losses/fused_lk.py),
verification (serve/engine/round_plan.py), and the weights of unrolled draft steps (the caller's).

Shapes: N rows (positions), K unrolled draft steps, D reduced draft vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

KL_DECAY = 3.0
"""λ = exp(−KL_DECAY · α): the KL term dominates while the draft is poor, the acceptance term once it is good."""


@dataclass(frozen=True, kw_only=True)
class LKStats:
    """Statistics of each row, without gradient. Shape [N], or [K, N] if the hidden states had draft steps."""

    alpha_N: Tensor
    """α = Σ min(p, q), see `overlap`."""
    kl_N: Tensor
    """KL over the draft vocabulary, see `lk_loss`."""
    top1_match_N: Tensor
    """bool. True if draft and target have the same argmax; False where the target's is outside the draft vocabulary."""
    kl_decay: float = KL_DECAY
    stopped_R2: Tensor = field(default_factory=lambda: torch.zeros(0, 2))
    """Of all rows together: `stopped_mass` (modules/losses/ppo.py); of no ranges where it was not counted."""

    @property
    def loss_N(self) -> Tensor:
        """`lk_loss` of each row, with this decay."""
        kl_share = torch.exp(-self.kl_decay * self.alpha_N)
        return kl_share * self.kl_N + (1 - kl_share) * (1 - self.alpha_N)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """α = Σ min(p, q) over the last dim: an upper bound of the acceptance rate with shared noise, and its surrogate.

    p may leave out the tokens outside the draft vocabulary, since q is 0 there.
    """
    return torch.minimum(p, q).sum(-1)


def acceptance_given_token(p_D: Tensor, q_D: Tensor, token: Tensor) -> Tensor:
    """The probability that shared noise proposes token i if the target has drawn it: 1 / Σ_j max(p_j, p_i q_j/q_i).

    The sum is over the target's whole vocabulary: outside the draft's, where q is 0, it is 1 − Σ p_D. Weighted by p_i
    and summed over i, this is the acceptance rate that the top of this file gives.

    Args:
        p_D: the target's probabilities of the draft vocabulary [..., D]; may sum to less than 1.
        q_D: the draft's [..., D].
        token: int64, i as an index of D [...]. q_i may be 0: then the result is 0.
    """
    p_1, q_1 = (x.gather(-1, token[..., None]) for x in (p_D, q_D))
    outside = (1 - p_D.sum(-1)).clamp_min(0)
    inverse = torch.maximum(p_D, p_1 * q_D / q_1).sum(-1) + outside
    return torch.where(q_1[..., 0] > 0, 1 / inverse, 0.0)


def lk_loss(p_D: Tensor, q_D: Tensor) -> Tensor:
    """λ·KL(p‖q) + (1 − λ)(1 − α) for each row, with λ = exp(−3·stopgrad α); no reduction and no mask.

    p_D holds the target's probabilities of the draft vocabulary and may sum to s < 1; the draft cannot propose the
    tokens outside. KL here is Σ_D p·log(p/q), the part over the draft vocabulary: the true KL is infinite if s < 1. It
    differs from the KL of the renormalised p only by the factor s and the constant s·log s, so it may be negative. Its
    gradient by the draft's logits is s·q − p, so rows whose mass is mostly outside have small gradients.
    """
    alpha = overlap(p_D, q_D)
    kl = (torch.xlogy(p_D, p_D) - p_D * q_D.clamp_min(torch.finfo(q_D.dtype).tiny).log()).sum(-1)
    kl_share = torch.exp(-KL_DECAY * alpha.detach())
    return kl_share * kl + (1 - kl_share) * (1 - alpha)
