"""Verification: which proposals of a round are accepted, and which token follows them.

The counterpart of vLLM's rejection sampling. Everything here is exact: whatever the draft proposes, a request's output
has the distribution of plain decoding from p, the target's distribution after the request's options
(modules/sampling/distribution.py). A batch may mix three kinds of sequences:

- Greedy: the target's token is its argmax. Proposals are accepted while they equal it.
- Seeded: the target's token is drawn with a uniform number that depends on the seed and the token's output index
  (modules/sampling/noise.py). Proposals, the draft's argmax, are accepted while they equal it. The same seed therefore
  gives the same output whatever the draft, the number of proposals and the rest of the batch. Where the kernels do not
  apply, this holds up to the last bits of the logits, which may depend on the batch there.
- Unseeded: proposals are drawn from q and accepted with probability min(1, p/q), the ratio test; after a rejection the
  token is drawn from the residual max(p − q, 0) (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
  2302.01318). More proposals are accepted than by equality.

A round uses 2K + 1 uniform numbers for each sequence: K for the proposals, K for the tests, one for the last token.

Leaves out the networks, the number of proposals (serve/speculation/planner.py, serve/speculation/ngram_planner.py), and
where a request ends (`cut_at_end` in serve/sequences/sequence.py).

Shapes: B sequences, K proposals, T = K + 1 columns, V target vocabulary, D draft vocabulary, R sampled sequences of
the batch, A columns of the longest accepted path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.modules.sampling.distribution import History, LogitOptions, apply_bias_and_penalties, probabilities
from aurora_lit.modules.sampling.noise import draw, seeded_uniforms
from aurora_lit.modules.sampling.proposals import DraftVocabulary, Proposals
from aurora_lit.modules.sampling.tree import accepted_path, depths


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """What a round emits: the first `num_accepted_B` proposals of a sequence (of a tree: of its accepted path), then
    `next_token_B`."""

    num_accepted_B: Tensor
    """int64, 0 … K."""
    next_token_B: Tensor
    """int64. The corrected token after a rejection, the bonus token if all proposals were accepted."""
    accepted_column_BA: Tensor | None = None
    """int64. Of trees: the root's column 0, the accepted columns, then padding. None for chains."""


def verify(
    logits_BTV: Tensor,
    *,
    options: LogitOptions,
    proposals: Proposals,
    uniform_BT: Tensor,
    history: History | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> VerificationResult:
    """Verify one round for a batch of any mixture of greedy, seeded and unseeded sequences.

    A batch of greedy sequences without bias or penalty costs one argmax.

    Args:
        logits_BTV: the target's logits. T = K + 1; K = 0 is plain decoding.
        options: the batch's sampling options.
        proposals: what was proposed.
        uniform_BT: uniform numbers in [0, 1); used for unseeded sequences.
        history: needed if a sequence has a penalty or a seed.
        vocabulary: of q; None if q is over the target's vocabulary.

    Raises:
        ValueError: `history` is None but a sequence has a penalty or a seed.
    """
    adjusted_logits_BTV = apply_bias_and_penalties(
        logits_BTV, options=options, history=history, proposals_BK=proposals.token_BK
    )
    sampled = options.sampled_rows
    if not options.num_sampled:
        return verify_by_equality(adjusted_logits_BTV.argmax(-1), proposals=proposals)

    all_sampled = not options.greedy_rows.numel()
    p_RTV = probabilities(
        adjusted_logits_BTV if all_sampled else adjusted_logits_BTV[sampled], filters=options.sampled_filters
    )
    token_RT = torch.zeros(p_RTV.shape[:2], dtype=torch.int64, device=p_RTV.device)
    if options.num_unseeded < options.num_sampled:
        token_RT = _seeded_tokens(p_RTV, options=options, proposals=proposals, history=history)

    token_BT = token_RT
    if not all_sampled:
        token_BT = logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=torch.int64)
        token_BT[sampled] = token_RT
        token_BT[options.greedy_rows] = adjusted_logits_BTV[options.greedy_rows].argmax(-1)
    by_equality = verify_by_equality(token_BT, proposals=proposals)
    if not options.num_unseeded:
        return by_equality

    by_ratio_test = verify_by_ratio_test(
        p_RTV,
        proposals_BK=proposals.token_BK[sampled],
        num_proposed_B=proposals.num_proposed_B[sampled],
        uniform_BT=uniform_BT[sampled],
        q_BKD=None if proposals.q_BKD is None else proposals.q_BKD[sampled],
        vocabulary=vocabulary,
    )
    unseeded_R = options.unseeded_B[sampled]
    num_accepted_R = torch.where(unseeded_R, by_ratio_test.num_accepted_B, by_equality.num_accepted_B[sampled])
    next_token_R = torch.where(unseeded_R, by_ratio_test.next_token_B, by_equality.next_token_B[sampled])
    return VerificationResult(
        num_accepted_B=by_equality.num_accepted_B.scatter(0, sampled, num_accepted_R),
        next_token_B=by_equality.next_token_B.scatter(0, sampled, next_token_R),
        accepted_column_BA=by_equality.accepted_column_BA,
    )


def _seeded_tokens(p_RTV: Tensor, *, options: LogitOptions, proposals: Proposals, history: History | None) -> Tensor:
    """The target's own token at every column of the sampled sequences [R, T]; meaningful where there is a seed."""
    if history is None:
        raise ValueError("history is None but a sequence has a seed: pass the sequences' tokens")
    sampled = options.sampled_rows
    output_index_R = (history.length_B - history.prompt_length_B)[sampled]
    uniform_RT = seeded_uniforms(options.seed_B[sampled], output_index_B=output_index_R, count=p_RTV.shape[1])
    if proposals.parent_BK is not None:
        depth_RT = torch.tensor([depths(parents) for parents in proposals.parent_BK[sampled].tolist()])
        uniform_RT = uniform_RT.gather(1, depth_RT.to(uniform_RT.device))
    return draw(p_RTV, uniform_RT)


def verify_by_equality(target_token_BT: Tensor, *, proposals: Proposals) -> VerificationResult:
    """Accept the proposals that equal the target's own token at the column they follow, along a chain or in a tree."""
    if proposals.parent_BK is None:
        return verify_chain_by_equality(
            target_token_BT, proposals_BK=proposals.token_BK, num_proposed_B=proposals.num_proposed_B
        )
    paths = [
        [0, *accepted_path(tokens[:count], parents[:count], target_tokens)]
        for tokens, parents, target_tokens, count in zip(
            proposals.token_BK.tolist(),
            proposals.parent_BK.tolist(),
            target_token_BT.tolist(),
            proposals.num_proposed_B.tolist(),
            strict=True,
        )
    ]
    longest = max(map(len, paths))
    device = target_token_BT.device
    column_BA = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=device)
    num_accepted_B = torch.tensor([len(path) - 1 for path in paths], device=device)
    last_B1 = column_BA.gather(1, num_accepted_B[:, None])
    return VerificationResult(
        num_accepted_B=num_accepted_B,
        next_token_B=target_token_BT.gather(1, last_B1)[:, 0],
        accepted_column_BA=column_BA,
    )


def verify_chain_by_equality(
    target_token_BT: Tensor, *, proposals_BK: Tensor, num_proposed_B: Tensor
) -> VerificationResult:
    """Accept a chain's proposals up to the first that differs from the target's own token; then emit that token."""
    index_K = torch.arange(proposals_BK.shape[1], device=proposals_BK.device)
    equal_BK = (proposals_BK == target_token_BT[:, :-1]) & (index_K < num_proposed_B[:, None])
    num_accepted_B = equal_BK.long().cumprod(1).sum(1)
    return VerificationResult(
        num_accepted_B=num_accepted_B, next_token_B=target_token_BT.gather(1, num_accepted_B[:, None])[:, 0]
    )


def verify_by_ratio_test(
    p_BTV: Tensor,
    *,
    proposals_BK: Tensor,
    num_proposed_B: Tensor,
    uniform_BT: Tensor,
    q_BKD: Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> VerificationResult:
    """Accept each proposal a with probability min(1, p(a)/q(a)) up to the first rejection.

    The next token is drawn from the residual after a rejection, and from p if all proposals were accepted.

    Args:
        p_BTV: the target's distributions.
        proposals_BK: target ids.
        num_proposed_B: proposals of each sequence.
        uniform_BT: uniform numbers in [0, 1). The first K test the proposals, the last draws the next token, whatever
            was accepted, so that which numbers a sequence uses does not depend on the outcome.
        q_BKD: what the proposals were drawn from. None: q is one-hot at the proposal (an argmax), so that a is
            accepted with probability p(a), and the residual is p without a.
        vocabulary: of q; None if q is over the target's vocabulary.
    """
    B, K = proposals_BK.shape
    index_K = torch.arange(K, device=proposals_BK.device)
    p_of_BK = p_BTV[:, :K].gather(2, proposals_BK[..., None])[..., 0]
    q_of_BK = torch.ones_like(p_of_BK)
    if q_BKD is not None:
        draft_id_BK = proposals_BK if vocabulary is None else vocabulary.draft_id_V[proposals_BK].clamp_min(0)
        q_of_BK = q_BKD.gather(2, draft_id_BK[..., None])[..., 0]
    passed_BK = uniform_BT[:, :K] < acceptance_probability(p_of_BK, q_of_BK)
    num_accepted_B = (passed_BK & (index_K < num_proposed_B[:, None])).long().cumprod(1).sum(1)

    row_B = torch.arange(B, device=proposals_BK.device)
    weight_BV = p_BTV[row_B, num_accepted_B]
    if K:
        rejected_B = num_accepted_B < num_proposed_B
        at_B = num_accepted_B.clamp(max=K - 1)
        if q_BKD is None:
            q_BD, target_id = rejected_B.to(p_BTV.dtype)[:, None], proposals_BK[row_B, at_B][:, None]
        else:
            q_BD = q_BKD[row_B, at_B].to(p_BTV.dtype) * rejected_B[:, None]
            all_ids = torch.arange(p_BTV.shape[2], device=p_BTV.device)
            target_id = all_ids if vocabulary is None else vocabulary.target_id_D
            target_id = target_id.expand_as(q_BD)
        weight_BV = residual(weight_BV, q_BD=q_BD, target_id_BD=target_id)
    return VerificationResult(num_accepted_B=num_accepted_B, next_token_B=draw(weight_BV, uniform_BT[:, K]))


def acceptance_probability(p_of: Tensor, q_of: Tensor) -> Tensor:
    """min(1, p/q) for the probabilities of proposed tokens; q > 0, since they were drawn from it."""
    return (p_of.double() / q_of.double()).clamp(max=1)


def residual(p_BV: Tensor, *, q_BD: Tensor, target_id_BD: Tensor) -> Tensor:
    """max(p − q, 0), not normalised. Where it is 0 everywhere, p: there p = q, so a rejection has probability 0."""
    rest_BV = p_BV.scatter_add(1, target_id_BD, -q_BD).clamp_min_(0)
    return torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
