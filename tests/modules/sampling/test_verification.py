"""Options against transformers' processors, and what greedy, seeded and mixed batches promise."""

from dataclasses import replace

import pytest
import torch
from support.toy_sampling import BASE, OPTIONS, Toy, history, reference_p
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aurora_lit.modules.sampling import distribution
from aurora_lit.modules.sampling.distribution import History, LogitOptions, target_distribution
from aurora_lit.modules.sampling.verification import (
    DraftVocabulary,
    Proposals,
    draw,
    propose,
    seeded_uniforms,
    token_logprobs,
    verify,
    verify_greedy,
)
from aurora_lit.request import SamplingParams

GREEDY = replace(BASE, temperature=0.0)


def _proposals(token_BK: torch.Tensor, num: int | None = None, q_BKD: torch.Tensor | None = None) -> Proposals:
    rows, k = token_BK.shape
    return Proposals(token_BK=token_BK, num_B=torch.full((rows,), k if num is None else num), q_BKD=q_BKD)


def _no_proposals(rows: int) -> torch.Tensor:
    return torch.zeros(rows, 0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        (replace(BASE, temperature=0.7), TemperatureLogitsWarper(0.7)),
        (replace(BASE, top_k=50), TopKLogitsWarper(50)),
        (replace(BASE, top_k=10_000), TopKLogitsWarper(10_000)),
        (replace(BASE, top_p=0.5), TopPLogitsWarper(0.5)),
        (replace(BASE, top_p=0.99), TopPLogitsWarper(0.99)),
        (replace(BASE, min_p=0.1), MinPLogitsWarper(0.1)),
        (replace(BASE, repetition_penalty=1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (replace(BASE, logit_bias={5: 3.5}), SequenceBiasLogitsProcessor({(5,): 3.5})),
    ],
)
@pytest.mark.parametrize("scale", [0.3, 3.0])  # flat (top-p needs the whole vocabulary) and peaked
def test_each_option_equals_the_processor_of_transformers(
    params: SamplingParams, processor: LogitsProcessor, scale: float
) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=gen) * scale
    tokens = torch.randint(5000, (4, 30), generator=gen)
    seen = History(token_BL=tokens, prompt_length_B=torch.full((4,), 20), length_B=torch.full((4,), 30))
    p = target_distribution(
        logits[:, None], options=LogitOptions.of([params] * 4), history=seen, proposals_BK=_no_proposals(4)
    )[:, 0]
    expected = processor(tokens, logits.clone()).softmax(-1)
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-9)
    if params.top_k != 10_000:
        assert not torch.allclose(p, logits.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_each_option_changes_the_distribution_and_equals_its_definition(name: str) -> None:
    toy = Toy.random(V=8, D=5, seed=3)
    tokens = torch.tensor([[3, 6]])
    p = target_distribution(
        toy.logits(tokens), options=LogitOptions.of([OPTIONS[name]]), history=history(1), proposals_BK=tokens
    )[0]
    plain = toy.logits(tokens)[0].softmax(-1)
    assert (p - plain).abs().max() > 1e-3
    for t, output in enumerate(((), (3,), (3, 6))):
        expected = reference_p(toy.logits(tokens)[0, t], OPTIONS[name], output=output)
        torch.testing.assert_close(p[t], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_padding_of_the_history_does_not_count() -> None:
    logits = torch.randn(1, 1, 8)
    params = replace(BASE, repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0)

    def p(padding: list[int]) -> torch.Tensor:
        seen = History(
            token_BL=torch.tensor([[1, 2, 2, *padding]]), prompt_length_B=torch.tensor([1]), length_B=torch.tensor([3])
        )
        options = LogitOptions.of([params])
        return target_distribution(logits, options=options, history=seen, proposals_BK=_no_proposals(1))

    assert torch.equal(p([]), p([5, 5, 5]))


def test_a_mixed_batch_gives_every_row_what_it_gets_alone() -> None:
    toy = Toy.random(V=8, D=5, seed=1)
    params = [*OPTIONS.values(), GREEDY, replace(GREEDY, logit_bias={2: 50.0}), replace(BASE, seed=3)]
    tokens = torch.randint(8, (len(params), 2))
    together = target_distribution(
        toy.logits(tokens), options=LogitOptions.of(params), history=history(len(params)), proposals_BK=tokens
    )
    uniform = torch.rand(len(params), 3, dtype=torch.float64)
    verdict = verify(
        toy.logits(tokens),
        options=LogitOptions.of(params),
        history=history(len(params)),
        uniform_BT=uniform,
        proposals=_proposals(tokens),
    )
    for row, one in enumerate(params):
        token, options = tokens[row : row + 1], LogitOptions.of([one])
        alone = target_distribution(toy.logits(token), options=options, history=history(1), proposals_BK=token)
        torch.testing.assert_close(together[row], alone[0])
        single = verify(
            toy.logits(token),
            options=options,
            history=history(1),
            uniform_BT=uniform[row : row + 1],
            proposals=_proposals(token),
        )
        assert single.accepted_B.item() == verdict.accepted_B[row].item()
        assert single.next_token_B.item() == verdict.next_token_B[row].item()


def test_greedy_emits_nothing_but_the_argmax_whatever_is_proposed() -> None:
    gen = torch.Generator().manual_seed(0)
    B, K, V = 2000, 4, 6
    logits = torch.randn(B, K + 1, V, generator=gen)
    best = logits.argmax(-1)
    tokens = torch.where(torch.rand(B, K, generator=gen) < 0.7, best[:, :K], torch.randint(V, (B, K), generator=gen))
    num = torch.randint(K + 1, (B,), generator=gen)
    verdict = verify(
        logits,
        options=LogitOptions.of([GREEDY] * B),
        uniform_BT=torch.rand(B, K + 1),
        proposals=Proposals(token_BK=tokens, num_B=num, q_BKD=None),
    )
    for row in range(B):
        accepted = int(verdict.accepted_B[row])
        assert accepted <= num[row]
        emitted = [*tokens[row, :accepted].tolist(), int(verdict.next_token_B[row])]
        assert emitted == best[row, : accepted + 1].tolist()
        assert accepted == num[row] or tokens[row, accepted] != best[row, accepted]


def test_a_greedy_batch_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("greedy rows need no softmax")

    monkeypatch.setattr("aurora_lit.modules.sampling.verification.probabilities", refuse)
    logits = torch.randn(3, 1, 8)
    verdict = verify(
        logits,
        options=LogitOptions.of([GREEDY] * 3),
        uniform_BT=torch.rand(3, 1),
        proposals=_proposals(_no_proposals(3)),
    )
    assert torch.equal(verdict.next_token_B, logits[:, 0].argmax(-1))


def test_greedy_heeds_bias_and_penalties() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 0.0]]])
    for params, token in (
        (GREEDY, 1),
        (replace(GREEDY, logit_bias={3: 5.0}), 3),
        (replace(GREEDY, repetition_penalty=9.0), 2),
    ):
        verdict = verify(
            logits,
            options=LogitOptions.of([params]),
            history=history(1),
            uniform_BT=torch.rand(1, 1),
            proposals=_proposals(_no_proposals(1)),
        )
        assert verdict.next_token_B.item() == token, params


def _generate(toy: Toy, seeds: list[int], *, k: int, params: SamplingParams = BASE) -> list[tuple[int, ...]]:
    """Three tokens a seed, in rounds of up to k proposals of an unhelpful draft."""
    out = []
    options = LogitOptions.of([replace(params, seed=seed) for seed in seeds])
    emitted: list[list[int]] = [[] for _ in seeds]
    for row in range(len(seeds)):  # rows are at different places, so one at a time; the batch's other rows are dummies
        while len(emitted[row]) < 3:
            place = len(emitted[row])
            n = min(k, 2 - place)
            tokens = torch.randint(8, (len(seeds), n))
            prefix = torch.tensor([emitted[row]] * len(seeds), dtype=torch.int64).view(len(seeds), place)
            chain = torch.cat([prefix, tokens], 1)
            verdict = verify(
                toy.logits(chain)[:, place:],
                options=options,
                history=history(len(seeds), output=prefix),
                uniform_BT=torch.rand(len(seeds), n + 1),
                proposals=_proposals(tokens),
            )
            accepted = int(verdict.accepted_B[row])
            emitted[row] += [*tokens[row, :accepted].tolist(), int(verdict.next_token_B[row])]
        out.append(tuple(emitted[row]))
    return out


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_seed_repeats_whatever_the_draft_the_rounds_and_the_batch(name: str) -> None:
    toy, seeds = Toy.random(V=8, D=5, seed=2), [7, -1, 2**63, 12345, 7]
    plain = _generate(toy, seeds, k=0, params=OPTIONS[name])
    for k in (1, 2):
        assert _generate(toy, seeds, k=k, params=OPTIONS[name]) == plain
    assert _generate(toy, seeds[:1], k=2, params=OPTIONS[name]) == plain[:1]
    assert plain[0] == plain[4]
    assert len(set(_generate(toy, list(range(60)), k=0, params=OPTIONS[name]))) > 10


def test_seeded_uniforms_are_uniform_uncorrelated_and_a_function_of_seed_and_place() -> None:
    u = seeded_uniforms(torch.arange(1000), place_B=torch.zeros(1000, dtype=torch.int64), count=1000)
    assert torch.equal(u[3:4, 40:50], seeded_uniforms(torch.tensor([3]), place_B=torch.tensor([40]), count=10))
    assert u.min() >= 0
    assert u.max() < 1
    assert u.unique().numel() == u.numel()
    cells = torch.bincount((u.flatten() * 100).long(), minlength=100).double()
    assert ((cells - 1e4) ** 2 / 1e4).sum() < 160  # 99 degrees of freedom: above with probability 1e-4
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # next place, next seed
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 5e-3


def test_draw_never_gives_a_token_without_weight() -> None:
    weight = torch.tensor([[0.0, 0.3, 0.0, 0.5, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.375 - 1e-9, 0.375 + 1e-6, 1 - 2**-53], dtype=torch.float64)
    assert draw(weight, uniform).tolist() == [1, 1, 3, 3]


def test_free_rows_propose_by_drawing_and_all_others_by_the_argmax() -> None:
    logits = torch.zeros(3, 4)
    logits[:, 2] = 0.5
    options = LogitOptions.of([GREEDY, replace(BASE, seed=1), BASE])
    last = torch.full((3,), 0.999, dtype=torch.float64)
    tokens, q = propose(logits, options=options, uniform_B=last)
    assert tokens.tolist() == [2, 2, 3]
    assert q is not None
    torch.testing.assert_close(q[2], logits[2].softmax(-1))
    tokens, q = propose(logits, options=LogitOptions.of([GREEDY, GREEDY, replace(BASE, seed=1)]), uniform_B=last)
    assert q is None
    assert tokens.tolist() == [2, 2, 2]


def test_a_row_accepts_no_more_than_it_proposed() -> None:
    target = torch.tensor([[4, 5, 6]] * 3)
    verdict = verify_greedy(target, proposals_BK=target[:, :2], num_proposed_B=torch.tensor([0, 1, 2]))
    assert verdict.accepted_B.tolist() == [0, 1, 2]
    assert verdict.next_token_B.tolist() == [4, 5, 6]


def test_vocabulary_of_offsets_is_its_own_inverse() -> None:
    ids = torch.tensor([1, 4, 6, 2])
    vocabulary = DraftVocabulary.of_offsets(ids - torch.arange(4), vocab_size=8)
    assert vocabulary.target_id_D.tolist() == ids.tolist()
    assert vocabulary.draft_id_V.tolist() == [-1, 0, 3, -1, 1, -1, 2, -1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(3, 10).bfloat16()
    expected = logits.float().log_softmax(-1)
    records = token_logprobs(logits, token_ids=[4, 9], num_top=2)
    assert [r.token_id for r in records] == [4, 9]
    for t, record in enumerate(records):
        assert record.logprob == pytest.approx(expected[t, record.token_id].item(), abs=1e-5)
        values, ids = expected[t].topk(2)
        assert [i for i, _ in record.top] == ids.tolist()
        assert [v for _, v in record.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert token_logprobs(logits, token_ids=[1], num_top=0)[0].top == ()


def test_ties_with_the_last_token_kept_by_top_p_are_kept() -> None:
    logits = torch.tensor([[[2.0, 1.0, 1.0, 0.0]]])
    p = target_distribution(
        logits, options=LogitOptions.of([replace(BASE, top_p=0.7)]), history=None, proposals_BK=_no_proposals(1)
    )
    assert (p[0, 0] > 0).tolist() == [True, True, True, False]


def test_a_missing_history_is_named() -> None:
    for params in (replace(BASE, presence_penalty=1.0), replace(BASE, seed=1)):
        with pytest.raises(ValueError, match="history"):
            verify(
                torch.zeros(1, 1, 8),
                options=LogitOptions.of([params]),
                uniform_BT=torch.rand(1, 1),
                proposals=_proposals(_no_proposals(1)),
            )


def test_temperatures_too_small_to_divide_by_are_greedy() -> None:
    assert distribution.is_greedy(replace(BASE, temperature=1e-7))
    assert not distribution.is_greedy(replace(BASE, temperature=1e-4))
