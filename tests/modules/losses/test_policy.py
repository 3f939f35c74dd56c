"""The policy loss of sampled rounds has the gradient of the expected number of accepted proposals, and training on it
raises acceptance.

The toys are tiny models whose draft has a vocabulary of four tokens, so that all rounds of two proposals can be
enumerated.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, draft_module, random_draft, save_model
from support.toy_rounds import VERIFIED, chain_logprobs, rounds, some_rounds
from torch import Tensor

from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.objective import OnlineWeights

D = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision="fp32")


def greedy_vocabulary(target: Target, ids_1T: Tensor) -> Tensor:
    """D tokens, among them the two that the target generates greedily at either root."""
    likely: list[int] = []
    for root in (5, 8):
        text = ids_1T[:, : root + 1]
        for _ in range(2):
            best_11 = target.logits(target.in_torch.forward_uncached(text)[1])[:, -1:].argmax(-1)
            text = torch.cat([text, best_11], 1)
            likely.append(int(best_11))
    others = [token for token in (11, 23, 37, 41) if token not in likely]
    return torch.tensor(sorted([*dict.fromkeys(likely), *others][:D]))


def in_double(record: Any) -> Any:
    """The record with its floating-point tensors in fp64."""
    return replace(
        record,
        **{k: v.double() for k, v in vars(record).items() if isinstance(v, Tensor) and v.is_floating_point()},
    )


class EnumeratedRounds:
    """All rounds of two proposals at two roots of a text; J by its definition, not by the code under test."""

    def __init__(self, target: Target, verified: str, *, draft_temperature: float = 1.0, **weights: float) -> None:
        draft = random_draft(target, draft_vocab_size=D)
        ids_1T = torch.randint(0, VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
        draft.set_vocabulary(greedy_vocabulary(target, ids_1T))
        ids = draft.draft_token_ids.tolist()
        self.module = draft_module(target, draft, online=OnlineWeights(**weights), num_steps=2).double()
        self.paths = list(itertools.product(range(D), repeat=2))
        proposed = [(0, root, (ids[a], ids[b])) for root in (5, 8) for a, b in self.paths]
        batch = rounds(target, ids_1T, proposed, verified=verified, draft_temperature=draft_temperature)
        self.batch = replace(batch, traces=in_double(batch.traces), rounds=in_double(batch.rounds))
        self.verified, self.temperature = verified, VERIFIED[verified]

    def logq(self) -> tuple[Tensor, Tensor]:
        """log q of both proposals of every round [Q, 2], and over the vocabulary [Q, 2, D]."""
        logq_QKD = chain_logprobs(self.module, self.batch)
        index_QK = torch.tensor(self.paths * 2)
        return logq_QKD.gather(2, index_QK[..., None])[..., 0], logq_QKD

    def expected(self) -> Tensor:
        """J, averaged over the roots: Σ_ab q(a) q(b|a) (c_a + c_a c_b)."""
        served = self.batch.rounds
        q_QK = self.logq()[0].exp()
        logits_QKD = served.path_last_QKH @ self.module.head_VdH.T / (self.temperature or 1.0)
        p_QKD = (logits_QKD - served.path_lse_QK[..., None]).exp()
        p_QK = p_QKD.gather(2, torch.tensor(self.paths * 2)[..., None])[..., 0]
        equal_QK = served.path_top_QK == served.proposal_QK
        c_QK = equal_QK.double() if self.verified == "argmax" else p_QK
        return (q_QK.prod(1) * c_QK.cumprod(1).sum(1)).sum() / 2

    def drawn(self, index_Q: Tensor) -> OnlineBatch:
        """The batch with these rounds, as drawn from the present draft."""
        behaviour_QK = self.logq()[0].detach()
        drawn = replace(self.batch.rounds, behaviour_logprob_QK=behaviour_QK)
        return some_rounds(replace(self.batch, rounds=drawn), index_Q.tolist())

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that the policy loss trains."""
        return [p for name, p in self.module.draft.named_parameters() if "head" not in name]


@pytest.mark.parametrize(("verified", "draft_temperature"), [("argmax", 0.7), ("own_draw", 1.0)])
def test_the_policy_term_has_the_gradient_of_expected_acceptance(
    verified: str, draft_temperature: float, target: Target
) -> None:
    """Each round weighted by its probability. λ is 1, since the value head is random."""
    case = EnumeratedRounds(target, verified, draft_temperature=draft_temperature, gae_lambda=1.0)
    parameters = case.parameters()
    probability_Q = case.logq()[0].detach().exp().prod(1)
    got = [torch.zeros_like(p) for p in parameters]
    for index in range(len(probability_Q)):
        report = case.module.training_step(case.drawn(torch.tensor([index])))
        assert report.policy.num_rounds == 1
        torch.testing.assert_close(report.policy.mean_ratio, torch.ones_like(report.policy.mean_ratio))
        gradient = torch.autograd.grad(report.policy.policy_loss, parameters, allow_unused=True)
        for total, part in zip(got, gradient, strict=True):
            total += probability_Q[index] / 2 * (0.0 if part is None else part)
    loss = case.module.training_step(case.drawn(torch.tensor([0]))).policy.policy_loss
    assert torch.autograd.grad(loss, case.module.draft.lm_head.weight, allow_unused=True) == (None,)
    want = torch.autograd.grad(case.expected(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-5, atol=1e-8)

    # Finite differences of J along the gradient plus a random direction; attention is in single precision.
    gen = torch.Generator().manual_seed(0)
    steepest = torch.cat([g.flatten() for g in got])
    noise = torch.randn(steepest.shape, generator=gen, dtype=torch.float64)
    direction = steepest / steepest.norm() + noise / noise.norm()
    values = []
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * 1e-3 * direction, parameters)
        with torch.no_grad():
            values.append(float(case.expected()))
    assert (values[1] - values[0]) / 2e-3 == pytest.approx(float(steepest @ direction), rel=2e-3)
    assert steepest.norm() > 0.1


def test_a_draft_that_learns_from_sampled_rounds_alone_is_accepted_more(target: Target) -> None:
    case = EnumeratedRounds(target, "own_draw")
    before = float(case.expected().detach())
    optimizer = torch.optim.AdamW(case.module.draft.parameters(), lr=3e-3, weight_decay=0.0)
    gen = torch.Generator().manual_seed(0)
    for _ in range(40):
        probability_Q = case.logq()[0].detach().exp().prod(1)
        batch = case.drawn(torch.multinomial(probability_Q, 32, replacement=True, generator=gen))
        report = case.module.training_step(batch)
        optimizer.zero_grad()
        (report.policy.policy_loss + report.policy.value_loss).backward()
        optimizer.step()
    after = float(case.expected().detach())
    assert after > before + 0.5
