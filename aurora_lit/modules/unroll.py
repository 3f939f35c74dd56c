"""The draft's chains in training: K steps on its own hidden states, as in serving (EAGLE-3's training-time test).

A chain is named by its root position t, the draft's last position with true features: at step j the draft holds the
chain's token j and proposes token j + 1. `unroll` runs a chain from every position along the committed tokens;
`unroll_rounds` runs the chains that were served, along what was proposed there, accepted or not.

Source: Li et al., arXiv 2503.01840. What is left out: serving's chain, which has a cache (serve/drafting.py).

Shapes: B rows, T positions, S step-0 keys, K steps, Q rounds, R most rounds of a row, H hidden, V target vocabulary,
N heads, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aurora_lit.modules.draft import Draft


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
    draft: Draft, *, token_ids_BT: torch.Tensor, aux_BT3H: torch.Tensor, embedding_VH: torch.Tensor, num_steps: int
) -> Unrolled:
    """K steps from every position: at step j, root t holds token t + 1 + j and proposes token t + 2 + j."""
    B, T = token_ids_BT.shape
    device = token_ids_BT.device
    embeds_BTH = nn.functional.embedding(token_ids_BT, embedding_VH)
    causal_TT = torch.full((T, T), float("-inf"), device=device).triu(1)
    hidden_BTH = draft.fuse(aux_BT3H)
    chain: list[tuple[torch.Tensor, torch.Tensor]] = []
    steps: list[torch.Tensor] = []
    shifted: list[torch.Tensor] = []
    for step in range(num_steps):
        positions_BT = (torch.arange(T, device=device) + step).expand(B, T)
        query, key, value = draft.project(shift(embeds_BTH, -(1 + step)), hidden_BTH, positions_BT)
        chain.append((key, value))
        hidden_BTH = draft.finish(_chain_attention(query, chain, causal_TT), hidden_BTH)
        steps.append(hidden_BTH)
        shifted.append(shift(hidden_BTH, 1 + step))
    return Unrolled(
        hidden_KBTH=torch.stack(shifted),
        first_BTH=steps[0],
        first_key_BGTD=chain[0][0],
        first_value_BGTD=chain[0][1],
    )


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
