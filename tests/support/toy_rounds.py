"""Rounds over texts of a tiny model, as a learner would collate them, and a draft's distributions along them.

batch = rounds(target, ids_BT, [(row, root, proposals), …], verified="own_draw")
logq_QKD = chain_logprobs(module, batch)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aurora_lit.models.interface import Target
from aurora_lit.modules.losses.batch import OnlineBatch, Rounds
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.unroll import StepwiseChains, unroll_rounds
from support.tiny_models import draft_batch

VERIFIED = {"argmax": 0.0, "own_draw": 0.4}
"""How the target chooses its own token, and the temperature of such requests."""


@torch.no_grad()
def rounds(
    target: Target,
    ids_BT: Tensor,
    proposed: Sequence[tuple[int, int, Sequence[int]]],
    *,
    verified: str,
    behaviour: Sequence[Sequence[float]] | None = None,
    draft_temperature: float = 1.0,
    accepted: Sequence[int] | None = None,
) -> OnlineBatch:
    """A batch of rounds (row, root, proposals) over some texts; `behaviour`: log-probabilities, default 0."""
    temperature = VERIFIED[verified]
    traces = draft_batch(target, ids_BT)
    Q, K = len(proposed), max((len(path) for _, _, path in proposed), default=1)
    proposal_QK = torch.full((Q, K), -1)
    behaviour_QK = torch.full((Q, K), float("nan"))
    last_QKH, lse_QK = torch.zeros(Q, K, traces.last_BTH.shape[-1]), torch.zeros(Q, K)
    top_QK = torch.full((Q, K), -1)
    for q, (row, root, path) in enumerate(proposed):
        n = len(path)
        proposal_QK[q, :n] = torch.tensor(path)
        behaviour_QK[q, :n] = torch.tensor(behaviour[q]) if behaviour else 0.0
        _, last_1TH = target.in_torch.forward_uncached(torch.cat([ids_BT[row, : root + 1], proposal_QK[q, :n]])[None])
        last_QKH[q, :n] = last_1TH[0, root : root + n]
        logits = target.logits(last_QKH[q, :n])
        lse_QK[q, :n] = (logits / (temperature or 1.0)).logsumexp(-1)
        top_QK[q, :n] = logits.argmax(-1)
    return OnlineBatch(
        traces=traces,
        live_B=torch.ones(len(ids_BT), dtype=torch.bool),
        rounds=Rounds(
            row_Q=torch.tensor([row for row, _, _ in proposed], dtype=torch.int64),
            root_Q=torch.tensor([root for _, root, _ in proposed], dtype=torch.int64),
            proposal_QK=proposal_QK,
            num_proposed_Q=torch.tensor([len(path) for _, _, path in proposed], dtype=torch.int64),
            num_accepted_Q=torch.tensor(accepted or [0] * Q, dtype=torch.int64),
            behaviour_logprob_QK=behaviour_QK,
            temperature_Q=torch.full((Q,), temperature),
            draft_temperature_Q=torch.full((Q,), draft_temperature),
            path_last_QKH=last_QKH,
            path_lse_QK=lse_QK,
            path_top_QK=top_QK,
            fresh_Q=torch.ones(Q, dtype=torch.bool),
        ),
    )


def chain_states(module: DraftModule, batch: OnlineBatch) -> Tensor:
    """The draft's hidden states at every proposal, along the proposed paths [Q, K, H]."""
    traces = batch.traces
    chains = StepwiseChains(
        module.draft,
        token_ids_BT=traces.token_ids_BT,
        aux_BT3H=traces.aux_BT3H,
        embedding_VH=module.embedding_VH,
        needed_BT=torch.ones_like(traces.token_ids_BT, dtype=torch.bool),
    )
    return unroll_rounds(
        module.draft,
        chains.root_states(),
        row_Q=batch.rounds.row_Q,
        root_Q=batch.rounds.root_Q,
        proposal_QK=batch.rounds.proposal_QK,
        embedding_VH=module.embedding_VH,
    )


def chain_logprobs(module: DraftModule, batch: OnlineBatch) -> Tensor:
    """log q over the draft vocabulary at every proposal [Q, K, D], at the rounds' draft temperature."""
    logits_QKD = module.draft.compute_logits(chain_states(module, batch))
    return torch.log_softmax(logits_QKD / batch.rounds.draft_temperature_Q[:, None, None], -1)


def some_rounds(batch: OnlineBatch, index: list[int]) -> OnlineBatch:
    """The batch with some of its rounds, in this order; an index may be repeated."""
    return replace(batch, rounds=batch.rounds.select(torch.tensor(index, dtype=torch.int64)))
