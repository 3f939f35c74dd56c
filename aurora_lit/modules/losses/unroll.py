"""The draft's chains in training: K steps on its own hidden states, as when serving (EAGLE-3's training-time test).

A chain starts at a root position t, the last whose target hidden states the draft has. At step j it receives token
t + 1 + j and proposes token t + 2 + j.

Source: Li et al., arXiv 2503.01840.

A chain's step costs as much as a position of the trace, so chains run only where the loss needs them. Most of a trace
is a prompt, which has no loss; of its positions only the keys and values are computed.

Leaves out drafting with a KV cache, as serving does (serve/speculation/sources/drafter.py).

Shapes: B traces, T positions, S keys of step 0, K steps, R chains of a trace (padded to the most of any), H
draft hidden size, V target vocabulary, N heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aurora_lit.modules.draft.eagle3 import Eagle3Draft

Embed = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [...] -> embeddings [..., H], on the ids' device."""


def unroll(
    draft: Eagle3Draft,
    *,
    token_ids_BT: torch.Tensor,
    aux_BT3H: torch.Tensor,
    embed: Embed,
    num_steps: int,
    needed_BT: torch.Tensor,
) -> torch.Tensor:
    """Run chains of `num_steps` steps along the tokens of traces.

    Args:
        draft: the draft.
        token_ids_BT: the traces' tokens.
        aux_BT3H: the target's three hidden states.
        embed: the target's input embedding, on the tokens' device.
        num_steps: K.
        needed_BT: bool, the target positions that the caller needs. Chains that reach none of them do not run.

    Returns:
        The draft's hidden states by target position [K, B, T, H]: index m of every step proposes the token after
        position m, and is compared with the target's distribution at position m. 0 at some that are not needed.
    """
    T = token_ids_BT.shape[1]
    draft.extend_positions(T + num_steps)
    embeds_BTH = embed(token_ids_BT)
    features_BTH = draft.combine_hidden_states(aux_BT3H)
    positions_BT = torch.arange(T, device=token_ids_BT.device).expand(len(token_ids_BT), T)
    query, key, value = draft.project_qkv(shift_positions(embeds_BTH, -1), features_BTH, positions_BT)
    root_BR = _chain_roots(needed_BT, num_steps)
    query = query.gather(2, root_BR[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    past_B1RT = _past_mask(root_BR, T)
    chain = [(key, value)]
    hidden_BRH = draft.complete_layer(
        _chain_attention(query, chain, past_B1RT), _gather_positions(features_BTH, root_BR)
    )
    steps = [hidden_BRH]
    for step in range(1, num_steps):
        next_BRH = _gather_positions(embeds_BTH, (root_BR + 1 + step).clamp_max(T - 1))
        query, key, value = draft.project_qkv(next_BRH, hidden_BRH, root_BR + step)
        chain.append((key, value))
        hidden_BRH = draft.complete_layer(_chain_attention(query, chain, past_B1RT), hidden_BRH)
        steps.append(hidden_BRH)
    return torch.stack([_scatter_positions(each, root_BR + 1 + step, T) for step, each in enumerate(steps)])


class StepwiseChains:
    """The same chains, step by step, so that the caller can end some of them between two steps.

    One chain for each needed position, in one flat list over all traces, ordered by trace and position. The list is
    padded to one of few lengths (`_rounded`) with copies of the last chain: matrix products of a new shape cost a
    millisecond and half a megabyte for the code that oneDNN generates.

    Of positions that are not needed only the keys and values are computed, as far as a chain attends to them, and
    without gradient: they are most of a batch, and with a gradient each costs a third of a chain.

    >>> chains = StepwiseChains(draft, token_ids_BT=tokens, aux_BT3H=aux, embed=embedding, needed_BT=needed)
    >>> chains.hidden_MH[: chains.count]        # of step 0
    >>> chains.advance(kept_N)                  # now of step 1, of those chains that are kept
    """

    count: int
    """Chains before the padding."""
    row_M: torch.Tensor
    """int64. Index of each chain's trace."""
    hidden_MH: torch.Tensor
    """Hidden states of the present step."""

    def __init__(
        self,
        draft: Eagle3Draft,
        *,
        token_ids_BT: torch.Tensor,
        aux_BT3H: torch.Tensor,
        embed: Embed,
        needed_BT: torch.Tensor,
    ) -> None:
        """Run step 0. `needed_BT`: bool, its target positions; position 0 has no chain. Others as `unroll`'s."""
        self._draft = draft
        draft.extend_positions(token_ids_BT.shape[1])
        self._embeds_BTH = embed(token_ids_BT)
        is_root_BT = shift_positions(needed_BT, -1)
        row_N, root_N = is_root_BT.nonzero(as_tuple=True)
        self.count = len(row_N)
        padded_M = _padded(torch.arange(self.count, device=row_N.device))
        self.row_M, self._root_M = row_N[padded_M], root_N[padded_M]
        next_MH, before_MH = self._inputs(aux_BT3H, self.row_M, self._root_M)
        # Before the past, which has no gradient: autocast keeps the first copy that it makes of a weight.
        query, key, value = draft.project_qkv(next_MH[None], before_MH[None], self._root_M[None])
        self._root_key_BGTD, self._root_value_BGTD = self._past(
            aux_BT3H, is_root_BT, key[0].transpose(0, 1), value[0].transpose(0, 1)
        )
        self._chain: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values of steps 1, 2, … [M, G, D]."""
        self.step = 0
        self.hidden_MH = draft.complete_layer(self._attend(query[0].transpose(0, 1)), before_MH)

    @property
    def target_M(self) -> torch.Tensor:
        """int64. The position whose next token the present step proposes."""
        return self._root_M + 1 + self.step

    def advance(self, kept_N: torch.Tensor) -> None:
        """Run the next step of the chains that are kept, and end the others.

        `kept_N`: int64 indices below `count`, ascending, at least one.
        """
        draft = self._draft
        self.count = len(kept_N)
        kept_M = _padded(kept_N)
        self.row_M, self._root_M = self.row_M[kept_M], self._root_M[kept_M]
        hidden_MH = self.hidden_MH[kept_M]
        self._chain = [(key[kept_M], value[kept_M]) for key, value in self._chain]
        self.step += 1
        token_MH = self._embeds_BTH[self.row_M, self._root_M + 1 + self.step]
        position_1M = (self._root_M + self.step)[None]
        query, key, value = draft.project_qkv(token_MH[None], hidden_MH[None], position_1M)
        self._chain.append((key[0].transpose(0, 1), value[0].transpose(0, 1)))
        self.hidden_MH = draft.complete_layer(self._attend(query[0].transpose(0, 1)), hidden_MH)

    def _inputs(
        self, aux_BT3H: torch.Tensor, row_X: torch.Tensor, position_X: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What step 0 reads at some positions [X, H]: the next token, embedded, and the target's hidden states."""
        next_X = (position_X + 1).clamp_max(self._embeds_BTH.shape[1] - 1)
        return self._embeds_BTH[row_X, next_X], self._draft.combine_hidden_states(aux_BT3H[row_X, position_X])

    def _past(
        self, aux_BT3H: torch.Tensor, is_root_BT: torch.Tensor, key_MGD: torch.Tensor, value_MGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of step 0 [B, G, T, D]: the given ones of roots, and those of other positions before them."""
        B, T = is_root_BT.shape
        precedes_root_BT = is_root_BT.flip(1).cummax(1).values.flip(1)
        row_C, position_C = (precedes_root_BT & ~is_root_BT).nonzero(as_tuple=True)
        places = [(self.row_M * T + self._root_M)[: self.count]]
        parts = [(key_MGD[: self.count], value_MGD[: self.count])]
        if len(row_C):
            padded_C = _padded(torch.arange(len(row_C), device=row_C.device))
            with torch.no_grad():
                next_CH, input_CH = self._inputs(aux_BT3H, row_C[padded_C], position_C[padded_C])
                key, value = self._draft.project_kv(next_CH[None], input_CH[None], position_C[padded_C][None])
            places.append(row_C * T + position_C)
            parts.append((key[0].transpose(0, 1)[: len(row_C)], value[0].transpose(0, 1)[: len(row_C)]))
        place_P = torch.cat(places)

        def by_trace(x_PGD: torch.Tensor) -> torch.Tensor:
            G, D = x_PGD.shape[1:]
            return x_PGD.new_zeros(B * T, G, D).index_copy(0, place_P, x_PGD).view(B, T, G, D).transpose(1, 2)

        keys, values = zip(*parts, strict=True)
        return by_trace(torch.cat(keys)), by_trace(torch.cat(values))

    def _attend(self, query_MND: torch.Tensor) -> torch.Tensor:
        """Attention of the present step [M, N·D], in fp32 at least; here the chains of a trace lie side by side."""
        B, _, T, _ = self._root_key_BGTD.shape
        dtype = torch.promote_types(query_MND.dtype, torch.float32)
        rows = _RowsOfTraces(self.row_M[: self.count], num_traces=B)

        def by_trace(x_MXD: torch.Tensor) -> torch.Tensor:
            """[M, X, D] → [B, X, R, D]."""
            return rows.by_trace(x_MXD[: self.count].to(dtype)).transpose(1, 2)

        past_B1RT = _past_mask(rows.by_trace(self._root_M[: self.count]), T)
        # Not in bf16: these shapes differ from batch to batch.
        with torch.autocast(query_MND.device.type, enabled=False):
            chain = [(self._root_key_BGTD.to(dtype), self._root_value_BGTD.to(dtype))]
            chain += [(by_trace(key), by_trace(value)) for key, value in self._chain]
            attended_BRC = _chain_attention(by_trace(query_MND), chain, past_B1RT)
        return attended_BRC.flatten(0, 1)[_padded(rows.place_N)].to(query_MND.dtype)


class _RowsOfTraces:
    """Rows that belong to traces, laid side by side by trace, so that those of a trace share its keys."""

    def __init__(self, trace_N: torch.Tensor, *, num_traces: int) -> None:
        """trace_N: int64, the trace of each row, in any order."""
        count_B = torch.bincount(trace_N, minlength=num_traces)
        order_N = trace_N.argsort(stable=True)
        rank_N = torch.empty_like(trace_N)
        first_N = (count_B.cumsum(0) - count_B)[trace_N[order_N]]
        rank_N[order_N] = torch.arange(len(trace_N), device=trace_N.device) - first_N
        self._shape = (num_traces, int(count_B.max()))
        self.place_N = trace_N * self._shape[1] + rank_N
        """Of each row, in [B, R] flattened."""

    def by_trace(self, x_N: torch.Tensor) -> torch.Tensor:
        """[N, …] → [B, R, …], with zeros where a trace has fewer rows."""
        B, R = self._shape
        return x_N.new_zeros(B * R, *x_N.shape[1:]).index_copy(0, self.place_N, x_N).view(B, R, *x_N.shape[1:])


def _past_mask(root_BR: torch.Tensor, T: int) -> torch.Tensor:
    """Added to the scores of step 0 [B, 1, R, T]: a chain attends to the positions up to its root."""
    is_later_BRT = torch.arange(T, device=root_BR.device) > root_BR[..., None]
    return torch.zeros(*root_BR.shape, T, device=root_BR.device).masked_fill(is_later_BRT, float("-inf"))[:, None]


def _padded(index_N: torch.Tensor) -> torch.Tensor:
    """Indices with copies of the last one, as many as `_rounded` asks for."""
    return torch.cat([index_N, index_N[-1:].expand(_rounded(len(index_N)) - len(index_N))])


def _rounded(count: int) -> int:
    """The next of few numbers: 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, …"""
    if count > 256:
        return -(-count // 64) * 64
    size = 16
    while size < count:
        if size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size


def _chain_roots(needed_BT: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Roots of the chains that reach needed target positions [B, R], ascending; traces with fewer are given others."""
    is_root_BT = torch.stack([shift_positions(needed_BT, -(1 + step)) for step in range(num_steps)]).any(0)
    most = max(1, int(is_root_BT.sum(1).max()))
    return is_root_BT.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values


def _gather_positions(x_BTH: torch.Tensor, index_BR: torch.Tensor) -> torch.Tensor:
    return x_BTH.gather(1, index_BR[..., None].expand(-1, -1, x_BTH.shape[2]))


def _scatter_positions(x_BRH: torch.Tensor, index_BR: torch.Tensor, T: int) -> torch.Tensor:
    """The inverse: [B, T, H] with the given positions, zeros elsewhere; positions ≥ T are dropped."""
    B, R, H = x_BRH.shape
    # Position T of each trace collects what is dropped.
    index_N = (index_BR.clamp_max(T) + torch.arange(B, device=index_BR.device)[:, None] * (T + 1)).flatten()
    out_NH = x_BRH.new_zeros(B * (T + 1), H).index_copy(0, index_N, x_BRH.reshape(B * R, H))
    return out_NH.view(B, T + 1, H)[:, :T]


def _chain_attention(
    query_BNTD: torch.Tensor, chain: list[tuple[torch.Tensor, torch.Tensor]], mask_TS: torch.Tensor
) -> torch.Tensor:
    """Attention of one step of every chain: over the keys of step 0, masked, and its own chain's later keys.

    Args:
        query_BNTD: one query for each chain.
        chain: keys and values of step 0 [B, G, S, D] and of steps 1, 2, … [B, G, T, D]; the last are of the query's
            own step.
        mask_TS: added to the scores of step 0; [T, S] or [B, 1, T, S].

    Returns:
        [B, T, N·D].
    """
    B, N, T, D = query_BNTD.shape
    groups = N // chain[0][0].shape[1]
    keys = [key.repeat_interleave(groups, dim=1) for key, _ in chain]
    values = [value.repeat_interleave(groups, dim=1) for _, value in chain]
    S = keys[0].shape[2]
    scaled_BNTD = query_BNTD * D**-0.5
    scores = (scaled_BNTD @ keys[0].transpose(2, 3)).float() + mask_TS
    own_scores = [(scaled_BNTD * key).sum(-1, keepdim=True).float() for key in keys[1:]]
    weights = torch.softmax(torch.cat([scores, *own_scores], dim=-1), dim=-1).to(values[0].dtype)
    out_BNTD = weights[..., :S] @ values[0]
    for step, value in enumerate(values[1:]):
        out_BNTD = out_BNTD + weights[..., S + step, None] * value
    return out_BNTD.transpose(1, 2).reshape(B, T, N * D)


def shift_positions(x_BT: torch.Tensor, by: int) -> torch.Tensor:
    """Move [B, T, …] along dim 1 by `by` positions, to later ones if positive; zeros move in."""
    out = torch.zeros_like(x_BT)
    if by >= x_BT.shape[1] or -by >= x_BT.shape[1]:
        return out
    if by >= 0:
        out[:, by:] = x_BT[:, : x_BT.shape[1] - by]
    else:
        out[:, :by] = x_BT[:, -by:]
    return out
