"""PPO over all actions: its gradient is that of acceptance where q_old = q, and stops where q has left the clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_lit.modules.losses import fused_lk
from aurora_lit.modules.losses.fused_lk import OldRows, TargetRows, fused_lk_loss
from aurora_lit.modules.losses.lk import KL_DECAY, overlap
from aurora_lit.modules.losses.ppo import (
    CLIP,
    advantage,
    is_stopped,
    overlap_credit,
    ppo_loss,
    stopped_mass,
)

N, D, H, G = 12, 20, 5, 7


def law(seed: int, *, lead: tuple[int, ...] = (N,)) -> Tensor:
    """Logits of [..., D]; their softmax times 0.9 is a p whose other tokens the draft does not have."""
    return 2 * torch.randn(*lead, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("values", ["V = 0", "V fixed"])
def test_where_positions_are_used_once_the_gradient_is_that_of_acceptance(values: str) -> None:
    p, logits = 0.9 * law(0).softmax(-1), law(1).requires_grad_()
    gain = torch.ones(N, dtype=torch.float64) if values == "V = 0" else torch.linspace(1, 4, N, dtype=torch.float64)
    q = logits.softmax(-1)
    old = q.detach()
    credit, alpha = overlap_credit(p, old), overlap(p, q)
    found = torch.autograd.grad(ppo_loss(q, old, advantage(credit, old, gain)).sum(), logits, retain_graph=True)
    expected = torch.autograd.grad((gain * (1 - alpha)).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert found[0].abs().sum(-1).median() > 1e-3


def test_with_exact_values_the_steps_add_up_to_the_gradient_of_the_accepted_length() -> None:
    """∇ Σ_t Π_{i≤t} α_i = Σ_t S_t (1 + V_{t+1}) ∇α_t, over a chain of N steps."""
    p, logits = 0.9 * law(2).softmax(-1), (law(2) + 0.3 * law(3)).requires_grad_()
    q = logits.softmax(-1)
    alpha = overlap(p, q)
    reached, value = torch.ones(N + 1, dtype=torch.float64), torch.zeros(N + 1, dtype=torch.float64)
    for step in range(N):
        reached[step + 1] = reached[step] * alpha[step].detach()
    for step in reversed(range(N)):
        value[step] = alpha[step].detach() * (1 + value[step + 1])
    credit = advantage(overlap_credit(p, q.detach()), q.detach(), 1 + value[1:])
    loss = (reached[:-1] * ppo_loss(q, q.detach(), credit)).sum()
    found = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = torch.autograd.grad(-alpha.cumprod(0).sum(), logits)
    assert float(value[0]) > 1.0
    torch.testing.assert_close(found, expected)


def test_the_clipped_gradient_is_that_of_the_formula() -> None:
    old, p = law(4).softmax(-1), 0.9 * law(5).softmax(-1)
    logits = (law(4) + 0.4 * law(6)).requires_grad_()
    q = logits.softmax(-1)
    of_token = advantage(overlap_credit(p, old), old, torch.full((N,), 1.7, dtype=torch.float64))
    ratio = q / old
    formula = -(old * torch.minimum(ratio * of_token, ratio.clamp(1 - CLIP, 1 + CLIP) * of_token)).sum(-1)
    found = torch.autograd.grad(ppo_loss(q, old, of_token).sum(), logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(formula.sum(), logits))
    stopped = is_stopped(q, old, of_token)
    assert 0.1 < float(stopped.double().mean()) < 0.9


def test_what_a_clip_stops_is_told_by_how_probable_it_was() -> None:
    """A token of q_old = 0.001 that the target wants stops at 0.0012; one of 0.4 is far from its end."""
    old, p = torch.tensor([[0.001, 0.4, 0.599]]), torch.tensor([[0.3, 0.45, 0.2]])
    q = torch.tensor([[0.0013, 0.42, 0.5787]])
    stopped = is_stopped(q, old, advantage(overlap_credit(p, old), old, torch.ones(1)))
    torch.testing.assert_close(stopped_mass(p, old, stopped), torch.tensor([[0.3, 0.3], [0.0, 0.0], [0.0, 0.65]]))


def case() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "h_NH": randn(N, H).requires_grad_(),
        "weight_DH": randn(D, H).requires_grad_(),
        "row_weight_N": torch.rand(N, generator=generator, dtype=torch.float64),
        "target": TargetRows(h_NG=randn(N, G), weight_DG=randn(D, G)),
        "gain_N": 1 + torch.rand(N, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("used_again", [False, True])
@pytest.mark.parametrize("chunk", [5, 256])
def test_the_fused_loss_is_kl_and_ppo(used_again: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lk, "_CHUNK_ROWS", chunk)
    inputs = case()
    h, weight = inputs["h_NH"], inputs["weight_DH"]
    p, q = (inputs["target"].h_NG @ inputs["target"].weight_DG.T).softmax(-1), (h @ weight.T).softmax(-1)
    old = None
    q_old = q.detach()
    if used_again:
        noise = torch.randn(N, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        old = OldRows(h_NH=h.detach() + 0.2 * noise, weight_DH=0.9 * weight.detach())
        q_old = (old.h_NH @ old.weight_DH.T).softmax(-1)
    loss, stats = fused_lk_loss(**inputs, old=old)
    of_token = advantage(overlap_credit(p, q_old), q_old, inputs["gain_N"])
    share = torch.exp(-KL_DECAY * overlap(p, q).detach())
    kl = (p * (p.log() - q.log())).sum(-1)
    ppo = ppo_loss(q, q_old, of_token)
    expected = (inputs["row_weight_N"] * (share * kl + (1 - share) * ppo)).sum()
    for ours, theirs in zip(*(torch.autograd.grad(each, [h, weight]) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    value = inputs["row_weight_N"] * (share * kl + (1 - share) * inputs["gain_N"] * (1 - overlap(p, q)))
    torch.testing.assert_close(loss, value.sum())
    stopped = is_stopped(q.detach(), q_old, of_token)
    assert bool(stopped.any()) == used_again
    mass = stopped_mass(p, q_old, stopped) if used_again else torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(stats.stopped_R2, mass)
