"""Native drafting steps against the draft's own modules: chains, trees, catching up, in every kind of weights."""

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
from aurora_lit.serve.speculation.draft_tree import propose_tree
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

CAPACITY = 130
SLOTS = torch.tensor([4, 1, 2])
ROUNDS = ([9, 120, 1], [12, 121, 4], [13, 122, 9])
"""Rows far behind and hardly behind; one of a single token."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.load(save_model("llama", tmp_path_factory.mktemp("llama")), precision=request.param)


class Traffic:
    """Requests that grow, and drafters that follow them."""

    def __init__(self, target: Target, *, num: int) -> None:
        self.target, self.ids_BT = target, torch.randint(0, VOCAB, (3, 130), generator=torch.Generator().manual_seed(1))
        self.features_BTF, _ = target.read(self.ids_BT)
        self.tokens_SL = torch.zeros(5, CAPACITY + 1, dtype=torch.int64)
        draft = random_draft(target)
        self.drafters = [
            Drafter(copy.deepcopy(draft), target, tokens_SL=self.tokens_SL, capacity=CAPACITY) for _ in range(num)
        ]
        self.known = [0, 0, 0]

    def grow(self, lengths: list[int]) -> DraftInputs:
        for row, length in enumerate(lengths):
            self.tokens_SL[SLOTS[row], :length] = self.ids_BT[row, :length]
            new = self.features_BTF[row : row + 1, self.known[row] : length - 1]
            for drafter in self.drafters:
                drafter.remember(slots_B=SLOTS[row : row + 1], starts_B=torch.tensor([self.known[row]]), aux_BT3H=new)
            self.known[row] = length - 1
        return DraftInputs(slots_B=SLOTS, lengths=list(lengths))


@torch.no_grad()
@pytest.mark.parametrize("stop_after", [1, 3, 9])
def test_a_native_chain_is_the_modules_chain(target: Target, stop_after: int) -> None:
    traffic = Traffic(target, num=2)
    ours, plain = traffic.drafters
    plain._fitted = replace(plain._fitted, steps=None)
    assert ours.can_branch
    assert not plain.can_branch
    options = LogitOptions.of([SamplingParams(max_tokens=1, temperature=0.0)] * 3)
    for lengths in ROUNDS:
        rows, values, proposals = traffic.grow(lengths), [], []
        for drafter in traffic.drafters:
            seen: list[torch.Tensor] = []

            def go_on(done: int, values_B: torch.Tensor, seen: list[torch.Tensor] = seen) -> bool:
                seen.append(values_B.clone())
                return done < stop_after

            uniform_BK = torch.zeros(3, 5, dtype=torch.float64)
            proposals.append(drafter.propose(rows, options=options, num_steps=5, uniform_BK=uniform_BK, go_on=go_on))
            values.append(torch.stack(seen))
        told = lengths[2] > 1  # a row of one token has no feature to draft from
        held = slice(0, 3 if told else 2)
        assert torch.equal(proposals[0].token_BK[held], proposals[1].token_BK[held])
        assert proposals[0].token_BK.shape == (3, min(5, stop_after))
        assert proposals[0].q_BKD is None
        assert proposals[0].num_B.tolist() == [min(5, stop_after)] * 3
        torch.testing.assert_close(values[0][:, held], values[1][:, held], atol=1e-4, rtol=1e-4)


@dataclass(kw_only=True)
class Tree:
    """A tree of modules/sampling/tree.py while it grows, as one would write it down from the paper."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.parents[node]), self.tokens[node]]

    def best(self, count: int, *, start: int = 0) -> list[int]:
        return sorted(range(start, len(self.tokens)), key=lambda i: -self.logprobs[i])[:count]


def tree_by_hand(
    drafter: Drafter, root_1H: torch.Tensor, slots_B: torch.Tensor, start_B: torch.Tensor, *, levels: int, width: int
) -> tuple[Tree, list[float]]:
    """Every node's state by a chain of its own from the root; and what each level promises."""
    tree, level, reaches = Tree(), [-1], []
    for _ in range(levels):
        grown = len(tree.tokens)
        for node in level:
            hidden_1H = root_1H
            for step, token in enumerate(tree.path(node)):
                hidden_1H = drafter.run(torch.tensor([[token]]), hidden_1H[None], slots_B, start_B + step)[:, 0]
            top = drafter.draft.logits(hidden_1H)[0].log_softmax(-1).topk(width)
            tree.tokens += drafter.vocabulary.target_id_D[top.indices].tolist()
            tree.parents += [node] * width
            tree.logprobs += [(tree.logprobs[node] if node >= 0 else 0.0) + x for x in top.values.tolist()]
        level = tree.best(width, start=grown)
        reaches.append(sum(torch.tensor(tree.logprobs)[level].exp().tolist()))
    return tree, reaches


@torch.no_grad()
@pytest.mark.parametrize(("levels", "nodes"), [(1, 3), (2, 3), (3, 15), (4, 15), (2, 31), (5, 31)])
def test_a_native_tree_is_the_tree_made_by_hand(target: Target, levels: int, nodes: int) -> None:
    traffic = Traffic(target, num=2)
    ours, plain = traffic.drafters
    width = min(4, nodes)
    for lengths in ROUNDS:
        rows, reaches = traffic.grow(lengths), []

        def go_on(done: int, reach_B: list[float], reaches: list[list[float]] = reaches) -> bool:
            reaches.append(reach_B)
            return done < levels

        found, done = propose_tree(ours, rows, num_steps=8, num_nodes=nodes, go_on=go_on)
        assert done == levels == len(reaches)
        assert found.parent_BK is not None
        roots_BH = plain.catch_up(rows)
        for b in range(3 if lengths[2] > 1 else 2):
            of_row = (roots_BH[b : b + 1], SLOTS[b : b + 1], torch.tensor([lengths[b] - 1]))
            tree, promised = tree_by_hand(plain, *of_row, levels=levels, width=width)
            kept = sorted(tree.best(nodes))
            assert found.token_BK[b].tolist() == [tree.tokens[i] for i in kept]
            assert found.parent_BK[b].tolist() == [
                kept.index(tree.parents[i]) + 1 if tree.parents[i] >= 0 else 0 for i in kept
            ]
            assert [reach_B[b] for reach_B in reaches] == pytest.approx(promised, rel=1e-4)


@torch.no_grad()
def test_what_a_tree_left_in_the_cache_is_gone_with_the_next_round(target: Target) -> None:
    """Proposals do not depend on what was drafted before."""
    traffic = Traffic(target, num=2)
    for lengths in ROUNDS:
        rows = traffic.grow(lengths)
        found = []
        for drafter, also in zip(traffic.drafters, (True, False), strict=True):
            if also:
                propose_tree(drafter, rows, num_steps=4, num_nodes=31, go_on=lambda *_: True)
                drafter._done = [max(0, done - 1) for done in drafter._done]
            found.append(propose_tree(drafter, rows, num_steps=3, num_nodes=15, go_on=lambda *_: True)[0])
        held = slice(0, 3 if lengths[2] > 1 else 2)
        assert torch.equal(found[0].token_BK[held], found[1].token_BK[held])


def test_drafts_beside_another_kind_of_embedding_take_no_native_steps(target: Target) -> None:
    class Scaled(torch.nn.Embedding):
        pass

    embedding = target.embedding
    scaled = Scaled(*embedding.weight.shape, _weight=embedding.weight)  # type: ignore[misc,arg-type]
    target.model.set_input_embeddings(scaled)  # type: ignore[no-untyped-call]
    try:
        assert not Traffic(target, num=1).drafters[0].can_branch
    finally:
        target.model.set_input_embeddings(embedding)  # type: ignore[no-untyped-call]
