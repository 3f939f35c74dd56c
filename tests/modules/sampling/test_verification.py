"""Verification of greedy, seeded and mixed batches; the distribution of unseeded ones is in test_sampling_law.py."""

from dataclasses import replace

import pytest
import torch
from support.toy_sampling import BASE, GREEDY, OPTIONS, Toy, chain_proposals, history, no_proposals

from aurora_lit.modules.sampling.distribution import LogitOptions, target_distribution
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.verification import verify, verify_chain_by_equality
from aurora_lit.request import SamplingParams


def test_a_mixed_batch_gives_every_sequence_what_it_gets_alone() -> None:
    toy = Toy.random(V=8, D=5, seed=1)
    params = [*OPTIONS.values(), GREEDY, replace(GREEDY, logit_bias={2: 50.0}), replace(BASE, seed=3)]
    tokens = torch.randint(8, (len(params), 2))
    together = target_distribution(
        toy.logits(tokens), options=LogitOptions.from_params(params), history=history(len(params)), proposals_BK=tokens
    )
    uniform = torch.rand(len(params), 3, dtype=torch.float64)
    result = verify(
        toy.logits(tokens),
        options=LogitOptions.from_params(params),
        history=history(len(params)),
        uniform_BT=uniform,
        proposals=chain_proposals(tokens),
    )
    for row, one in enumerate(params):
        token, options = tokens[row : row + 1], LogitOptions.from_params([one])
        alone = target_distribution(toy.logits(token), options=options, history=history(1), proposals_BK=token)
        torch.testing.assert_close(together[row], alone[0])
        single = verify(
            toy.logits(token),
            options=options,
            history=history(1),
            uniform_BT=uniform[row : row + 1],
            proposals=chain_proposals(token),
        )
        assert single.num_accepted_B.item() == result.num_accepted_B[row].item()
        assert single.next_token_B.item() == result.next_token_B[row].item()


def test_greedy_emits_nothing_but_the_argmax_whatever_is_proposed() -> None:
    gen = torch.Generator().manual_seed(0)
    B, K, V = 2000, 4, 6
    logits = torch.randn(B, K + 1, V, generator=gen)
    best = logits.argmax(-1)
    tokens = torch.where(torch.rand(B, K, generator=gen) < 0.7, best[:, :K], torch.randint(V, (B, K), generator=gen))
    num = torch.randint(K + 1, (B,), generator=gen)
    result = verify(
        logits,
        options=LogitOptions.from_params([GREEDY] * B),
        uniform_BT=torch.rand(B, K + 1),
        proposals=Proposals(token_BK=tokens, num_proposed_B=num, q_BKD=None),
    )
    for row in range(B):
        accepted = int(result.num_accepted_B[row])
        assert accepted <= num[row]
        emitted = [*tokens[row, :accepted].tolist(), int(result.next_token_B[row])]
        assert emitted == best[row, : accepted + 1].tolist()
        assert accepted == num[row] or tokens[row, accepted] != best[row, accepted]


def test_a_greedy_batch_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("greedy sequences need no softmax")

    monkeypatch.setattr("aurora_lit.modules.sampling.verification.probabilities", refuse)
    logits = torch.randn(3, 1, 8)
    result = verify(
        logits,
        options=LogitOptions.from_params([GREEDY] * 3),
        uniform_BT=torch.rand(3, 1),
        proposals=no_proposals(3),
    )
    assert torch.equal(result.next_token_B, logits[:, 0].argmax(-1))


def test_greedy_applies_bias_and_penalties() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 0.0]]])
    for params, token in (
        (GREEDY, 1),
        (replace(GREEDY, logit_bias={3: 5.0}), 3),
        (replace(GREEDY, repetition_penalty=9.0), 2),
    ):
        result = verify(
            logits,
            options=LogitOptions.from_params([params]),
            history=history(1),
            uniform_BT=torch.rand(1, 1),
            proposals=no_proposals(1),
        )
        assert result.next_token_B.item() == token, params


def generate(toy: Toy, seeds: list[int], *, k: int, params: SamplingParams = BASE) -> list[tuple[int, ...]]:
    """Three tokens a seed, in rounds of up to k random proposals."""
    out = []
    options = LogitOptions.from_params([replace(params, seed=seed) for seed in seeds])
    emitted: list[list[int]] = [[] for _ in seeds]
    for row in range(len(seeds)):  # one at a time: the batch's other sequences are dummies
        while len(emitted[row]) < 3:
            start = len(emitted[row])
            n = min(k, 2 - start)
            tokens = torch.randint(8, (len(seeds), n))
            prefix = torch.tensor([emitted[row]] * len(seeds), dtype=torch.int64).view(len(seeds), start)
            chain = torch.cat([prefix, tokens], 1)
            result = verify(
                toy.logits(chain)[:, start:],
                options=options,
                history=history(len(seeds), output=prefix),
                uniform_BT=torch.rand(len(seeds), n + 1),
                proposals=chain_proposals(tokens),
            )
            accepted = int(result.num_accepted_B[row])
            emitted[row] += [*tokens[row, :accepted].tolist(), int(result.next_token_B[row])]
        out.append(tuple(emitted[row]))
    return out


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_seed_repeats_whatever_the_draft_the_rounds_and_the_batch(name: str) -> None:
    toy, seeds = Toy.random(V=8, D=5, seed=2), [7, -1, 2**63, 12345, 7]
    plain = generate(toy, seeds, k=0, params=OPTIONS[name])
    for k in (1, 2):
        assert generate(toy, seeds, k=k, params=OPTIONS[name]) == plain
    assert generate(toy, seeds[:1], k=2, params=OPTIONS[name]) == plain[:1]
    assert plain[0] == plain[4]
    assert len(set(generate(toy, list(range(60)), k=0, params=OPTIONS[name]))) > 10


def test_a_sequence_accepts_no_more_than_it_proposed() -> None:
    target = torch.tensor([[4, 5, 6]] * 3)
    result = verify_chain_by_equality(target, proposals_BK=target[:, :2], num_proposed_B=torch.tensor([0, 1, 2]))
    assert result.num_accepted_B.tolist() == [0, 1, 2]
    assert result.next_token_B.tolist() == [4, 5, 6]


def test_a_missing_history_is_named() -> None:
    for params in (replace(BASE, presence_penalty=1.0), replace(BASE, seed=1)):
        with pytest.raises(ValueError, match="history"):
            verify(
                torch.zeros(1, 1, 8),
                options=LogitOptions.from_params([params]),
                uniform_BT=torch.rand(1, 1),
                proposals=no_proposals(1),
            )
