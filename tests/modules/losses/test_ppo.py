"""The policy loss has the gradient of expected acceptance: exact enumeration of toys, against finite differences.

A toy is a round of K proposals over V target tokens, of which the draft knows the first D. The target's distribution
of every state (a sequence of proposals) is random; the draft's logits are linear in random features of the state, so
that states share parameters. J and the expected gradient of the loss are sums over all D^K sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aurora_lit.modules.losses.ppo import (
    acceptance_gae,
    clipped_policy_loss,
    entropy,
    explained_variance,
    policy_ratio,
    survival,
    value_loss,
)

D, V, F = 3, 4, 2
MODES = ("argmax", "own_draw")
State = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A round's distributions by state; `mode`: how proposals are verified."""

    mode: str
    p_by_state: dict[State, Tensor]
    features_by_state: dict[State, Tensor]
    num_proposals: int
    temperature: float = 1.0

    def q(self, theta_FD: Tensor, state: State) -> Tensor:
        return torch.softmax(self.features_by_state[state] @ theta_FD / self.temperature, -1)

    def accept(self, state: State, action: int) -> Tensor:
        """c(a)."""
        p_V = self.p_by_state[state]
        return (p_V.argmax() == action).double() if self.mode == "argmax" else p_V[action]

    def expected(self, theta_FD: Tensor, state: State = ()) -> Tensor:
        """J(s): proposals accepted from here on, by its definition."""
        if len(state) == self.num_proposals:
            return theta_FD.new_zeros(())
        q_D = self.q(theta_FD, state)
        ahead_D = torch.stack([1 + self.expected(theta_FD, (*state, a)) for a in range(D)])
        accept_D = torch.stack([self.accept(state, a) for a in range(D)])
        return (q_D * accept_D * ahead_D).sum()


def toy(mode: str, *, num_proposals: int = 3, seed: int = 0, temperature: float = 1.0) -> tuple[Toy, Tensor]:
    """A random toy, and parameters of its draft."""
    gen = torch.Generator().manual_seed(seed)
    states = [s for length in range(num_proposals) for s in itertools.product(range(D), repeat=length)]
    made = Toy(
        mode=mode,
        p_by_state={s: torch.softmax(1.5 * torch.randn(V, generator=gen, dtype=torch.float64), -1) for s in states},
        features_by_state={s: torch.randn(F, generator=gen, dtype=torch.float64) for s in states},
        num_proposals=num_proposals,
        temperature=temperature,
    )
    return made, torch.randn(F, D, generator=gen, dtype=torch.float64)


def surrogate(
    case: Toy,
    theta_FD: Tensor,
    behaviour_FD: Tensor,
    value_of: dict[State, Tensor],
    *,
    gae_lambda: float,
    clip: float = 0.2,
) -> Tensor:
    """The expected loss over all rounds of the behaviour policy."""
    total = theta_FD.new_zeros(())
    K = case.num_proposals
    for actions in itertools.product(range(D), repeat=K):
        states = [actions[:t] for t in range(K)]
        old_KD = torch.stack([case.q(behaviour_FD, s) for s in states])
        new_KD = torch.stack([case.q(theta_FD, s) for s in states])
        index_K1 = torch.tensor(actions)[:, None]
        old_K, new_K = (x.gather(1, index_K1)[:, 0] for x in (old_KD, new_KD))
        accept_K = torch.stack([case.accept(s, a) for s, a in zip(states, actions, strict=True)])
        value_K1 = torch.stack([*(value_of[s] for s in states), torch.zeros((), dtype=torch.float64)])
        advantage_K = acceptance_gae(accept_K, value_K1, gae_lambda)
        ratio_K = policy_ratio(new_K.log(), old_K.log())
        loss_K, _ = clipped_policy_loss(ratio_K, advantage_K, survival(accept_K), clip=clip)
        total = total + old_K.prod() * loss_K.sum()
    return total


def finite_differences(case: Toy, theta_FD: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(theta_FD)
    for index in itertools.product(range(F), range(D)):
        up, down = theta_FD.clone(), theta_FD.clone()
        up[index] += step
        down[index] -= step
        gradient[index] = (case.expected(up) - case.expected(down)) / (2 * step)
    return gradient


def gradient_of_loss(case: Toy, theta_FD: Tensor, value_of: dict[State, Tensor], **options: object) -> Tensor:
    """The expected gradient on policy, where ρ is 1."""
    moving = theta_FD.clone().requires_grad_()
    loss = surrogate(case, moving, theta_FD, value_of, **options)  # type: ignore[arg-type]
    return torch.autograd.grad(loss, moving)[0]


def exact_values(case: Toy, theta_FD: Tensor) -> dict[State, Tensor]:
    return {s: case.expected(theta_FD, s) for s in case.p_by_state}


def wrong_values(case: Toy, seed: int = 5) -> dict[State, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {s: 3 * torch.rand((), generator=gen, dtype=torch.float64) for s in case.p_by_state}


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 0.02 * b.norm())


# -- on policy: the gradient of J ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("seed", "num_proposals", "temperature"), [(0, 3, 1.0), (1, 3, 0.6), (2, 2, 1.7), (3, 1, 1.0)])
def test_with_lambda_1_the_gradient_is_that_of_j_whatever_the_values(
    mode: str, seed: int, num_proposals: int, temperature: float
) -> None:
    case, theta = toy(mode, seed=seed, num_proposals=num_proposals, temperature=temperature)
    expected = finite_differences(case, theta)
    for values in (wrong_values(case), exact_values(case, theta)):
        got = gradient_of_loss(case, theta, values, gae_lambda=1.0)
        torch.testing.assert_close(got, -expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_with_exact_values_the_gradient_is_that_of_j_whatever_lambda(mode: str, gae_lambda: float) -> None:
    case, theta = toy(mode, seed=4)
    got = gradient_of_loss(case, theta, exact_values(case, theta), gae_lambda=gae_lambda)
    torch.testing.assert_close(got, -finite_differences(case, theta), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_with_wrong_values_a_smaller_lambda_is_biased(mode: str) -> None:
    case, theta = toy(mode, seed=4)
    got = gradient_of_loss(case, theta, wrong_values(case), gae_lambda=0.5)
    assert differs(got, -finite_differences(case, theta))


# -- off policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_ratio_corrects_for_an_older_draft(mode: str) -> None:
    """A single proposal drawn from an older draft still gives the gradient of J at the present one."""
    case, theta = toy(mode, num_proposals=1, seed=7)
    behaviour = theta + 0.7 * torch.randn(F, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moving = theta.clone().requires_grad_()
    loss = surrogate(case, moving, behaviour, wrong_values(case), gae_lambda=1.0, clip=1e3)
    got = torch.autograd.grad(loss, moving)[0]
    torch.testing.assert_close(got, -finite_differences(case, theta), rtol=1e-6, atol=1e-9)


def test_the_clip_stops_the_gradient_of_ratios_that_have_moved_far_enough() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1, 0.9], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    reached = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.25])
    loss, clipped = clipped_policy_loss(ratio, advantage, reached, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.2, 1.5, -0.55, 0.225]))
    assert clipped.tolist() == [False, True, True, False, False, False]
    loss.sum().backward()
    assert ratio.grad is not None
    torch.testing.assert_close(ratio.grad, torch.tensor([-1.0, 0.0, 0.0, 1.0, -0.5, 0.25]))
    wide, _ = clipped_policy_loss(ratio, advantage, reached, clip=0.6)
    assert not torch.equal(wide, loss)


def test_a_policy_ratio_stays_finite() -> None:
    logprob = torch.tensor([-1.0, -1000.0, -0.5], requires_grad=True)
    ratio = policy_ratio(logprob, torch.tensor([-1000.0, -1.0, -0.5]))
    assert ratio.isfinite().all()
    assert ratio[2] == 1.0


# -- the parts ------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    accept, value = torch.tensor([0.5, 0.8, 0.0]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    # δ = [0.5·1.5 − 1, 0.8·1 − 0.5, 0]; the round has two proposals.
    torch.testing.assert_close(acceptance_gae(accept, value, 0.0), torch.tensor([-0.25, 0.3, 0.0]))
    torch.testing.assert_close(acceptance_gae(accept, value, 0.5), torch.tensor([-0.25 + 0.5 * 0.5 * 0.3, 0.3, 0.0]))
    returns = acceptance_gae(accept, value, 1.0) + value[:-1]
    torch.testing.assert_close(returns, torch.tensor([0.5 + 0.5 * 0.8, 0.8, 0.0]))
    torch.testing.assert_close(survival(accept), torch.tensor([1.0, 0.5, 0.4]))


def test_value_loss_weights_proposals_by_survival() -> None:
    value = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = value_loss(value, torch.tensor([1.5, 0.0]), torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(loss, torch.tensor((1.0 + 0.25 * 4) / 1.25))
    loss.backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.tensor([-2.0, 0.25 * 4.0]) / 1.25)


def test_explained_variance_of_exact_constant_and_inverted_values() -> None:
    returns, weight = torch.tensor([0.0, 1.0, 2.0, 50.0]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    for value, expected in ((returns, 1.0), (torch.full((4,), 7.0), 0.0), (2 - returns, -3.0)):
        assert explained_variance(value, returns, weight) == pytest.approx(expected)


def test_entropy_in_nats() -> None:
    torch.testing.assert_close(entropy(torch.full((4,), 0.25).log()), torch.tensor(4.0).log())
