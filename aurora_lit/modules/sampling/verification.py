"""Which tokens a round emits: proposals from the draft, verification against the target, draws, log-probabilities.

Everything here is exact: whatever the draft, what a request receives has the law of plain decoding from p, the
distribution after its options (modules/sampling/distribution.py). Three kinds of rows, mixed freely in a batch:

- greedy: the target's token is its argmax; proposals are accepted while they equal it.
- seeded: the target's token is drawn by a uniform number that depends on the seed and the token's place in the output,
  and proposals (the draft's argmax) are accepted while they equal it. So the same seed gives the same output whatever
  the draft, the number of proposals and the rest of the batch (up to what batching does to the logits' last bits).
- free (sampled without a seed): proposals are drawn from q, accepted with min(1, p/q), corrected from the residual
  max(p − q, 0) (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318). Higher acceptance.

Draws invert the cumulative distribution in float64 by one uniform number each: a round uses a fixed count of them
(2K + 1 a row: K for the proposals, K for the tests, one for the last token), and a token of probability 0 never comes.

Left out: the networks, the number of proposals (serve/speculation/planner.py), stop conditions (serve/engine/engine.py).

Shapes: B rows (requests), K proposals, T = K + 1 positions, V target vocabulary, D draft vocabulary, R rows picked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aurora_lit.modules.sampling.distribution import History, LogitOptions, probabilities, shift_logits
from aurora_lit.modules.sampling.tree import accepted_path, depths
from aurora_lit.request import TokenLogprob


@dataclass(frozen=True, kw_only=True)
class DraftVocabulary:
    """The reduced vocabulary of the draft; both tensors int64."""

    target_id_D: Tensor
    draft_id_V: Tensor
    """−1 where the draft has no such token."""

    @staticmethod
    def of_offsets(d2t_D: Tensor, *, vocab_size: int) -> DraftVocabulary:
        """From a checkpoint's d2t: target id = draft id + d2t[draft id]."""
        draft_ids = torch.arange(d2t_D.shape[0], device=d2t_D.device)
        target_ids = draft_ids + d2t_D
        inverse = torch.full((vocab_size,), -1, dtype=torch.int64, device=d2t_D.device)
        return DraftVocabulary(target_id_D=target_ids, draft_id_V=inverse.scatter(0, target_ids, draft_ids))


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What the draft proposes in a round."""

    token_BK: Tensor
    """int64 target ids; any valid id beyond a row's number."""
    num_B: Tensor
    """int64, 0..K a row."""
    q_BKD: Tensor | None
    """The distribution each free row's proposal was drawn from; None when all proposals are the draft's argmax."""
    logprob_BK: Tensor | None = None
    """fp32. Behaviour log-probabilities, as `behaviour_logprobs` makes them; None when nobody asked for them."""
    parent_BK: Tensor | None = None
    """int64. The column each proposal follows (modules/sampling/tree.py); None: a chain, each follows the one before. Where
    proposals branch, free rows have none, and rows with a penalty none or a chain."""

    @property
    def parent_BT(self) -> Tensor | None:
        """The same for all columns; the root's follows none: −1."""
        if self.parent_BK is None:
            return None
        return torch.cat([self.parent_BK.new_full((len(self.parent_BK), 1), -1), self.parent_BK], 1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a round emits: the first accepted_B proposals of a row, then next_token_B."""

    accepted_B: Tensor
    next_token_B: Tensor
    column_BA: Tensor | None = None
    """int64. Where proposals branch: the root's column 0, the columns accepted, and any columns beyond."""


def propose(
    logits_BD: Tensor, *, options: LogitOptions, uniform_B: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draft ids [B] for one step, and q [B, D] for the free rows; without uniform numbers the argmax for all rows.

    q has the row's temperature and its min-p, top-k and top-p too, which makes it likelier to be accepted; not its
    penalties and bias.
    """
    best_B = logits_BD.argmax(-1)
    if uniform_B is None or not options.num_free:
        return best_B, None
    q_BD = probabilities(logits_BD[:, None], filters=options.filters)[:, 0]
    return torch.where(options.free_B, draw(q_BD, uniform_B), best_B), q_BD


def behaviour_logprobs(proposals: Proposals, *, options: LogitOptions, vocabulary: DraftVocabulary) -> Tensor:
    """Log-probability [B, K] of each proposal under the distribution it was drawn from; 0 for an argmax.

    NaN where top-k, top-p or min-p cut that distribution: the draft alone cannot tell it any more, so it is no basis
    for a policy ratio. `options` are those that the proposals were made with.
    """
    chosen_BK = torch.zeros(proposals.token_BK.shape, device=proposals.token_BK.device)
    if proposals.q_BKD is None:
        return chosen_BK
    draft_id_BK = vocabulary.draft_id_V[proposals.token_BK].clamp_min(0)
    drawn_BK = proposals.q_BKD.gather(2, draft_id_BK[..., None])[..., 0].float().log()
    filters = options.filters
    cut_B = (filters.top_k_R > 0) | (filters.top_p_R < 1) | (filters.min_p_R > 0)
    drawn_BK = drawn_BK.masked_fill(cut_B[:, None], float("nan"))
    return torch.where(options.free_B[:, None], drawn_BK, chosen_BK)


def verify(
    logits_BTV: Tensor,
    *,
    options: LogitOptions,
    proposals: Proposals,
    uniform_BT: Tensor,
    history: History | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> Verdict:
    """One round's verdict for a batch of rows of any kind. T = K + 1; K = 0 is plain decoding.

    history is needed where a row has a penalty or a seed; uniform_BT, in [0, 1), is used for free rows. A batch of
    greedy rows without bias or penalty costs one argmax.
    """
    shifted = shift_logits(logits_BTV, options=options, history=history, proposals_BK=proposals.token_BK)
    rows = options.sampled_rows
    if not options.num_sampled:
        return verify_matching(shifted.argmax(-1), proposals=proposals)

    all_sampled = not options.greedy_rows.numel()
    p_RTV = probabilities(shifted if all_sampled else shifted[rows], filters=options.sampled_filters)
    token_RT = torch.zeros(p_RTV.shape[:2], dtype=torch.int64, device=p_RTV.device)
    if options.num_free < options.num_sampled:
        if history is None:
            raise ValueError("history is None but a row has a seed: pass the rows' tokens")
        place_R = (history.length_B - history.prompt_length_B)[rows]
        uniform_RT = seeded_uniforms(options.seed_B[rows], place_B=place_R, count=p_RTV.shape[1])
        if proposals.parent_BK is not None:
            depth_RT = torch.tensor([depths(parents) for parents in proposals.parent_BK[rows].tolist()])
            uniform_RT = uniform_RT.gather(1, depth_RT.to(uniform_RT.device))
        token_RT = draw(p_RTV, uniform_RT)

    # Rows that accept what equals the target's token: greedy and seeded.
    token_BT = token_RT
    if not all_sampled:
        token_BT = logits_BTV.new_zeros(logits_BTV.shape[:2], dtype=torch.int64)
        token_BT[rows] = token_RT
        token_BT[options.greedy_rows] = shifted[options.greedy_rows].argmax(-1)
    matched = verify_matching(token_BT, proposals=proposals)
    if not options.num_free:
        return matched

    tested = verify_sampled(
        p_RTV,
        proposals_BK=proposals.token_BK[rows],
        num_proposed_B=proposals.num_B[rows],
        uniform_BT=uniform_BT[rows],
        q_BKD=None if proposals.q_BKD is None else proposals.q_BKD[rows],
        vocabulary=vocabulary,
    )
    free_R = options.free_B[rows]
    accepted_R = torch.where(free_R, tested.accepted_B, matched.accepted_B[rows])
    next_token_R = torch.where(free_R, tested.next_token_B, matched.next_token_B[rows])
    return Verdict(
        accepted_B=matched.accepted_B.scatter(0, rows, accepted_R),
        next_token_B=matched.next_token_B.scatter(0, rows, next_token_R),
        column_BA=matched.column_BA,
    )


def verify_matching(target_token_BT: Tensor, *, proposals: Proposals) -> Verdict:
    """Accept the proposals that equal the target's own tokens, along a chain or down a tree."""
    if proposals.parent_BK is None:
        return verify_greedy(target_token_BT, proposals_BK=proposals.token_BK, num_proposed_B=proposals.num_B)
    paths = [
        [0, *accepted_path(tokens[:count], parents[:count], wanted)]
        for tokens, parents, wanted, count in zip(
            proposals.token_BK.tolist(),
            proposals.parent_BK.tolist(),
            target_token_BT.tolist(),
            proposals.num_B.tolist(),
            strict=True,
        )
    ]
    longest = max(map(len, paths))
    column_BA = torch.tensor([path + [0] * (longest - len(path)) for path in paths], device=target_token_BT.device)
    accepted_B = torch.tensor([len(path) - 1 for path in paths], device=target_token_BT.device)
    last_B1 = column_BA.gather(1, accepted_B[:, None])
    return Verdict(accepted_B=accepted_B, next_token_B=target_token_BT.gather(1, last_B1)[:, 0], column_BA=column_BA)


def verify_greedy(target_token_BT: Tensor, *, proposals_BK: Tensor, num_proposed_B: Tensor) -> Verdict:
    """Accept proposals while they equal the target's own token; then comes the target's token."""
    place_K = torch.arange(proposals_BK.shape[1], device=proposals_BK.device)
    equal_BK = (proposals_BK == target_token_BT[:, :-1]) & (place_K < num_proposed_B[:, None])
    accepted_B = equal_BK.long().cumprod(1).sum(1)
    return Verdict(accepted_B=accepted_B, next_token_B=target_token_BT.gather(1, accepted_B[:, None])[:, 0])


def verify_sampled(
    p_BTV: Tensor,
    *,
    proposals_BK: Tensor,
    num_proposed_B: Tensor,
    uniform_BT: Tensor,
    q_BKD: Tensor | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> Verdict:
    """Accept each proposal a with min(1, p(a)/q(a)) up to the first refusal; then draw from the residual, or from p.

    q_BKD None: the proposals were not drawn but chosen (q is one-hot), so a is accepted with p(a) and the residual is p
    without a. vocabulary None: q is over the whole vocabulary. The first K uniform numbers of a row test its proposals,
    the last draws its token, whatever was accepted, so that a row's draws do not depend on its luck.
    """
    B, K = proposals_BK.shape
    place_K = torch.arange(K, device=proposals_BK.device)
    p_of_BK = p_BTV[:, :K].gather(2, proposals_BK[..., None])[..., 0]
    q_of_BK = torch.ones_like(p_of_BK)
    if q_BKD is not None:
        index_BK = proposals_BK if vocabulary is None else vocabulary.draft_id_V[proposals_BK].clamp_min(0)
        q_of_BK = q_BKD.gather(2, index_BK[..., None])[..., 0]
    passed_BK = uniform_BT[:, :K] < acceptance_probability(p_of_BK, q_of_BK)
    accepted_B = (passed_BK & (place_K < num_proposed_B[:, None])).long().cumprod(1).sum(1)

    row_B = torch.arange(B, device=proposals_BK.device)
    weight_BV = p_BTV[row_B, accepted_B]
    if K:
        refused_B = accepted_B < num_proposed_B
        at_B = accepted_B.clamp(max=K - 1)
        if q_BKD is None:
            q_BD, target_id = refused_B.to(p_BTV.dtype)[:, None], proposals_BK[row_B, at_B][:, None]
        else:
            q_BD = q_BKD[row_B, at_B].to(p_BTV.dtype) * refused_B[:, None]
            all_ids = torch.arange(p_BTV.shape[2], device=p_BTV.device)
            target_id = all_ids if vocabulary is None else vocabulary.target_id_D
            target_id = target_id.expand_as(q_BD)
        weight_BV = residual(weight_BV, q_BD=q_BD, target_id_BD=target_id)
    return Verdict(accepted_B=accepted_B, next_token_B=draw(weight_BV, uniform_BT[:, K]))


def acceptance_probability(p_of: Tensor, q_of: Tensor) -> Tensor:
    """min(1, p/q) for the probabilities of proposed tokens; q > 0, since they were drawn from it."""
    return (p_of.double() / q_of.double()).clamp(max=1)


def residual(p_BV: Tensor, *, q_BD: Tensor, target_id_BD: Tensor) -> Tensor:
    """max(p − q, 0), not normalised; p itself where nothing is left: p = q then, and refusal has probability 0."""
    rest_BV = p_BV.scatter_add(1, target_id_BD, -q_BD).clamp_min_(0)
    return torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)


def draw(weight_V: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform·total, over the last dim; weights need not sum to 1."""
    cumulative = weight_V.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:].contiguous()
    token = torch.searchsorted(cumulative, uniform.double()[..., None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last token of positive weight, should the product round up
    return torch.minimum(token, last)[..., 0]


def seeded_uniforms(seed_B: Tensor, *, place_B: Tensor, count: int) -> Tensor:
    """Uniform numbers [B, count] in [0, 1), float64, for the output places place, place + 1, …

    SplitMix64 (Steele, Lea, Flood 2014) of the place, started at the mixed seed: a function of seed and place, so no
    state to keep, or to roll back when proposals are refused.
    """
    place_BT = place_B[:, None] + torch.arange(1, count + 1, device=place_B.device)
    bits_BT = _mix64(_mix64(seed_B)[:, None] + place_BT * -7046029254386353131)  # 0x9E3779B97F4A7C15
    return ((bits_BT >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's bit mixer on int64, whose products wrap; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (2**33 - 1))


def token_logprobs(logits_TV: Tensor, *, token_ids: list[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of given tokens and of the num_top likeliest, from the target's raw logits.

    Row t of the logits is the position that token t was drawn at; further rows are ignored.
    """
    logits_TV = logits_TV[: len(token_ids)].float()
    lse_T1 = logits_TV.logsumexp(-1, keepdim=True)
    index_T1 = torch.tensor(token_ids, dtype=torch.int64, device=logits_TV.device)[:, None]
    chosen = (logits_TV.gather(1, index_T1) - lse_T1)[:, 0].tolist()
    top = logits_TV.topk(min(num_top, logits_TV.shape[1]), -1)
    top_ids, top_values = top.indices.tolist(), (top.values - lse_T1).tolist()
    return tuple(
        TokenLogprob(token_id=t, logprob=c, top=tuple(zip(ids, values, strict=True)))
        for t, c, ids, values in zip(token_ids, chosen, top_ids, top_values, strict=True)
    )
