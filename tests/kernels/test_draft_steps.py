"""The native draft steps agree with the draft's own modules: chains, siblings and prefill, in both weight formats.

With temperatures, tokens are ranked by logits with the noise of modules/sampling/noise.py.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from support.kernel_formats import GROUPED, pack_in_turn
from support.tiny_models import VOCAB, random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.decoder import Matrix
from aurora_lit.kernels.draft_steps import SHARE_CLASSES, Drafted, Prices, Weighing, doubles
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.serve.speculation.sources import runtime_draft
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")

CAPACITY = 130
SLOTS = [4, 1, 2]
ROUNDS = ([9, 120, 1], [12, 121, 4], [13, 122, 9])
"""Lengths of three sequences in each round, with many or few uncached positions; one begins with a single token."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision=request.param)


class GrowingSequences:
    """Three sequences that grow, and several drafters with copies of one draft that all see them."""

    def __init__(self, target: Target, *, num_drafters: int) -> None:
        self.target, self.ids_BT = target, torch.randint(0, VOCAB, (3, 130), generator=torch.Generator().manual_seed(1))
        self.features_BTF, _ = target.in_torch.forward_uncached(self.ids_BT)
        self.tokens_SL = torch.zeros(5, CAPACITY + 1, dtype=torch.int64)
        draft = random_draft(target)
        self.drafters = [
            Drafter(copy.deepcopy(draft), target, tokens_SL=self.tokens_SL, capacity=CAPACITY)
            for _ in range(num_drafters)
        ]
        self.num_features = [0, 0, 0]

    def grow(self, lengths: list[int]) -> DraftInputs:
        for sequence, length in enumerate(lengths):
            start, slot = self.num_features[sequence], SLOTS[sequence]
            self.tokens_SL[slot, :length] = self.ids_BT[sequence, :length]
            for drafter in self.drafters:
                aux_TF = self.features_BTF[sequence, start : length - 1]
                drafter.store_features(slot=slot, start=start, aux_TF=aux_TF)
            self.num_features[sequence] = length - 1
        return DraftInputs(slots=SLOTS, lengths=list(lengths))


def num_comparable(lengths: list[int]) -> int:
    """Without the last sequence while it has one token: it has no features, so its proposals are arbitrary."""
    return 3 if lengths[2] > 1 else 2


def native_chain(drafter: Drafter, inputs: DraftInputs, *, noise: ColumnDraws | None = None, **levels: Any) -> Drafted:
    """One native call; its other arguments are those of `DraftSteps`."""
    return drafter._draft_levels(inputs, noise=noise, **levels)


@torch.no_grad()
@pytest.mark.parametrize("num_levels", [1, 3, 5])
def test_a_native_chain_equals_the_modules_chain(target: Target, num_levels: int) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    native_drafter, module_drafter = sequences.drafters
    module_drafter._runtime_draft = replace(module_drafter._runtime_draft, steps=None)
    assert native_drafter.is_native
    assert not module_drafter.is_native
    for lengths in ROUNDS:
        inputs = sequences.grow(lengths)
        drafted = native_chain(native_drafter, inputs, num_levels=num_levels)
        expected = module_drafter.propose(inputs, num_steps=num_levels)
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(drafted.token_BK[compared], expected.token_BK[compared])
        assert drafted.token_BK.shape == (3, num_levels)
        torch.testing.assert_close(
            drafted.outcome_JB[:, compared], expected.outcome_JB[:, compared], atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_a_draft_whose_matrices_have_different_bits_runs_natively(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix of the draft, fuse, head and value head included, has each grouped format in one of four drafts."""
    if target.kv_dtype != torch.bfloat16:
        pytest.skip("keys and values beside grouped weights are bf16")
    for shift in range(len(GROUPED)):
        monkeypatch.setattr(runtime_draft, "pack_linears", partial(pack_in_turn, shift=shift))
        sequences = GrowingSequences(target, num_drafters=2)
        native_drafter, module_drafter = sequences.drafters
        module_drafter._runtime_draft = replace(module_drafter._runtime_draft, steps=None)
        assert native_drafter.is_native
        for lengths in ROUNDS:
            inputs = sequences.grow(lengths)
            drafted = native_chain(native_drafter, inputs, num_levels=2)
            expected = module_drafter.propose(inputs, num_steps=2)
            compared = slice(0, num_comparable(lengths))
            # The last bit of an input may decide how it is rounded to 8 bits.
            torch.testing.assert_close(
                drafted.outcome_JB[0, compared], expected.outcome_JB[0, compared], atol=1e-2, rtol=1e-2
            )
            assert torch.equal(drafted.token_BK[compared, 0], expected.token_BK[compared, 0])


@torch.no_grad()
@pytest.mark.skipif(
    not (native.has_int8_tiles() or native.has_byte_products()),
    reason="drafts of other formats have no copy in four bits",
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_that_reads_the_heads_copy_first_proposes_what_the_head_does(
    tmp_path_factory: pytest.TempPathFactory, temperature: float
) -> None:
    """One sequence reads the copy, eight do not. Where they differ, the head has hardly a preference."""
    vocab, count = 4000, 8
    folder = save_model("llama", tmp_path_factory.mktemp("wide"), vocab_size=vocab)
    target = load_target(folder, precision="bf16")
    tokens_SL = torch.randint(0, vocab, (count, 9), generator=torch.Generator().manual_seed(2))
    drafter = Drafter(random_draft(target, draft_vocab_size=vocab - 3), target, tokens_SL=tokens_SL, capacity=8)
    gen, same = torch.Generator().manual_seed(5), 0
    for _ in range(25):
        drafter.features_SLF.normal_(generator=gen)
        drafter._num_cached = [0] * count
        together = DraftInputs(slots=list(range(count)), lengths=[5] * count)
        key_B = torch.randint(0, 1 << 60, (count,), generator=gen)
        noises = [Noise(temperature=temperature, key=key, position=0) for key in key_B.tolist()]
        token_BK = native_chain(drafter, together, num_levels=1, noise=draws_of(noises)).token_BK
        drafter._num_cached = [0] * count
        normed_BH = drafter.draft.norm(drafter.prefill(together))
        logits_BD = drafter.draft.lm_head(normed_BH)
        if temperature:
            logits_BD = logits_BD / temperature
            logits_BD += gumbel(key_B, torch.zeros_like(key_B), drafter._runtime_draft.target_id_D)
        for b in range(count):
            drafter._num_cached = [0] * count
            alone = DraftInputs(slots=[b], lengths=[5])
            token = native_chain(drafter, alone, num_levels=1, noise=draws_of(noises[b : b + 1])).token_BK[0, 0]
            same += int(token == token_BK[b, 0])
            logit = logits_BD[b, torch.searchsorted(drafter.draft.draft_token_ids, token)]
            assert logit > logits_BD[b].max() - logits_BD[b].std()
    assert same > 0.9 * 25 * count


@torch.no_grad()
def test_a_draft_that_was_prepared_before_can_be_prepared_again(target: Target) -> None:
    """Its weights are packed then. As where two engines have the same draft."""
    draft = random_draft(target)
    tokens_SL = torch.randint(0, VOCAB, (1, CAPACITY), generator=torch.Generator().manual_seed(3))
    inputs = DraftInputs(slots=[0], lengths=[5])
    proposed = []
    for _ in range(2):
        drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=CAPACITY)
        drafter.features_SLF.copy_(torch.randn(drafter.features_SLF.shape, generator=torch.Generator().manual_seed(4)))
        proposed.append(native_chain(drafter, inputs, num_levels=3).tokens)
    assert proposed[0] == proposed[1]


@dataclass(kw_only=True)
class ReferenceTree:
    """A chain and its siblings, as a tree of nodes."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def path(self, node: int) -> list[int]:
        return [] if node < 0 else [*self.path(self.parents[node]), self.tokens[node]]

    def best(self, count: int) -> list[int]:
        return sorted(range(len(self.tokens)), key=lambda i: -self.logprobs[i])[:count]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of one sequence."""

    temperature: float
    key: int
    position: int

    def perturbed(self, logits_D: torch.Tensor, target_id_D: torch.Tensor, *, level: int) -> torch.Tensor:
        """The logits of a level's children; themselves at temperature 0."""
        if not self.temperature:
            return logits_D
        noise_1D = gumbel(torch.tensor([self.key]), torch.tensor([self.position + level]), target_id_D)
        return logits_D / self.temperature + noise_1D[0]


GREEDY = Noise(temperature=0.0, key=0, position=0)
NOISES = [
    Noise(temperature=1.0, key=1234, position=0),
    GREEDY,
    Noise(temperature=0.4, key=-(2**62) - 5, position=77),
]


def draws_of(noises: list[Noise]) -> ColumnDraws:
    return ColumnDraws(
        temperatures=[noise.temperature for noise in noises],
        keys=[noise.key for noise in noises],
        positions=[noise.position for noise in noises],
    )


@torch.no_grad()
@pytest.mark.parametrize("levels", [1, 5])
def test_with_temperatures_native_chains_equal_the_reference(target: Target, levels: int) -> None:
    """Two sequences at a temperature with their own keys and positions, and a greedy one between them."""
    sequences = GrowingSequences(target, num_drafters=2)
    native_drafter, reference_drafter = sequences.drafters
    for lengths in (*ROUNDS, [14, 123, 10]):
        inputs = sequences.grow(lengths)
        drafted = native_chain(native_drafter, inputs, num_levels=levels, noise=draws_of(NOISES))
        roots_BH, ids_D = reference_drafter.prefill(inputs), reference_drafter.draft.draft_token_ids
        for b in range(num_comparable(lengths)):
            hidden_1H, chain = roots_BH[b : b + 1], []
            for level in range(levels):
                logits_D = reference_drafter.draft.compute_logits(hidden_1H)[0]
                chain.append(int(ids_D[NOISES[b].perturbed(logits_D, ids_D, level=level).argmax()]))
                where = torch.tensor(SLOTS[b : b + 1]), torch.tensor([lengths[b] - 1 + level])
                hidden_1H = reference_drafter.forward(torch.tensor([chain[-1:]]), hidden_1H[None], *where)[:, 0]
            assert drafted.tokens[b] == chain


def weighed_reference(
    trees: list[ReferenceTree], weighing: Weighing, *, num_nodes: int
) -> list[tuple[list[int], list[int]]]:
    """What is proposed of each tree, whose `logprobs` promise acceptance: tokens, and parents' columns."""
    best = [(tree.logprobs[i], b, i) for b, tree in enumerate(trees) for i in tree.best(num_nodes)]
    best.sort(key=lambda node: -node[0])
    promises = [math.exp(logprob) for logprob, *_ in best]
    gains = [sum(promises[:n]) - weighing.speed * price_s for n, price_s in enumerate(weighing.prices.columns_s)]
    count = max(range(len(gains)), key=gains.__getitem__)
    proposed = []
    for b, tree in enumerate(trees):
        kept = [i for _, row, i in best[:count] if row == b]
        kept.sort(key=lambda i: (i % 3 != 0, i))  # of three children the first goes on the chain
        columns = {-1: 0, **{node: column for column, node in enumerate(kept, 1)}}
        proposed.append(([tree.tokens[i] for i in kept], [columns[tree.parents[i]] for i in kept]))
    return proposed


@torch.no_grad()
@pytest.mark.parametrize("speed", [0.0, 0.3, 1.0, 3.0, 1e6])
def test_of_a_weighed_chain_and_beside_it_is_proposed_what_is_worth_its_column(target: Target, speed: float) -> None:
    """Each node's promise is its parent's, times its share, or for a first choice the acceptance of that class."""
    sequences = GrowingSequences(target, num_drafters=2)
    native_drafter, reference_drafter = sequences.drafters
    without_copy(native_drafter)  # from which shares are only nearly right
    gen = torch.Generator().manual_seed(1)
    acceptance_KC = torch.rand(2, SHARE_CLASSES, generator=gen).mul(0.6).add(0.2)
    acceptance_KC[:, 1:3] = 0.02  # less than the shares of others, which then promise no more than that
    columns_s, levels, numbers = [0.01 * n**1.5 for n in range(19)], 3, set()
    prices = Prices(acceptance_KC, doubles(columns_s), doubles([0.0, 0.0]))
    weighing = Weighing(prices, level_rates=[1e9] * 3, speed=speed)
    for lengths in ROUNDS[1:]:
        inputs = sequences.grow(lengths)
        drafted = native_drafter.propose_weighed(
            inputs, num_steps=levels, num_nodes=6, num_siblings=2, weighing=weighing, noise=draws_of(NOISES)
        )
        assert drafted.parents is not None
        assert drafted.first_choices is not None
        assert drafted.shares is not None
        roots_BH, trees = reference_drafter.prefill(inputs), []
        for b, noise in enumerate(NOISES):
            tree, node = ReferenceTree(), -1
            for depth in range(levels):
                hidden_1H = roots_BH[b : b + 1]
                for step, token in enumerate(tree.path(node)):
                    start_B = torch.tensor([lengths[b] - 1 + step])
                    hidden_1H = reference_drafter.forward(
                        torch.tensor([[token]]), hidden_1H[None], torch.tensor(SLOTS[b : b + 1]), start_B
                    )[:, 0]
                logits_D = reference_drafter.draft.compute_logits(hidden_1H)[0]
                ids_D = reference_drafter.draft.draft_token_ids
                top = noise.perturbed(logits_D, ids_D, level=depth).log_softmax(-1).topk(3)
                share = math.exp(top.values[0])
                assert drafted.first_choices[b][depth] == ids_D[top.indices[0]]
                assert drafted.shares[b][depth] == pytest.approx(share, rel=1e-4)
                first = math.log(acceptance_KC[int(noise.temperature > 0), int(share * SHARE_CLASSES)])
                rates = [first, *(min(first, x) for x in top.values.tolist()[1:])]
                before = tree.logprobs[node] if node >= 0 else 0.0
                tree.tokens += ids_D[top.indices].tolist()
                tree.parents += [node] * 3
                tree.logprobs += [before + rate for rate in rates]
                node = 3 * depth
            trees.append(tree)
        proposed = weighed_reference(trees, weighing, num_nodes=6)
        assert [(drafted.tokens[b], drafted.parents[b]) for b in range(3)] == proposed
        numbers |= {len(tokens) for tokens, _ in proposed}
    assert {0.0: numbers == {6}, 1e6: numbers == {0}}.get(speed, len(numbers) > 1)


@torch.no_grad()
def test_shares_from_the_heads_copy_are_nearly_those_of_the_head(target: Target) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    without_copy(sequences.drafters[0])
    acceptance_KC, shares = torch.full((2, SHARE_CLASSES), 0.5), []
    prices = Prices(acceptance_KC, doubles([0.0] * 9), doubles([]))
    weighing = Weighing(prices, level_rates=[1.0] * 3, speed=1.0)
    inputs = sequences.grow(ROUNDS[2])
    for drafter in sequences.drafters:
        drafted = drafter.propose_weighed(inputs, num_steps=1, num_nodes=4, num_siblings=3, weighing=weighing)
        assert drafted.shares is not None
        shares.append(torch.tensor(drafted.shares))
    torch.testing.assert_close(shares[0], shares[1], rtol=0.1, atol=0.01)


def without_copy(drafter: Drafter) -> None:
    """Read the head itself only."""
    assert drafter._runtime_draft.steps is not None
    drafter._runtime_draft.steps._call.coarse = Matrix()


@torch.no_grad()
def test_a_weighed_chain_ends_before_a_level_that_does_not_repay_its_pass(target: Target) -> None:
    sequences = GrowingSequences(target, num_drafters=1)
    (drafter,), inputs = sequences.drafters, sequences.grow(ROUNDS[2])
    acceptance_KC, rng, ends = torch.full((2, SHARE_CLASSES), 0.8), random.Random(0), set()
    for _ in range(40):
        levels_s, rates = [rng.random() for _ in range(4)], [rng.random() for _ in range(3)]
        column_s, speed = 0.3 * rng.random(), 2 * rng.random()
        prices = Prices(acceptance_KC, doubles([n * column_s for n in range(30)]), doubles(levels_s))
        weighing = Weighing(prices, level_rates=rates, speed=speed)
        drafter._num_cached = [0] * len(drafter._num_cached)
        drafted = drafter.propose_weighed(inputs, num_steps=5, num_nodes=8, num_siblings=1, weighing=weighing)
        expected = 1
        while expected < 5:
            promised = sum(max(0.0, 0.8**expected * rate - speed * column_s) for rate in rates)
            if promised <= speed * levels_s[expected - 1]:
                break
            expected += 1
        assert drafted.first_choices is not None
        assert {len(chain) for chain in drafted.first_choices} == {expected}
        ends.add(expected)
    assert len(ends) > 3


@torch.no_grad()
@pytest.mark.parametrize("weighs", [False, True])
def test_a_sequences_proposals_with_noise_do_not_depend_on_the_sequences_beside_it(
    target: Target, weighs: bool
) -> None:
    """Where columns cost nothing, so that they do not compete for them."""
    sequences = GrowingSequences(target, num_drafters=2)
    for drafter in sequences.drafters:
        without_copy(drafter)  # which only few sequences read
    inputs = sequences.grow(ROUNDS[1])

    def drafted(drafter: Drafter, rows: slice) -> Drafted:
        number = len(SLOTS[rows])
        free = doubles([0.0] * (8 * number + 1)), doubles([0.0] * 3)
        weighing = Weighing(Prices(torch.full((2, SHARE_CLASSES), 0.5), *free), [1.0] * number, speed=1.0)
        levels: dict[str, Any] = {"num_siblings": 3, "num_nodes": 8, "weighing": weighing} if weighs else {}
        of_rows = DraftInputs(slots=inputs.slots[rows], lengths=inputs.lengths[rows])
        return native_chain(drafter, of_rows, num_levels=4, noise=draws_of(NOISES[rows]), **levels)

    together = drafted(sequences.drafters[0], slice(3))
    assert [len(tokens) for tokens in together.tokens] == [8 if weighs else 4] * 3
    for b in range(3):
        alone = drafted(sequences.drafters[1], slice(b, b + 1))
        assert alone.tokens[0] == together.tokens[b]
        assert torch.equal(alone.outcome_JB[:, 0], together.outcome_JB[:, b])
        if weighs:
            assert alone.parents is not None
            assert together.parents is not None
            assert alone.parents[0] == together.parents[b]


@torch.no_grad()
def test_a_call_does_not_depend_on_the_calls_before_it(target: Target) -> None:
    """Of other numbers of sequences and levels, weighed and not, with and without noise, at one price and another."""
    prices = [
        Prices(torch.full((2, SHARE_CLASSES), rate), doubles([0.01 * n for n in range(25)]), doubles([0.0] * 3))
        for rate in (0.5, 0.8)
    ]
    ways: list[dict[str, Any]] = [{}, *({"prices": p} for p in prices)]
    cases: list[dict[str, Any]] = [
        {"rows": each, "num_levels": levels, "noise": noise, **how}
        for each in (slice(1, 2), slice(3))
        for levels in (2, 4)
        for noise in (False, True)
        for how in ways
    ]
    sequences = GrowingSequences(target, num_drafters=1 + len(cases))
    inputs = sequences.grow(ROUNDS[1])
    used, *fresh = sequences.drafters
    order = random.Random(3).sample(range(len(cases)), len(cases))

    def drafted(drafter: Drafter, case: dict[str, Any]) -> Drafted:
        drafter._num_cached = [0] * len(drafter._num_cached)
        without_copy(drafter)
        each, levels = case["rows"], dict[str, Any](num_levels=case["num_levels"])
        if "prices" in case:
            levels["weighing"] = Weighing(case["prices"], [0.7] * len(SLOTS[each]), speed=3.0)
            levels |= {"num_siblings": 2, "num_nodes": 6}
        noise = draws_of(NOISES[each]) if case["noise"] else None
        return native_chain(
            drafter, DraftInputs(slots=inputs.slots[each], lengths=inputs.lengths[each]), noise=noise, **levels
        )

    for number in order:
        assert drafted(used, cases[number]) == drafted(fresh[number], cases[number])


@torch.no_grad()
def test_first_proposals_with_noise_have_the_law_of_the_drafts_softmax(target: Target) -> None:
    """Two thousand sequences with one context and a key each."""
    count, temperature = 2000, 2.0
    tokens_SL = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(2)).repeat(count, 1)
    drafter = Drafter(random_draft(target, draft_vocab_size=50), target, tokens_SL=tokens_SL, capacity=8)
    drafter.features_SLF.copy_(torch.randn(drafter.features_SLF.shape[1:]).to(drafter.features_SLF.dtype))
    inputs = DraftInputs(slots=list(range(count)), lengths=[5] * count)
    noise = ColumnDraws(temperatures=[temperature] * count, keys=range(count), positions=[0] * count)
    drafted = native_chain(drafter, inputs, num_levels=1, noise=noise)
    drawn_B = torch.searchsorted(drafter.draft.draft_token_ids, drafted.token_BK[:, 0])
    drafter._num_cached = [0] * count
    logits_D = drafter.draft.compute_logits(drafter.prefill(inputs))[0]
    expected_D = (logits_D / temperature).softmax(-1) * count
    statistic = ((torch.bincount(drawn_B, minlength=50) - expected_D) ** 2 / expected_D).sum()
    assert (statistic - 49) / (2 * 49) ** 0.5 < 5


@torch.no_grad()
def test_proposals_do_not_depend_on_an_earlier_chain_in_the_cache(target: Target) -> None:
    sequences = GrowingSequences(target, num_drafters=2)
    for lengths in ROUNDS:
        inputs = sequences.grow(lengths)
        proposals = []
        for drafter, has_earlier_chain in zip(sequences.drafters, (True, False), strict=True):
            if has_earlier_chain:
                native_chain(drafter, inputs, num_levels=6, noise=draws_of(NOISES))
                drafter._num_cached = [max(0, num_cached - 1) for num_cached in drafter._num_cached]
            proposals.append(native_chain(drafter, inputs, num_levels=3))
        compared = slice(0, num_comparable(lengths))
        assert torch.equal(proposals[0].token_BK[compared], proposals[1].token_BK[compared])


def test_no_native_steps_with_an_embedding_that_is_not_a_plain_table(target: Target) -> None:
    class Scaled(torch.nn.Embedding):
        pass

    embedding = target.embedding
    scaled = Scaled(*embedding.weight.shape, _weight=embedding.weight)  # type: ignore[misc,arg-type]
    target._embedding = scaled
    try:
        assert not GrowingSequences(target, num_drafters=1).drafters[0].is_native
    finally:
        target._embedding = embedding
