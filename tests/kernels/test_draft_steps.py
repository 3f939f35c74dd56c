"""The native draft steps agree with the draft's own modules: chains, trees and prefill, in both weight formats."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from support.tiny_models import VOCAB, random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.request import SamplingParams
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

CAPACITY = 130
SLOTS = torch.tensor([4, 1, 2])
ROUNDS = ([9, 120, 1], [12, 121, 4], [13, 122, 9])
"""Lengths of three sequences in each round, with many or few uncached positions; one begins with a single token."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.load(save_model("llama", tmp_path_factory.mktemp("llama")), precision=request.param)


class GrowingSequences:
    """Three sequences that grow, and several drafters with copies of one draft that all see them."""

    def __init__(self, target: Target, *, num_drafters: int) -> None:
        self.target, self.ids_BT = target, torch.randint(0, VOCAB, (3, 130), generator=torch.Generator().manual_seed(1))
        self.features_BTF, _ = target.forward_uncached(self.ids_BT)
        self.tokens_SL = torch.zeros(5, CAPACITY + 1, dtype=torch.int64)
        draft = random_draft(target)
        self.drafters = [
            Drafter(copy.deepcopy(draft), target, tokens_SL=self.tokens_SL, capacity=CAPACITY)
            for _ in range(num_drafters)
        ]
        self.num_features = [0, 0, 0]

    def grow(self, lengths: list[int]) -> DraftInputs:
        for sequence, length in enumerate(lengths):
            start, slots_B = self.num_features[sequence], SLOTS[sequence : sequence + 1]
            self.tokens_SL[slots_B[0], :length] = self.ids_BT[sequence, :length]
            new = self.features_BTF[sequence : sequence + 1, start : length - 1]
            for drafter in self.drafters:
                drafter.store_features(slots_B=slots_B, starts_B=torch.tensor([start]), aux_BT3H=new)
            self.num_features[sequence] = length - 1
        return DraftInputs(slots_B=SLOTS, lengths=list(lengths))


def num_comparable(lengths: list[int]) -> int:
    """Without the last sequence while it has one token: it has no features, so its proposals are arbitrary."""
    return 3 if lengths[2] > 1 else 2


@torch.no_grad()
@pytest.mark.parametrize("stop_after", [1, 3, 9])
def test_a_native_chain_equals_the_modules_chain(target: Target, stop_after: int) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    native_drafter, module_drafter = sequences.drafters
    module_drafter._runtime_draft = replace(module_drafter._runtime_draft, steps=None)
    assert native_drafter.supports_trees
    assert not module_drafter.supports_trees
    options = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=0.0)] * 3)
    for lengths in ROUNDS:
        inputs, values, proposals = sequences.grow(lengths), [], []
        for drafter in sequences.drafters:
            seen: list[torch.Tensor] = []

            def should_continue(done: int, values_B: torch.Tensor, seen: list[torch.Tensor] = seen) -> bool:
                seen.append(values_B.clone())
                return done < stop_after

            uniform_BK = torch.zeros(3, 5, dtype=torch.float64)
            proposals.append(
                drafter.propose(
                    inputs, options=options, num_steps=5, uniform_BK=uniform_BK, should_continue=should_continue
                )
            )
            values.append(torch.stack(seen))
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(proposals[0].token_BK[compared], proposals[1].token_BK[compared])
        assert proposals[0].token_BK.shape == (3, min(5, stop_after))
        assert proposals[0].q_BKD is None
        assert proposals[0].num_proposed_B.tolist() == [min(5, stop_after)] * 3
        torch.testing.assert_close(values[0][:, compared], values[1][:, compared], atol=1e-4, rtol=1e-4)


@dataclass(kw_only=True)
class ReferenceTree:
    """A growing draft tree (modules/sampling/tree.py), written down directly from the paper."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.parents[node]), self.tokens[node]]

    def best(self, count: int, *, start: int = 0) -> list[int]:
        return sorted(range(start, len(self.tokens)), key=lambda i: -self.logprobs[i])[:count]


def reference_tree(
    drafter: Drafter, root_1H: torch.Tensor, slots_B: torch.Tensor, start_B: torch.Tensor, *, levels: int, width: int
) -> tuple[ReferenceTree, list[float]]:
    """The tree with each node's state computed by its own chain from the root; and each level's reach probability."""
    tree, level, reaches = ReferenceTree(), [-1], []
    for _ in range(levels):
        grown = len(tree.tokens)
        for node in level:
            hidden_1H = root_1H
            for step, token in enumerate(tree.path(node)):
                hidden_1H = drafter.forward(torch.tensor([[token]]), hidden_1H[None], slots_B, start_B + step)[:, 0]
            top = drafter.draft.compute_logits(hidden_1H)[0].log_softmax(-1).topk(width)
            tree.tokens += drafter.vocabulary.target_id_D[top.indices].tolist()
            tree.parents += [node] * width
            tree.logprobs += [(tree.logprobs[node] if node >= 0 else 0.0) + x for x in top.values.tolist()]
        level = tree.best(width, start=grown)
        reaches.append(sum(torch.tensor(tree.logprobs)[level].exp().tolist()))
    return tree, reaches


@torch.no_grad()
@pytest.mark.parametrize(("levels", "nodes"), [(1, 3), (2, 3), (3, 15), (4, 15), (2, 31), (5, 31)])
def test_a_native_tree_equals_the_reference_tree(target: Target, levels: int, nodes: int) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    native_drafter, reference_drafter = sequences.drafters
    width = min(4, nodes)
    for lengths in ROUNDS:
        inputs, reaches = sequences.grow(lengths), []

        def should_continue(done: int, reach_B: list[float], reaches: list[list[float]] = reaches) -> bool:
            reaches.append(reach_B)
            return done < levels

        proposals, done = native_drafter.propose_tree(
            inputs, num_steps=8, num_nodes=nodes, should_continue=should_continue
        )
        assert done == levels == len(reaches)
        assert proposals.parent_BK is not None
        roots_BH = reference_drafter.prefill(inputs)
        for b in range(num_comparable(lengths)):
            sequence = (roots_BH[b : b + 1], SLOTS[b : b + 1], torch.tensor([lengths[b] - 1]))
            tree, expected_reach = reference_tree(reference_drafter, *sequence, levels=levels, width=width)
            kept = sorted(tree.best(nodes))
            assert proposals.token_BK[b].tolist() == [tree.tokens[i] for i in kept]
            assert proposals.parent_BK[b].tolist() == [
                kept.index(tree.parents[i]) + 1 if tree.parents[i] >= 0 else 0 for i in kept
            ]
            assert [reach_B[b] for reach_B in reaches] == pytest.approx(expected_reach, rel=1e-4)


@torch.no_grad()
def test_proposals_do_not_depend_on_an_earlier_tree_in_the_cache(target: Target) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    for lengths in ROUNDS:
        inputs = sequences.grow(lengths)
        proposals = []
        for drafter, has_earlier_tree in zip(sequences.drafters, (True, False), strict=True):
            if has_earlier_tree:
                drafter.propose_tree(inputs, num_steps=4, num_nodes=31, should_continue=lambda *_: True)
                drafter._num_cached = [max(0, num_cached - 1) for num_cached in drafter._num_cached]
            proposals.append(
                drafter.propose_tree(inputs, num_steps=3, num_nodes=15, should_continue=lambda *_: True)[0]
            )
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(proposals[0].token_BK[compared], proposals[1].token_BK[compared])


def test_no_native_steps_with_an_embedding_that_is_not_a_plain_table(target: Target) -> None:
    class Scaled(torch.nn.Embedding):
        pass

    embedding = target.embedding
    scaled = Scaled(*embedding.weight.shape, _weight=embedding.weight)  # type: ignore[misc,arg-type]
    target.model.set_input_embeddings(scaled)  # type: ignore[no-untyped-call]
    try:
        assert not GrowingSequences(target, num_drafters=1).drafters[0].supports_trees
    finally:
        target.model.set_input_embeddings(embedding)  # type: ignore[no-untyped-call]
