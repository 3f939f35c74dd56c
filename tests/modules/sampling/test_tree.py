"""Draft trees: their paths and depths, and verification of a batch of trees against plain decoding."""

from __future__ import annotations

import random

import pytest
import torch

from aurora_lit.modules.sampling.distribution import History, LogitOptions
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.tree import accepted_path, common_prefix_length, depths, first_choices
from aurora_lit.modules.sampling.verification import verify
from aurora_lit.request import SamplingParams
from aurora_lit.serve.sequences.sequence import verified_tokens

VOCAB = 11


def test_first_choices_depths_and_paths() -> None:
    parents = [0, 0, 2, 1, 1]  # columns 1 and 2 follow the root; 3 follows 2; 4 and 5 follow 1
    assert first_choices(parents) == [1, 4]
    assert depths(parents) == [0, 1, 1, 2, 2, 2]
    tokens = [5, 7, 8, 8, 9]
    assert accepted_path(tokens, parents, [5, 9, 0, 0, 0, 0]) == [1, 5]
    assert accepted_path(tokens, parents, [7, 9, 8, 0, 0, 0]) == [2, 3]
    assert accepted_path(tokens, parents, [3, 9, 8, 0, 0, 0]) == []
    assert first_choices([]) == accepted_path([], [], [4]) == []
    assert common_prefix_length([1, 2, 3], [1, 2]) == 2
    assert common_prefix_length([1, 2], [3]) == 0


@pytest.mark.parametrize("trial", range(20))
def test_a_tree_emits_the_targets_own_tokens_along_its_accepted_path(trial: int) -> None:
    """Greedy and seeded sequences in one batch, against a chain of the target's own tokens, for random trees."""
    rng, gen = random.Random(trial), torch.Generator().manual_seed(trial)
    params = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=9, temperature=0.9, seed=trial, top_k=5),
        SamplingParams(max_tokens=9, temperature=0.0, logit_bias={3: 1.5}),
        SamplingParams(max_tokens=9, temperature=1.0),  # unseeded: has no proposals in a batch of trees
    ]
    B, K = len(params), 12
    after = torch.randn(B, K + 2, VOCAB, generator=gen)  # logits by depth, the same on every path
    parent_BK = torch.tensor([[rng.randrange(c) if rng.random() < 0.5 else c - 1 for c in range(1, K + 1)]] * B)
    depth_BT = torch.tensor([depths(parents) for parents in parent_BK.tolist()])
    history = History(
        token_BL=torch.zeros(B, 4, dtype=torch.int64),
        prompt_length_B=torch.tensor([2] * B),
        length_B=torch.tensor([4] * B),
    )
    options = LogitOptions.from_params(params)

    def emitted_by(proposals: Proposals, logits_BTV: torch.Tensor) -> list[list[int]]:
        uniform = torch.full(logits_BTV.shape[:2], 0.5, dtype=torch.float64)
        result = verify(logits_BTV, options=options, proposals=proposals, uniform_BT=uniform, history=history)
        return [verified.tokens for verified in verified_tokens(proposals, result)]

    target_tokens: list[list[int]] = [[] for _ in params]
    for depth in range(K):  # plain decoding: the target's own token at each depth
        chain = Proposals(
            token_BK=torch.tensor([(own + [0] * K)[:K] for own in target_tokens]),
            num_proposed_B=torch.tensor([depth] * B),
            q_BKD=None,
        )
        for own, tokens in zip(target_tokens, emitted_by(chain, after[:, : K + 1]), strict=True):
            own.append(tokens[depth] if len(tokens) > depth else tokens[-1])
    token_BK = torch.zeros(B, K, dtype=torch.int64)
    for b in range(B):
        for c in range(K):
            correct = target_tokens[b][int(depth_BT[b, c])]
            token_BK[b, c] = correct if rng.random() < 0.7 else (correct + 1 + c) % VOCAB
    num_proposed_B = torch.tensor([K, K, 7, 0])
    proposals = Proposals(token_BK=token_BK, num_proposed_B=num_proposed_B, q_BKD=None, parent_BK=parent_BK)
    logits_BTV = after[torch.arange(B)[:, None], depth_BT]
    emitted = emitted_by(proposals, logits_BTV)
    for b in range(B):
        path = accepted_path(
            token_BK[b, : num_proposed_B[b]].tolist(),
            parent_BK[b, : num_proposed_B[b]].tolist(),
            [target_tokens[b][d] for d in depth_BT[b].clamp_max(K - 1).tolist()],
        )
        assert emitted[b] == target_tokens[b][: len(path) + 1]
    assert len(emitted[3]) == 1
