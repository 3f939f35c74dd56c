"""Speculative decoding emits the distribution of plain decoding: exactly by enumeration, and by chi-square on draws.

Enumeration: every pair of proposals, every way of accepting them and every next token is two rows of a real call. Their
uniform numbers lie at the two ends of the interval that leads there, whose length is that outcome's probability.
"""

import itertools

import pytest
import torch
from scipy.stats import chi2
from support.toy_sampling import OPTIONS, Toy, history, no_proposals, reference_law, reference_p

from aurora_lit.modules.sampling.distribution import LogitOptions, probabilities, target_distribution
from aurora_lit.modules.sampling.proposals import Proposals, behaviour_logprobs, propose
from aurora_lit.modules.sampling.verification import verify, verify_by_ratio_test
from aurora_lit.request import SamplingParams

V, D = 8, 5
EDGE = 1e-9  # distance from an interval's end


def _draft_q(toy: Toy, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """q of the first proposal [D] and of the second after each token [V, D], as `propose` makes them."""
    options = LogitOptions.from_params([params] * (V + 1))
    q = probabilities(torch.cat([toy.draft[0][None], toy.draft[1]])[:, None], filters=options.filters)[:, 0]
    return q[0], q[1:]


def _enumerated_law(
    toy: Toy, params: SamplingParams, *, k: int, one_hot: bool, drawn_by: SamplingParams | None = None
) -> torch.Tensor:
    """`drawn_by`: the options that proposals are drawn with; default: the request's own."""
    ids = toy.vocabulary.target_id_D
    q0, q1 = _draft_q(toy, drawn_by or params)
    chains = torch.tensor(list(itertools.product(range(D), repeat=k)), dtype=torch.int64).view(D**k, k)
    tokens = ids[chains]
    q_BKD = torch.zeros(len(chains), k, D, dtype=torch.float64)
    if k > 0:
        q_BKD[:, 0] = q0
    if k > 1:
        q_BKD[:, 1] = q1[tokens[:, 0]]
    if one_hot:  # argmax proposals: any choice must do, so give every chain the same weight
        chain_weight = torch.full((len(chains),), 1 / len(chains), dtype=torch.float64)
        q_of = torch.ones(len(chains), k, dtype=torch.float64)
    else:
        q_of = q_BKD.gather(2, chains[..., None])[..., 0]
        chain_weight = q_of.prod(1)
    p = target_distribution(
        toy.logits(tokens),
        options=LogitOptions.from_params([params] * len(tokens)),
        history=history(len(tokens)),
        proposals_BK=tokens,
    )

    rows, weights, uniforms, expected = [], [], [], []
    for b, chain in enumerate(tokens.tolist()):
        accept = [min(1.0, float(p[b, j, a] / q_of[b, j])) if q_of[b, j] > 0 else 0.0 for j, a in enumerate(chain)]
        for accepted in range(k + 1):
            weight = float(chain_weight[b])
            uniform = [0.5] * (k + 1)
            for j in range(min(accepted + 1, k)):
                uniform[j] = accept[j] - EDGE if j < accepted else accept[j] + EDGE
                weight *= accept[j] if j < accepted else 1 - accept[j]
            rest = p[b, accepted].clone()
            if accepted < k and one_hot:
                rest[chain[accepted]] = 0
            elif accepted < k:
                rest[ids] -= q_BKD[b, accepted]
                rest.clamp_min_(0)
            if weight < 4 * EDGE or rest.sum() == 0:
                continue
            rest /= rest.sum()
            ends = rest.cumsum(0)
            for token in (rest > 4 * EDGE).nonzero()[:, 0].tolist():
                for last in (float(ends[token] - rest[token]) + EDGE, float(ends[token]) - EDGE):
                    rows.append(b)
                    weights.append(weight * float(rest[token]) / 2)
                    uniforms.append([*uniform[:k], last])
                    expected.append((accepted, token))
    result = verify_by_ratio_test(
        p[rows],
        proposals_BK=tokens[rows],
        num_proposed_B=torch.full((len(rows),), k),
        uniform_BT=torch.tensor(uniforms, dtype=torch.float64),
        q_BKD=None if one_hot else q_BKD[rows],
        vocabulary=toy.vocabulary,
    )
    got = list(zip(result.num_accepted_B.tolist(), result.next_token_B.tolist(), strict=True))
    assert got == expected

    law = torch.zeros(V, V, V, dtype=torch.float64)
    for b, weight, (accepted, token) in zip(rows, weights, got, strict=True):
        emitted = (*tokens[b, :accepted].tolist(), token)
        law[emitted] += weight * _continuation(toy, params, emitted)
    return law


def _continuation(toy: Toy, params: SamplingParams, emitted: tuple[int, ...]) -> torch.Tensor:
    """The distribution of what plain decoding adds, up to three tokens in all."""
    if len(emitted) == 3:
        return torch.ones((), dtype=torch.float64)
    p = torch.tensor(reference_p(toy.target[len(emitted)][emitted], params, output=emitted), dtype=torch.float64)
    if len(emitted) == 2:
        return p
    return torch.stack([p[y] * _continuation(toy, params, (*emitted, y)) for y in range(V)])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("k", "one_hot"), [(0, False), (1, False), (2, False), (1, True), (2, True)])
def test_enumerated_law_is_that_of_plain_decoding(name: str, k: int, one_hot: bool) -> None:
    toy = Toy.random(V=V, D=D, seed=len(name) + k)
    law = _enumerated_law(toy, OPTIONS[name], k=k, one_hot=one_hot)
    assert law.sum().item() == pytest.approx(1, abs=1e-7)
    assert (law - reference_law(toy, OPTIONS[name])).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["plain", "top_k", "repetition"])
def test_enumerated_law_holds_for_a_perfect_draft_and_for_a_confident_wrong_one(name: str) -> None:
    for seed in range(3):
        toy = Toy.random(V=V, D=D, seed=seed)
        ids = toy.vocabulary.target_id_D
        same = Toy(target=toy.target, draft=(toy.target[0][ids], toy.target[1][:, ids]), vocabulary=toy.vocabulary)
        confident = Toy(target=toy.target, draft=(60 * toy.draft[0], 60 * toy.draft[1]), vocabulary=toy.vocabulary)
        for case in (same, confident):
            law = _enumerated_law(case, OPTIONS[name], k=2, one_hot=False)
            assert (law - reference_law(case, OPTIONS[name])).abs().max() < 1e-6


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
def test_the_law_does_not_change_when_proposals_are_drawn_by_exploring(name: str, temperature: float) -> None:
    toy = Toy.random(V=V, D=D, seed=len(name))
    exploring = SamplingParams(max_tokens=1, temperature=temperature)
    law = _enumerated_law(toy, OPTIONS[name], k=2, one_hot=False, drawn_by=exploring)
    assert (law - reference_law(toy, OPTIONS[name])).abs().max() < 1e-6


def test_the_acceptance_test_switches_at_min_1_p_over_q() -> None:
    p = torch.tensor([[[0.2, 0.5, 0.3]] * 2], dtype=torch.float64)
    q = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64)
    for token, threshold in ((0, 0.4), (1, 1.0), (2, 1.0)):
        for uniform, accepted in ((threshold - 1e-12, 1), (threshold + 1e-12, 0)):
            if uniform < 1:
                result = verify_by_ratio_test(
                    p,
                    proposals_BK=torch.tensor([[token]]),
                    num_proposed_B=torch.tensor([1]),
                    uniform_BT=torch.tensor([[uniform, 0.5]], dtype=torch.float64),
                    q_BKD=q,
                )
                assert result.num_accepted_B.item() == accepted


ROWS, CALLS = 100_000, 20
KINDS = ("drawn", "chosen", "seeded")
EVERY_RUN = [("all", kind) for kind in KINDS] + [("plain", "drawn"), ("top_p", "drawn")]
SLOW_RUN = [(name, kind) for name in OPTIONS for kind in KINDS if (name, kind) not in EVERY_RUN]
"""Each option alone: the exact law above has them all in every run."""


@pytest.mark.parametrize(
    ("name", "kind"), EVERY_RUN + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_RUN]
)
def test_chi_square_of_two_million_draws(name: str, kind: str) -> None:
    """Two tokens a draw: a round with one or two proposals in turn, then plain decoding if it emitted one token."""
    seed = sum(map(ord, name + kind))
    V, params = 6, OPTIONS[name]
    toy = Toy.random(V=V, D=4, seed=seed, dtype=torch.float32)
    law = reference_law(toy, params).sum(-1)
    options = LogitOptions.from_params([params] * ROWS)
    gen = torch.Generator().manual_seed(seed)
    counts = torch.zeros(V * V, dtype=torch.float64)
    num = torch.arange(ROWS) % 2 + 1
    for call in range(CALLS):
        if kind == "seeded":
            options = _seeded(options, first_seed=call * ROWS)
        uniform = torch.rand(ROWS, 5, generator=gen, dtype=torch.float64)
        proposals = _draft_chain(toy, options, uniform[:, :2] if kind == "drawn" else None, num=num)
        result = verify(
            toy.logits(proposals.token_BK),
            options=options,
            proposals=proposals,
            uniform_BT=uniform[:, 2:],
            history=history(ROWS),
            vocabulary=toy.vocabulary,
        )
        some = result.num_accepted_B > 0
        first = torch.where(some, proposals.token_BK[:, 0], result.next_token_B)
        plain = verify(
            toy.target[1][first][:, None],
            options=options,
            proposals=no_proposals(ROWS),
            uniform_BT=torch.rand(ROWS, 1, generator=gen, dtype=torch.float64),
            history=history(ROWS, output=first[:, None]),
            vocabulary=toy.vocabulary,
        ).next_token_B
        second = torch.where(result.num_accepted_B > 1, proposals.token_BK[:, 1], result.next_token_B)
        counts += torch.bincount(first * V + torch.where(some, second, plain), minlength=V * V)
    expected = law.flatten() * ROWS * CALLS
    assert counts.sum() == ROWS * CALLS >= 2e6
    assert (counts[expected == 0] == 0).all()
    cells = expected > 5
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum().item()
    assert chi2.sf(statistic, int(cells.sum()) - 1) > 1e-4


def _draft_chain(toy: Toy, options: LogitOptions, uniform_B2: torch.Tensor | None, *, num: torch.Tensor) -> Proposals:
    rows = len(num)
    tokens, qs = torch.zeros(rows, 2, dtype=torch.int64), []
    for j in range(2):
        logits = toy.draft[0].expand(rows, -1) if j == 0 else toy.draft[1][tokens[:, 0]]
        draft_id, q = propose(logits, options=options, uniform_B=None if uniform_B2 is None else uniform_B2[:, j])
        tokens[:, j] = toy.vocabulary.target_id_D[draft_id]
        qs.append(q)
    return Proposals(token_BK=tokens, num_proposed_B=num, q_BKD=None if uniform_B2 is None else torch.stack(qs, 1))


def test_behaviour_log_probabilities_are_those_of_the_draws() -> None:
    toy = Toy.random(V=V, D=D, seed=4)
    params = [
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=1, temperature=0.7, seed=3),
        SamplingParams(max_tokens=1, temperature=0.7),
        SamplingParams(max_tokens=1, temperature=2.0),
        *(SamplingParams(max_tokens=1, **cut) for cut in ({"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.3})),
    ]
    options = LogitOptions.from_params(params)
    uniform = torch.rand(len(params), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    proposals = _draft_chain(toy, options, uniform, num=torch.full((len(params),), 2))
    got = behaviour_logprobs(proposals, options=options, vocabulary=toy.vocabulary)
    assert got[:2].tolist() == [[0.0, 0.0]] * 2
    assert got[4:].isnan().all()
    for row, temperature in ((2, 0.7), (3, 2.0)):
        first, second = proposals.token_BK[row].tolist()
        for place, (logits, token) in enumerate(((toy.draft[0], first), (toy.draft[1][first], second))):
            q = (logits / temperature).softmax(-1)
            assert got[row, place].item() == pytest.approx(q[toy.vocabulary.draft_id_V[token]].log().item(), abs=1e-6)
    argmax = _draft_chain(toy, options, None, num=torch.full((len(params),), 2))
    assert behaviour_logprobs(argmax, options=options, vocabulary=toy.vocabulary).tolist() == [[0.0, 0.0]] * 7


def _seeded(options: LogitOptions, *, first_seed: int) -> LogitOptions:
    """The same options with a seed for each sequence, without reading a hundred thousand requests again."""
    fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
    rows = len(options.seed_B)
    fields.update(
        seed_B=torch.arange(first_seed, first_seed + rows),
        unseeded_B=torch.zeros(rows, dtype=torch.bool),
        num_unseeded=0,
    )
    return LogitOptions(**fields)
