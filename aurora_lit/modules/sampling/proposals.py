"""Proposals of a round: what the draft proposes, how one draft step draws it, and its log-probability.

Leaves out the draft network and the number of proposals (serve/speculation/), and which proposals are accepted
(modules/sampling/verification.py).

Shapes: B sequences, K proposals, T = K + 1 columns (the root, then the proposals), V target vocabulary, D draft
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.modules.sampling.distribution import LogitOptions, probabilities
from aurora_lit.modules.sampling.noise import draw


@dataclass(frozen=True, kw_only=True)
class DraftVocabulary:
    """The draft's reduced vocabulary as maps in both directions; both tensors int64."""

    target_id_D: Tensor
    """Target id of each draft id."""
    draft_id_V: Tensor
    """Draft id of each target id; −1 where the draft has no such token."""

    @staticmethod
    def from_offsets(d2t_D: Tensor, *, vocab_size: int) -> DraftVocabulary:
        """From a checkpoint's `d2t`: target id = draft id + d2t[draft id]. `vocab_size`: V."""
        draft_ids = torch.arange(d2t_D.shape[0], device=d2t_D.device)
        target_ids = draft_ids + d2t_D
        inverse = torch.full((vocab_size,), -1, dtype=torch.int64, device=d2t_D.device)
        return DraftVocabulary(target_id_D=target_ids, draft_id_V=inverse.scatter(0, target_ids, draft_ids))


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """The proposed tokens of a round, a chain or a tree for each sequence."""

    token_BK: Tensor
    """int64 target ids; any valid id beyond a sequence's number of proposals."""
    num_proposed_B: Tensor
    """int64, 0 … K."""
    q_BKD: Tensor | None
    """The draft distribution that each proposal of an unseeded sequence was drawn from. None: every proposal is the
    draft's argmax."""
    logprob_BK: Tensor | None = None
    """fp32. Behaviour log-probabilities, as `behaviour_logprobs` computes them; None when they are not recorded."""
    parent_BK: Tensor | None = None
    """int64. Of a tree: the column that each proposal follows (modules/sampling/tree.py). None: chains, where each
    proposal follows the one before. In a batch of trees, unseeded sequences have no proposals, and sequences with a
    penalty have none or a chain."""

    @property
    def parent_BT(self) -> Tensor | None:
        """`parent_BK` for all columns; the root's parent is −1."""
        if self.parent_BK is None:
            return None
        return torch.cat([self.parent_BK.new_full((len(self.parent_BK), 1), -1), self.parent_BK], 1)


def propose(
    logits_BD: Tensor, *, options: LogitOptions, uniform_B: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The proposals of one draft step: drawn for unseeded sequences, the argmax for all others.

    The draft distribution q has the request's temperature, min-p, top-k and top-p, which makes proposals likelier to
    be accepted, but not its penalties and logit bias.

    Args:
        logits_BD: the draft's logits.
        options: the batch's sampling options.
        uniform_B: uniform numbers in [0, 1). None: the argmax for every sequence.

    Returns:
        Draft ids [B], and q [B, D], or None when nothing was drawn.
    """
    best_B = logits_BD.argmax(-1)
    if uniform_B is None or not options.num_unseeded:
        return best_B, None
    q_BD = probabilities(logits_BD[:, None], filters=options.filters)[:, 0]
    return torch.where(options.unseeded_B, draw(q_BD, uniform_B), best_B), q_BD


def behaviour_logprobs(proposals: Proposals, *, options: LogitOptions, vocabulary: DraftVocabulary) -> Tensor:
    """Log-probability of each proposal under the distribution it was drawn from [B, K], for a policy ratio.

    It is 0 for an argmax. It is NaN where top-k, top-p or min-p truncated the distribution: the learner knows only the
    draft's softmax, so such a draw has no policy ratio. `options` are those that the proposals were made with.
    """
    argmax_BK = torch.zeros(proposals.token_BK.shape, device=proposals.token_BK.device)
    if proposals.q_BKD is None:
        return argmax_BK
    draft_id_BK = vocabulary.draft_id_V[proposals.token_BK].clamp_min(0)
    drawn_BK = proposals.q_BKD.gather(2, draft_id_BK[..., None])[..., 0].float().log()
    filters = options.filters
    is_truncated_B = (filters.top_k_R > 0) | (filters.top_p_R < 1) | (filters.min_p_R > 0)
    drawn_BK = drawn_BK.masked_fill(is_truncated_B[:, None], float("nan"))
    return torch.where(options.unseeded_B[:, None], drawn_BK, argmax_BK)
