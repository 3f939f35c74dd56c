"""The policy terms of an online batch: which rounds can be used, and their losses along the proposals.

Only rounds that explore have a policy: the draft's distribution over its vocabulary at the temperature that their
proposals were drawn at. The behaviour policy is the one whose log-probabilities were recorded then. A ratio therefore
also differs from 1 where serving had more context than the trace holds. Measured with SmolLM2-135M's draft unchanged,
the deviation of log ρ is 0.02 from rounding (bf16-mixed), 0.2 where the context's beginning is missing and 64 tokens or
more are left, and 2 where less than 32 are left.

Leaves out the formulas (modules/losses/ppo.py) and the total loss (modules/losses/draft_module.py).

Shapes: Q rounds, K proposals, M proposals that are tested with a probability above 0, H hidden size, V draft
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.draft.logit_transform import LogitTransform
from aurora_lit.modules.losses.batch import OnlineBatch, Rounds
from aurora_lit.modules.losses.ppo import (
    acceptance_gae,
    clipped_policy_loss,
    entropy,
    explained_variance,
    policy_ratio,
    survival,
    value_loss,
)
from aurora_lit.modules.sampling.distribution import GREEDY_BELOW


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """The losses, with gradient, and statistics of them, without. Everything is 0 if no round could be used."""

    policy_loss: Tensor
    """−Σ S·min(ρÂ, clip(ρ)Â) of a round, averaged over rounds: its gradient is that of −J."""
    value_loss: Tensor
    """Mean squared error of the value head against λ-returns, weighted by S."""
    entropy: Tensor
    """Mean entropy of the policy in nats, over the counted proposals."""
    num_rounds: int
    num_proposals: int
    """Counted proposals: those whose probability S of being tested is above 0."""
    accepted_length: Tensor
    """Mean of Σ_t Π_{i≤t} c_i of a round: the sampled J. The bonus token is not included."""
    mean_ratio: Tensor
    """Mean ρ, weighted by S; about 1 while the draft is the one that proposed."""
    clip_fraction: Tensor
    """Share of proposals whose gradient the clip stops."""
    explained_variance: Tensor
    """Of the sampled returns by the value head: 1 is exact, 0 no better than their mean."""

    @staticmethod
    def none(like: Tensor) -> PolicyTerms:
        """The terms of no rounds; `like`: a tensor of the wanted device and dtype."""
        zero = like.new_zeros(())
        return PolicyTerms(
            policy_loss=zero,
            value_loss=zero,
            entropy=zero,
            num_rounds=0,
            num_proposals=0,
            accepted_length=zero,
            mean_ratio=zero,
            clip_fraction=zero,
            explained_variance=zero,
        )


def usable_rounds(rounds: Rounds, draft: Eagle3Draft) -> Rounds:
    """The rounds with a policy ratio: fresh, drawn to explore, and every proposal is in the draft's vocabulary."""
    has_ratio_QK = rounds.behaviour_logprob_QK.isfinite() & draft.t2d[rounds.proposal_QK.clamp_min(0)]
    usable_Q = rounds.fresh_Q & (rounds.num_proposed_Q > 0) & (has_ratio_QK | ~rounds.is_proposal_QK).all(-1)
    return rounds.select(usable_Q)


def accept_probabilities(
    rounds: Rounds, draft: Eagle3Draft, head_VH: Tensor, logit_transform: LogitTransform
) -> Tensor:
    """Acceptance probability c of every proposal [Q, K] of usable rounds; 0 after a round's last proposal.

    A proposal is accepted if it equals the target's own token: of a greedy request its argmax, so c is 1 or 0; of a
    sampled one a draw from p, so c is p(a). `head_VH` and `logit_transform` are the target's, for the draft vocabulary.
    """
    index_QK = draft_index(rounds.proposal_QK, draft)
    head_QKH = head_VH[index_QK].to(_math_dtype(head_VH))
    products_QK = (rounds.path_last_QKH.to(head_QKH.dtype) * head_QKH).sum(-1)
    logit_QK = logit_transform.at_tokens(products_QK, index_QK)
    is_greedy_Q = rounds.temperature_Q < GREEDY_BELOW
    temperature_Q = torch.where(is_greedy_Q, 1.0, rounds.temperature_Q)  # greedy requests do not use it
    logp_QK = logit_QK / temperature_Q[:, None] - rounds.path_lse_QK
    equal_QK = (rounds.proposal_QK == rounds.path_top_QK).to(logp_QK.dtype)
    accept_QK = torch.where(is_greedy_Q[:, None], equal_QK, logp_QK.exp())
    return accept_QK.where(rounds.is_proposal_QK, 0.0).clamp(max=1)


def policy_terms(
    rounds: Rounds,
    draft: Eagle3Draft,
    hidden_QKH: Tensor,
    *,
    head_VH: Tensor,
    logit_transform: LogitTransform,
    clip: float,
    gae_lambda: float,
) -> PolicyTerms:
    """Losses of usable rounds. The draft's head gets no gradient.

    The heads run in full precision: a policy ratio is sensitive to the rounding of large logits.

    Args:
        rounds: usable ones.
        draft: the draft that learns.
        hidden_QKH: its hidden states along the proposals (modules/losses/unroll.py).
        head_VH: the rows of the target's head for the draft vocabulary.
        logit_transform: the target's, for the draft vocabulary.
        clip: PPO's ε.
        gae_lambda: λ.
    """
    if not len(rounds):
        return PolicyTerms.none(hidden_QKH)
    with torch.autocast(hidden_QKH.device.type, enabled=False):
        accept_QK = accept_probabilities(rounds, draft, head_VH, logit_transform)
        survival_QK = survival(accept_QK)
        counts_QK = (survival_QK > 0) & rounds.is_proposal_QK
        hidden_MH = hidden_QKH[counts_QK].to(draft.lm_head.weight.dtype)
        round_M = counts_QK.nonzero()[:, 0]
        own_head_VH = draft.lm_head.weight.detach()
        logits_MV = nn.functional.linear(draft.norm(hidden_MH), own_head_VH).to(_math_dtype(hidden_MH))
        logq_MV = torch.log_softmax(logits_MV / rounds.draft_temperature_Q[round_M, None], dim=-1)
        index_M = draft_index(rounds.proposal_QK[counts_QK], draft)
        logq_M = logq_MV.gather(1, index_M[:, None])[:, 0]
        value_M = draft.compute_value(hidden_MH.detach())

        value_QK1 = accept_QK.new_zeros(accept_QK.shape[0], accept_QK.shape[1] + 1)
        value_QK1[:, :-1][counts_QK] = value_M.detach().to(value_QK1.dtype)
        advantage_QK = acceptance_gae(accept_QK, value_QK1, gae_lambda)
        ratio_M = policy_ratio(logq_M, rounds.behaviour_logprob_QK[counts_QK])
        survival_M = survival_QK[counts_QK]
        loss_M, is_clipped_M = clipped_policy_loss(ratio_M, advantage_QK[counts_QK], survival_M, clip=clip)
        return_M = (advantage_QK + value_QK1[:, :-1])[counts_QK]
        sampled_return_M = (acceptance_gae(accept_QK, value_QK1, 1.0) + value_QK1[:, :-1])[counts_QK]
        return PolicyTerms(
            policy_loss=loss_M.sum() / len(rounds),
            value_loss=value_loss(value_M, return_M, survival_M),
            entropy=entropy(logq_MV).mean(),
            num_rounds=len(rounds),
            num_proposals=len(loss_M),
            accepted_length=accept_QK.cumprod(-1).sum(-1).mean(),
            mean_ratio=(ratio_M.detach() * survival_M).sum() / survival_M.sum(),
            clip_fraction=is_clipped_M.float().mean(),
            explained_variance=explained_variance(value_M.detach(), sampled_return_M, survival_M),
        )


def sampled_share(batch: OnlineBatch, num_proposals: int, num_targets: Tensor) -> Tensor:
    """M / (M + N), in [0, 1], of the whole batch: M sampled proposals, N targets of the base loss.

    The base loss has the same objective in closed form at every position and draft step. A few sampled proposals beside
    that are mostly noise: when their loss had full weight, it undid what the base loss taught. `num_proposals` and
    `num_targets` are of this process's shard; dividing by the shard's fractions makes all processes agree.
    """
    fraction = batch.live_fraction if batch.live_B.any() else batch.replay_fraction
    sampled, exact = num_proposals / max(batch.rounds_fraction, 1e-9), num_targets / max(fraction, 1e-9)
    return sampled / (sampled + exact).clamp_min(1.0)


def draft_index(token_ids: Tensor, draft: Eagle3Draft) -> Tensor:
    """Draft ids of target ids; 0 for padding (−1), and arbitrary where the draft does not have the token."""
    ids = draft.draft_token_ids  # in any order: some tools sort them by frequency
    index_V = torch.zeros_like(draft.t2d, dtype=torch.int64)
    index_V[ids] = torch.arange(len(ids), device=ids.device)
    return index_V[token_ids.clamp_min(0)]


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
