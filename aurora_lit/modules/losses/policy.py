"""The policy terms of an online batch: which rounds may be learnt from, and their losses along what was proposed.

The policy is the draft's distribution over its vocabulary at the temperature that the round's proposals were drawn at;
the behaviour is what was logged then. A policy ratio therefore also differs from 1 where serving saw more context than
the trace holds. Measured with SmolLM2-135M's draft unchanged, the deviation of log ρ: 0.02 from rounding (bf16-mixed);
with the context's beginning missing 0.2 where 64 tokens or more are left, and 2 where less than 32 are.

What is left out: the mathematics (modules/losses/ppo.py) and the total loss (modules/losses/draft_module.py).

Shapes: Q rounds, K proposals, M proposals that count, L of them under the ratio test, H hidden, V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.modules.draft.logit_transform import LogitTransform
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.ppo import (
    acceptance_gae,
    clipped_policy_loss,
    entropy,
    explained_variance,
    policy_ratio,
    ratio_test_advantage,
    rise_share,
    survival,
    value_loss,
)
from aurora_lit.modules.sampling.distribution import GREEDY_BELOW


@dataclass(frozen=True, kw_only=True)
class PolicyTerms:
    """Losses with gradient, and what they were made of (without). Everything is 0 where no round could be used."""

    policy_loss: Tensor
    """−Σ S·min(ρÂ, clip(ρ)Â) a round, averaged over rounds: its gradient is that of −J."""
    value_loss: Tensor
    """Mean square of the value head against λ-returns, weighted by S."""
    entropy: Tensor
    """Mean entropy of the policy in nats, over proposals that had a chance to be tested."""
    num_rounds: int
    num_proposals: int
    """Proposals that had a chance to be tested."""
    accepted_length: Tensor
    """Mean of Σ_t Π_{i≤t} c_i a round: the sampled J."""
    mean_ratio: Tensor
    """Mean ρ, weighted by S; about 1 while the draft is the one that served."""
    clip_fraction: Tensor
    """Share of proposals whose gradient the clip has stopped."""
    explained_variance: Tensor
    """Of the sampled returns by the value head: 1 is perfect, 0 no better than their mean."""

    @staticmethod
    def none(like: Tensor) -> PolicyTerms:
        """No round to learn from."""
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


def usable_rounds(batch: OnlineBatch, draft: Draft) -> OnlineBatch:
    """The batch with only those rounds that have a policy ratio: fresh, and every proposal drawn from a draft."""
    inside_QK = _places(batch) < batch.num_proposed_Q[:, None]
    drawn_QK = batch.behaviour_logprob_QK.isfinite() & draft.t2d[batch.proposal_QK.clamp_min(0)]
    kept_Q = batch.fresh_Q & (batch.num_proposed_Q > 0) & (drawn_QK | ~inside_QK).all(-1)
    names = [name for name in vars(batch) if name.endswith(("_Q", "_QK", "_QKH"))]
    return replace(batch, **{name: getattr(batch, name)[kept_Q] for name in names})


def accept_probabilities(
    batch: OnlineBatch, draft: Draft, head_VH: Tensor, finish: LogitTransform
) -> tuple[Tensor, Tensor]:
    """c and log p(a) of every proposal [Q, K]; c is 0 beyond a round's number. The rounds must be usable."""
    index_QK = draft_index(batch.proposal_QK, draft)
    head_QKH = head_VH[index_QK].to(_math_dtype(head_VH))
    logit_QK = finish.of_tokens((batch.path_last_QKH.to(head_QKH.dtype) * head_QKH).sum(-1), index_QK)
    logp_QK = logit_QK / _target_temperature(batch)[:, None] - batch.path_lse_QK
    equal_QK = (batch.proposal_QK == batch.path_top_QK).to(logp_QK.dtype)
    greedy_Q = batch.temperature_Q < GREEDY_BELOW
    own_token_QK = torch.where(greedy_Q[:, None], equal_QK, logp_QK.exp())
    tested_QK = (logp_QK - batch.behaviour_logprob_QK).clamp(max=0).exp()
    accept_QK = torch.where(batch.greedy_verify_Q[:, None], own_token_QK, tested_QK)
    return accept_QK.where(_places(batch) < batch.num_proposed_Q[:, None], 0.0).clamp(max=1), logp_QK


def policy_terms(
    batch: OnlineBatch,
    draft: Draft,
    hidden_QKH: Tensor,
    *,
    head_VH: Tensor,
    finish: LogitTransform,
    clip: float,
    gae_lambda: float,
) -> PolicyTerms:
    """Losses of usable rounds; `hidden_QKH` are the draft's states along the proposed paths.

    `head_VH` and `finish` are the target's, for the draft vocabulary. The heads run in full precision: a policy ratio
    forgives no rounding of large logits.
    """
    if not len(batch.row_Q):
        return PolicyTerms.none(hidden_QKH)
    with torch.autocast(hidden_QKH.device.type, enabled=False):
        accept_QK, logp_QK = accept_probabilities(batch, draft, head_VH, finish)
        reached_QK = survival(accept_QK)
        counts_QK = (reached_QK > 0) & (_places(batch) < batch.num_proposed_Q[:, None])
        hidden_MH = hidden_QKH[counts_QK].to(draft.lm_head.weight.dtype)
        round_M = counts_QK.nonzero()[:, 0]
        logits_MV = draft.logits(hidden_MH).to(_math_dtype(hidden_MH))
        logq_MV = torch.log_softmax(logits_MV / batch.draft_temperature_Q[round_M, None], dim=-1)
        index_M = draft_index(batch.proposal_QK[counts_QK], draft)
        logq_M = logq_MV.gather(1, index_M[:, None])[:, 0]
        value_M = draft.value(hidden_MH.detach())

        value_QK1 = accept_QK.new_zeros(accept_QK.shape[0], accept_QK.shape[1] + 1)
        value_QK1[:, :-1][counts_QK] = value_M.detach().to(value_QK1.dtype)
        gae_QK = acceptance_gae(accept_QK, value_QK1, gae_lambda)
        tested_M = ~batch.greedy_verify_Q[round_M]
        share_M = _rise_shares(batch, counts_QK, tested_M, logq_MV.detach(), head_VH, finish)
        ratio_test_QK = ratio_test_advantage(
            gae_QK,
            value_QK1,
            gae_lambda,
            can_rise_K=_lay_out(logq_M.detach() <= logp_QK[counts_QK], counts_QK),
            rise_share_K=_lay_out(share_M, counts_QK),
        )
        advantage_QK = torch.where(batch.greedy_verify_Q[:, None], gae_QK, ratio_test_QK)

        ratio_M = policy_ratio(logq_M, batch.behaviour_logprob_QK[counts_QK])
        reached_M = reached_QK[counts_QK]
        loss_M, clipped_M = clipped_policy_loss(ratio_M, advantage_QK[counts_QK], reached_M, clip=clip)
        return_M = (gae_QK + value_QK1[:, :-1])[counts_QK]
        sampled_M = (acceptance_gae(accept_QK, value_QK1, 1.0) + value_QK1[:, :-1])[counts_QK]
        return PolicyTerms(
            policy_loss=loss_M.sum() / len(batch.row_Q),
            value_loss=value_loss(value_M, return_M, reached_M),
            entropy=entropy(logq_MV).mean(),
            num_rounds=len(batch.row_Q),
            num_proposals=len(loss_M),
            accepted_length=accept_QK.cumprod(-1).sum(-1).mean(),
            mean_ratio=(ratio_M.detach() * reached_M).sum() / reached_M.sum(),
            clip_fraction=clipped_M.float().mean(),
            explained_variance=explained_variance(value_M.detach(), sampled_M, reached_M),
        )


def evidence(batch: OnlineBatch, num_proposals: int, num_targets: Tensor) -> Tensor:
    """Share of sampled proposals in all that a batch says of acceptance, in [0, 1]; alike in all processes.

    The base loss has the same objective in closed form at every position and draft step (`num_targets` of them). A few
    sampled proposals beside those are mostly noise: averaged over themselves alone, as if they were as many, they undid
    what it taught.
    """
    part = batch.live_part if batch.live_B.any() else batch.replay_part
    sampled, exact = num_proposals / max(batch.rounds_part, 1e-9), num_targets / max(part, 1e-9)
    return sampled / (sampled + exact).clamp_min(1.0)


def draft_index(token_ids: Tensor, draft: Draft) -> Tensor:
    """Draft index of target ids; 0 for padding (−1), and arbitrary where the draft has no such token."""
    return (draft.t2d.cumsum(0) - 1)[token_ids.clamp_min(0)].clamp_min(0)


def _rise_shares(
    batch: OnlineBatch, counts_QK: Tensor, tested_M: Tensor, logq_MV: Tensor, head_VH: Tensor, finish: LogitTransform
) -> Tensor:
    """`rise_share` of every proposal under the ratio test, 0 elsewhere."""
    share_M = logq_MV.new_zeros(len(tested_M))
    if tested_M.any():
        round_L = counts_QK.nonzero()[tested_M, 0]
        last_LH = batch.path_last_QKH[counts_QK][tested_M].to(head_VH.dtype)
        logits_LV = finish((last_LH @ head_VH.T).to(logq_MV.dtype)) / _target_temperature(batch)[round_L, None]
        p_LV = (logits_LV - batch.path_lse_QK[counts_QK][tested_M, None]).exp()
        share_M[tested_M] = rise_share(p_LV, logq_MV[tested_M].exp())
    return share_M


def _places(batch: OnlineBatch) -> Tensor:
    return torch.arange(batch.proposal_QK.shape[1], device=batch.proposal_QK.device)


def _target_temperature(batch: OnlineBatch) -> Tensor:
    """What the target's logits are divided by; path_lse_QK has that in it."""
    return torch.where(batch.temperature_Q < GREEDY_BELOW, 1.0, batch.temperature_Q)


def _lay_out(x_M: Tensor, counts_QK: Tensor) -> Tensor:
    """Values of the proposals that count in their places, 0 elsewhere."""
    out_QK = x_M.new_zeros(counts_QK.shape)
    out_QK[counts_QK] = x_M
    return out_QK


def _math_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
