"""The native draft steps agree with the draft's own modules: chains, trees and prefill, in both weight formats."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from support.tiny_models import VOCAB, random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.modules.sampling.noise import draw
from aurora_lit.request import SamplingParams
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.planner import extends_chain

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
        inputs = sequences.grow(lengths)
        drafted = [
            drafter.propose(inputs, options=options, num_steps=5, min_gains=stop_after_levels(stop_after, 5))
            for drafter in sequences.drafters
        ]
        (proposals, value_KB), (expected, expected_value_KB) = drafted
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(proposals.token_BK[compared], expected.token_BK[compared])
        assert proposals.token_BK.shape == (3, min(5, stop_after))
        assert proposals.q_BKD is None
        assert proposals.num_proposed_B.tolist() == [min(5, stop_after)] * 3
        torch.testing.assert_close(value_KB[:, compared], expected_value_KB[:, compared], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_native_sampled_chain_equals_the_modules_chain(target: Target) -> None:
    """Sequences at two temperatures and a greedy one, with the same uniform numbers."""
    sequences = GrowingSequences(target, num_drafters=2)
    sequences.drafters[1]._runtime_draft = replace(sequences.drafters[1]._runtime_draft, steps=None)
    params = [SamplingParams(max_tokens=1, temperature=t) for t in (1.0, 0.0, 0.4)]
    options, rng = LogitOptions.from_params(params), torch.Generator().manual_seed(5)
    for lengths in (*ROUNDS, [14, 123, 10], [15, 124, 11]):
        inputs = sequences.grow(lengths)
        uniform_BK = torch.rand(3, 5, dtype=torch.float64, generator=rng)
        (proposals, value_KB), (expected, expected_value_KB) = (
            drafter.propose(inputs, options=options, num_steps=5, uniform_BK=uniform_BK)
            for drafter in sequences.drafters
        )
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(proposals.token_BK[compared], expected.token_BK[compared])
        torch.testing.assert_close(value_KB[:, compared], expected_value_KB[:, compared], atol=1e-4, rtol=1e-4)
        assert proposals.q_BKD is not None
        assert expected.q_BKD is not None
        for b in range(0, num_comparable(lengths), 2):  # the second is greedy
            torch.testing.assert_close(proposals.q_BKD[b], expected.q_BKD[b], atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("draft_vocab_size", [1, 31, 32, 50, 58])
def test_a_native_draw_follows_the_distribution_that_is_returned(target: Target, draft_vocab_size: int) -> None:
    """At uniform numbers from 0 to just below 1, the token is where the cumulative distribution passes the number."""
    count = 64
    tokens_SL = torch.randint(0, VOCAB, (count, 9), generator=torch.Generator().manual_seed(2))
    drafter = Drafter(random_draft(target, draft_vocab_size=draft_vocab_size), target, tokens_SL=tokens_SL, capacity=8)
    drafter.features_SLF.normal_()
    options = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=2.0)] * count)
    uniform_B1 = torch.linspace(0, 1 - 2**-53, count, dtype=torch.float64)[:, None]
    proposals, _ = drafter.propose(
        DraftInputs(slots_B=torch.arange(count), lengths=[5] * count),
        options=options,
        num_steps=1,
        uniform_BK=uniform_B1,
    )
    assert proposals.q_BKD is not None
    drawn_B = drafter.vocabulary.draft_id_V[proposals.token_BK[:, 0]]
    assert torch.equal(drawn_B, draw(proposals.q_BKD[:, 0], uniform_B1[:, 0]))
    assert len(set(drawn_B.tolist())) > draft_vocab_size // 3


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 4])
def test_native_drafting_ends_where_the_rule_says(target: Target, width: int) -> None:
    """With random tables: after the first level whose successor promises too few tokens by the recorded outcomes."""
    rng, ends = random.Random(width), set()
    sequences, draft = GrowingSequences(target, num_drafters=0), random_draft(target)
    draft.value_head.bias.fill_(4.0)  # expects long chains, so that all levels may be reached
    drafter = Drafter(draft, target, tokens_SL=sequences.tokens_SL, capacity=CAPACITY)
    sequences.drafters.append(drafter)
    inputs = sequences.grow(ROUNDS[0])
    options = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=0.0)] * 3)

    def outcomes(min_gains: list[float] | None, level_rates: list[float]) -> torch.Tensor:
        drafter._num_cached = [0] * len(drafter._num_cached)
        if width == 1:
            return drafter.propose(inputs, options=options, num_steps=6, min_gains=min_gains)[1]
        levels = {"num_steps": 6, "num_nodes": 15, "min_gains": min_gains, "level_rates": level_rates}
        return drafter.propose_tree(inputs, **levels)[1]  # type: ignore[arg-type]

    everything_JB = outcomes(None, [])
    assert len(everything_JB) == 6
    for _ in range(200):
        min_gains, level_rates = [1.5 * rng.random() ** 8 for _ in range(5)], [rng.random() for _ in range(3)]
        survival, levels = [1.0] * 3, 1
        for outcome_B, min_gain in zip(everything_JB.tolist(), min_gains, strict=False):
            promised = sum(outcome * rate for outcome, rate in zip(outcome_B, level_rates, strict=True))
            if not (extends_chain(outcome_B, survival, min_gain) if width == 1 else promised > min_gain):
                break
            levels += 1
        ended_JB = outcomes(min_gains, level_rates)
        assert len(ended_JB) == levels
        assert torch.equal(ended_JB, everything_JB[:levels])
        ends.add(levels)
    assert len(ends) > 3, "the tables must end drafting at different levels"


@torch.no_grad()
@pytest.mark.skipif(not native.has_int8_tiles(), reason="drafts of other formats have no copy in four bits")
def test_a_chain_that_reads_the_heads_copy_first_proposes_what_the_head_does(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """One sequence reads the copy, eight do not. Where they differ, the head has hardly a preference."""
    vocab, count = 4000, 8
    folder = save_model("llama", tmp_path_factory.mktemp("wide"), vocab_size=vocab)
    target = Target.load(folder, precision="bf16")
    tokens_SL = torch.randint(0, vocab, (count, 9), generator=torch.Generator().manual_seed(2))
    drafter = Drafter(random_draft(target, draft_vocab_size=vocab - 3), target, tokens_SL=tokens_SL, capacity=8)
    options = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=0.0)] * count)
    one = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=0.0)])
    same = 0
    for _ in range(25):
        drafter.features_SLF.normal_()
        drafter._num_cached = [0] * count
        together = DraftInputs(slots_B=torch.arange(count), lengths=[5] * count)
        token_BK = drafter.propose(together, options=options, num_steps=1)[0].token_BK
        drafter._num_cached = [0] * count
        normed_BH = drafter.draft.norm(drafter.prefill(together))
        logits_BD = drafter.draft.lm_head(normed_BH)
        for b in range(count):
            drafter._num_cached = [0] * count
            alone = DraftInputs(slots_B=torch.tensor([b]), lengths=[5])
            token = drafter.propose(alone, options=one, num_steps=1)[0].token_BK[0, 0]
            same += int(token == token_BK[b, 0])
            logit = logits_BD[b, drafter.vocabulary.draft_id_V[token]]
            assert logit > logits_BD[b].max() - logits_BD[b].std()
    assert same > 0.9 * 25 * count


def stop_after_levels(levels: int, most: int) -> list[float]:
    """What levels must promise so that exactly these are drafted."""
    return [-math.inf if done < levels else math.inf for done in range(1, most)]


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
        inputs = sequences.grow(lengths)
        proposals, reach_JB = native_drafter.propose_tree(
            inputs,
            num_steps=8,
            num_nodes=nodes,
            min_gains=stop_after_levels(levels, 8),
            level_rates=[1.0] * 3,
        )
        assert len(reach_JB) == levels
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
            assert reach_JB[:, b].tolist() == pytest.approx(expected_reach, rel=1e-4)


@torch.no_grad()
def test_proposals_do_not_depend_on_an_earlier_tree_in_the_cache(target: Target) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    for lengths in ROUNDS:
        inputs = sequences.grow(lengths)
        proposals = []
        for drafter, has_earlier_tree in zip(sequences.drafters, (True, False), strict=True):
            if has_earlier_tree:
                drafter.propose_tree(inputs, num_steps=4, num_nodes=31)
                drafter._num_cached = [max(0, num_cached - 1) for num_cached in drafter._num_cached]
            proposals.append(drafter.propose_tree(inputs, num_steps=3, num_nodes=15)[0])
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
