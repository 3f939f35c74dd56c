"""The draft's chains in training: K steps on its own hidden states, as in serving (EAGLE-3's training-time test).

A chain is named by its root position t, the draft's last position with true features: at step j the draft holds the
chain's token j and proposes token j + 1. `unroll` runs a chain from every position along the committed tokens;
`unroll_rounds` runs the chains that were served, along what was proposed there, accepted or not.

Source: Li et al., arXiv 2503.01840. What is left out: serving's chain, which has a cache (serve/speculation/drafter.py).

A chain costs as much as a position of the text, so chains run only where something is asked of them: behind a prompt,
which is most of a trace and teaches nothing, they need its keys and values alone.

Shapes: B rows, T positions, S step-0 keys, K steps, Q rounds, R most rounds or chains of a row, H hidden, V target
vocabulary, N heads, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aurora_lit.modules.draft.eagle3 import Draft


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """Chains from every position, along the committed tokens."""

    hidden_KBTH: torch.Tensor
    """Shifted so that row m of every step aims at target position m."""
    first_BTH: torch.Tensor
    """Hidden states of step 0 by root position, not shifted."""
    first_key_BGTD: torch.Tensor
    """Keys of step 0: what every chain sees of its past."""
    first_value_BGTD: torch.Tensor


def unroll(
    draft: Draft,
    *,
    token_ids_BT: torch.Tensor,
    aux_BT3H: torch.Tensor,
    embedding_VH: torch.Tensor,
    num_steps: int,
    wanted_BT: torch.Tensor | None = None,
) -> Unrolled:
    """K steps from every position: at step j, root t holds token t + 1 + j and proposes token t + 2 + j.

    wanted_BT: bool, the target positions m that something is asked of: chains that aim at none of them do not run, and
    what stands at other positions is 0. None: all.
    """
    B, T = token_ids_BT.shape
    device = token_ids_BT.device
    embeds_BTH = nn.functional.embedding(token_ids_BT, embedding_VH)
    fused_BTH = draft.fuse(aux_BT3H)
    positions_BT = torch.arange(T, device=device).expand(B, T)
    query, key, value = draft.project(shift(embeds_BTH, -1), fused_BTH, positions_BT)
    root_BR = positions_BT if wanted_BT is None else _roots_of(wanted_BT, num_steps)
    if wanted_BT is not None:
        query = query.gather(2, root_BR[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    causal_B1RT = torch.zeros(*root_BR.shape, T, device=device)
    causal_B1RT = causal_B1RT.masked_fill(positions_BT[:, None] > root_BR[..., None], float("-inf"))[:, None]
    chain = [(key, value)]
    hidden_BRH = draft.finish(_chain_attention(query, chain, causal_B1RT), _at(fused_BTH, root_BR))
    steps = [hidden_BRH]
    for step in range(1, num_steps):
        next_BRH = _at(embeds_BTH, (root_BR + 1 + step).clamp_max(T - 1))
        query, key, value = draft.project(next_BRH, hidden_BRH, root_BR + step)
        chain.append((key, value))
        hidden_BRH = draft.finish(_chain_attention(query, chain, causal_B1RT), hidden_BRH)
        steps.append(hidden_BRH)
    return Unrolled(
        hidden_KBTH=torch.stack([_laid_out(each, root_BR + 1 + step, T) for step, each in enumerate(steps)]),
        first_BTH=steps[0] if wanted_BT is None else _laid_out(steps[0], root_BR, T),
        first_key_BGTD=chain[0][0],
        first_value_BGTD=chain[0][1],
    )


def _roots_of(wanted_BT: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Roots of the chains that aim at wanted positions [B, R], ascending; rows with fewer have others too."""
    needed_BT = torch.stack([shift(wanted_BT, -(1 + step)) for step in range(num_steps)]).any(0)
    most = max(1, int(needed_BT.sum(1).max()))
    return needed_BT.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values


def _at(x_BTH: torch.Tensor, index_BR: torch.Tensor) -> torch.Tensor:
    return x_BTH.gather(1, index_BR[..., None].expand(-1, -1, x_BTH.shape[2]))


def _laid_out(x_BRH: torch.Tensor, index_BR: torch.Tensor, T: int) -> torch.Tensor:
    """Rows at their places among T, zeros elsewhere; places beyond the end fall away."""
    B, R, H = x_BRH.shape
    place_BR = index_BR.clamp_max(T) + torch.arange(B, device=index_BR.device)[:, None] * (T + 1)
    out_NH = x_BRH.new_zeros(B * (T + 1), H).index_copy(0, place_BR.flatten(), x_BRH.reshape(B * R, H))
    return out_NH.view(B, T + 1, H)[:, :T]


def unroll_rounds(
    draft: Draft,
    unrolled: Unrolled,
    *,
    row_Q: torch.Tensor,
    root_Q: torch.Tensor,
    proposal_QK: torch.Tensor,
    embedding_VH: torch.Tensor,
) -> torch.Tensor:
    """Hidden states [Q, K, H] that proposal i of a round is drawn from: the chain holds proposals 0 … i − 1.

    Rows, roots and proposals as in `OnlineBatch`. What stands beyond a round's number of proposals is arbitrary.
    """
    B, T, H = unrolled.first_BTH.shape
    device = row_Q.device
    # Rounds side by side in their row, so that they share its keys.
    count_B = torch.bincount(row_Q, minlength=B)
    order_Q = row_Q.argsort(stable=True)
    rank_Q = torch.empty_like(row_Q)
    rank_Q[order_Q] = torch.arange(len(row_Q), device=device) - (count_B.cumsum(0) - count_B)[row_Q[order_Q]]
    R = int(count_B.max())
    place_Q = row_Q * R + rank_Q

    def lay_out(x_Q: torch.Tensor) -> torch.Tensor:
        rest = x_Q.shape[1:]
        return x_Q.new_zeros(B * R, *rest).index_copy(0, place_Q, x_Q).view(B, R, *rest)

    start_Q = root_Q - 1  # the last position with true features: it holds the root's token
    start_BR = lay_out(start_Q)
    hidden_BRH = lay_out(unrolled.first_BTH[row_Q, start_Q])
    beyond_BRT = torch.arange(T, device=device) > start_BR[..., None]
    mask_B1RT = torch.zeros(B, R, T, device=device).masked_fill(beyond_BRT, float("-inf"))[:, None]
    embeds_BRKH = nn.functional.embedding(lay_out(proposal_QK).clamp_min(0), embedding_VH)
    chain = [(unrolled.first_key_BGTD, unrolled.first_value_BGTD)]
    steps = [hidden_BRH]
    for step in range(1, proposal_QK.shape[1]):
        query, key, value = draft.project(embeds_BRKH[:, :, step - 1], hidden_BRH, start_BR + step)
        chain.append((key, value))
        hidden_BRH = draft.finish(_chain_attention(query, chain, mask_B1RT), hidden_BRH)
        steps.append(hidden_BRH)
    return torch.stack(steps, dim=2).flatten(0, 1)[place_Q]


def _chain_attention(
    query_BNTD: torch.Tensor, chain: list[tuple[torch.Tensor, torch.Tensor]], mask_TS: torch.Tensor
) -> torch.Tensor:
    """Attend to step 0's keys as the mask allows and to the own chain's later keys; returns [B, T, N*D].

    `chain` holds keys and values of step 0 [B, G, S, D] and of steps 1, 2, … [B, G, T, D], of which the last belongs to
    the query's step. The mask, [T, S] or [B, 1, T, S], is added to the scores of step 0.
    """
    B, N, T, D = query_BNTD.shape
    groups = N // chain[0][0].shape[1]
    keys = [key.repeat_interleave(groups, dim=1) for key, _ in chain]
    values = [value.repeat_interleave(groups, dim=1) for _, value in chain]
    S = keys[0].shape[2]
    scaled_BNTD = query_BNTD * D**-0.5
    scores = (scaled_BNTD @ keys[0].transpose(2, 3)).float() + mask_TS
    own = [(scaled_BNTD * key).sum(-1, keepdim=True).float() for key in keys[1:]]
    weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1).to(values[0].dtype)
    out_BNTD = weights[..., :S] @ values[0]
    for step, value in enumerate(values[1:]):
        out_BNTD = out_BNTD + weights[..., S + step, None] * value
    return out_BNTD.transpose(1, 2).reshape(B, T, N * D)


def shift(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """Move along dim 1 by `by` positions (later if positive), zeros moving in."""
    out = torch.zeros_like(x_BT)
    if by >= x_BT.shape[1] or -by >= x_BT.shape[1]:
        return out
    if by >= 0:
        out[:, by:] = x_BT[:, : x_BT.shape[1] - by]
    else:
        out[:, :by] = x_BT[:, -by:]
    return out
