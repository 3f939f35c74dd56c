"""How well a draft distribution q is accepted by a target distribution p: closed forms, and the LK loss made of them.

These are the readable definitions. Leaves out the loss as training computes it (modules/losses/fused_lk.py),
how proposals are judged (serve/sequences/round_plan.py), and the weights of unrolled draft steps (the caller's).

Shapes: N rows (positions), K unrolled draft steps, D reduced draft vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KL_DECAY = 3.0
"""λ = exp(−KL_DECAY · α): the KL term dominates while the draft is poor, the acceptance term once it is good."""


@dataclass(frozen=True, kw_only=True)
class LKStats:
    """Statistics of each row, without gradient. Shape [N], or [K, N] if the hidden states had draft steps."""

    alpha_N: Tensor
    """Acceptance rate Σ min(p, q)."""
    kl_N: Tensor
    """KL over the draft vocabulary, see `lk_loss`."""
    top1_match_N: Tensor
    """bool. True if draft and target have the same argmax; False where the target's is outside the draft vocabulary."""
    kl_decay: float = KL_DECAY

    @property
    def loss_N(self) -> Tensor:
        """`lk_loss` of each row, with this decay."""
        kl_share = torch.exp(-self.kl_decay * self.alpha_N)
        return kl_share * self.kl_N + (1 - kl_share) * (1 - self.alpha_N)


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """α = Σ min(p, q) over the last dim: the probability that a proposal drawn from q passes the test min(1, p/q).

    p may leave out the tokens outside the draft vocabulary, since q is 0 there.
    """
    return torch.minimum(p, q).sum(-1)


def expected_accepted_length(alpha_K: Tensor) -> Tensor:
    """1 + Σ_t Π_{i≤t} α_i over the last dim: the expected tokens of a round, the corrected or bonus token included."""
    return 1 + alpha_K.cumprod(-1).sum(-1)


def lk_loss(p_D: Tensor, q_D: Tensor) -> Tensor:
    """λ·KL(p‖q) + (1 − λ)(1 − α) for each row, with λ = exp(−3·stopgrad α); no reduction and no mask.

    p_D holds the target's probabilities of the draft vocabulary and may sum to s < 1; the draft cannot propose the
    tokens outside. KL here is Σ_D p·log(p/q), the part over the draft vocabulary: the true KL is infinite if s < 1. It
    differs from the KL of the renormalised p only by the factor s and the constant s·log s, so it may be negative. Its
    gradient by the draft's logits is s·q − p, so rows whose mass is mostly outside have small gradients.
    """
    alpha = acceptance_rate(p_D, q_D)
    kl = (torch.xlogy(p_D, p_D) - p_D * q_D.clamp_min(torch.finfo(q_D.dtype).tiny).log()).sum(-1)
    kl_share = torch.exp(-KL_DECAY * alpha.detach())
    return kl_share * kl + (1 - kl_share) * (1 - alpha)
