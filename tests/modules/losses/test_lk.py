"""The fused loss equals its definition in value, gradient and statistics; the closed forms equal enumeration."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from aurora_lit.kernels import lk_loss as lk_loss_kernel
from aurora_lit.kernels import native
from aurora_lit.modules.losses import fused_lk
from aurora_lit.modules.losses.fused_lk import TargetRows, fused_lk_loss
from aurora_lit.modules.losses.lk import acceptance_given_token, lk_loss, overlap
from aurora_lit.modules.sampling.noise import gumbel

N, H, G, D, V, K = 13, 5, 7, 11, 16, 3


def _case(*, steps: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Hidden states and heads; the draft vocabulary is the first D of V target tokens, so p sums to less than 1."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    lead = (N,) if steps is None else (steps, N)
    target_h, target_head = randn(N, G), randn(V, G)
    return {
        "h_NH": randn(*lead, H).requires_grad_(),
        "weight_DH": randn(D, H).requires_grad_(),
        "row_weight_N": torch.rand(*lead, generator=gen, dtype=torch.float64).to(dtype),
        "target": TargetRows(h_NG=target_h, weight_DG=target_head[:D], lse_N=(target_h @ target_head.T).logsumexp(-1)),
    }


def _target_p(case: dict[str, Any]) -> torch.Tensor:
    target = case["target"]
    p: torch.Tensor = (target.h_NG @ target.weight_DG.T - target.lse_N[:, None]).exp()
    return p


def _reference(case: dict[str, Any]) -> torch.Tensor:
    q = (case["h_NH"] @ case["weight_DH"].T).softmax(-1)
    return (case["row_weight_N"] * lk_loss(_target_p(case), q)).sum()


@pytest.mark.parametrize("steps", [None, K])
@pytest.mark.parametrize("chunk", [1, 6, 256])
def test_fused_loss_and_gradients_equal_autograd_of_the_definition(
    steps: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_lk, "_CHUNK_ROWS", chunk)
    case = _case(steps=steps)
    loss, stats = fused_lk_loss(**case)
    expected = _reference(case)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(3 * loss, [case["h_NH"], case["weight_DH"]])
    want = torch.autograd.grad(3 * expected, [case["h_NH"], case["weight_DH"]])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
    p, q = _target_p(case), (case["h_NH"] @ case["weight_DH"].T).softmax(-1)
    torch.testing.assert_close(stats.alpha_N, overlap(p.expand_as(q), q))
    torch.testing.assert_close(stats.kl_N, (p * (p.log() - q.log())).sum(-1))
    assert torch.equal(stats.top1_match_N, q.argmax(-1) == p.argmax(-1))
    assert not stats.alpha_N.requires_grad


def test_gradients_equal_finite_differences_with_a_constant_kl_share() -> None:
    case = _case()
    p, row_weight = _target_p(case), case["row_weight_N"]
    _, stats = fused_lk_loss(**case)
    kl_share = torch.exp(-3 * stats.alpha_N)

    def fixed_mix(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q = (h @ weight.T).softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1)
        return (row_weight * (kl_share * kl + (1 - kl_share) * (1 - overlap(p, q)))).sum()

    loss, _ = fused_lk_loss(**case)
    got = torch.autograd.grad(loss, [case["h_NH"], case["weight_DH"]])
    step = 1e-6
    for index, name in enumerate(("h_NH", "weight_DH")):
        inputs = [case["h_NH"].detach(), case["weight_DH"].detach()]
        numeric = torch.zeros_like(case[name])
        for flat in range(numeric.numel()):
            shift = torch.zeros(numeric.numel(), dtype=torch.float64)
            shift[flat] = step
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[index] = inputs[index] + sign * shift.view_as(numeric)
                ends.append(fixed_mix(*moved))
            numeric.view(-1)[flat] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(got[index], numeric, rtol=1e-5, atol=1e-7)


def test_without_a_log_sum_exp_the_targets_distribution_is_that_within_the_given_rows() -> None:
    case = _case()
    within = replace(case["target"], lse_N=(case["target"].h_NG @ case["target"].weight_DG.T).logsumexp(-1))
    loss, _ = fused_lk_loss(**{**case, "target": replace(case["target"], lse_N=None)})
    torch.testing.assert_close(loss, _reference({**case, "target": within}))


def test_bfloat16_products_stay_close_and_gradients_keep_their_own_type() -> None:
    case = _case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = fused_lk_loss(**case)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, _reference(case), rtol=2e-2, atol=1e-2)
    grads = torch.autograd.grad(loss, [case["h_NH"], case["weight_DH"]])
    want = torch.autograd.grad(_reference(case), [case["h_NH"], case["weight_DH"]])
    for g, w in zip(grads, want, strict=True):
        assert g.dtype == torch.float32
        assert torch.cosine_similarity(g.flatten(), w.flatten(), dim=0) > 0.999


def test_frozen_head_gets_no_gradient() -> None:
    case = _case()
    case["weight_DH"] = case["weight_DH"].detach()
    loss, _ = fused_lk_loss(**case)
    loss.backward()
    assert case["h_NH"].grad is not None


def test_a_perfect_draft_is_always_accepted_and_has_no_loss() -> None:
    p = torch.rand(4, D, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(overlap(p, p), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(lk_loss(p, p), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def both_choose(p_V: torch.Tensor, q_V: torch.Tensor) -> float:
    """Σ_i 1 / Σ_j max(p_j/p_i, q_j/q_i): how probably target and draft choose the same token with shared noise."""
    inside = (p_V > 0) & (q_V > 0)
    ratio_VV = torch.maximum(p_V / p_V[inside, None], q_V / q_V[inside, None])
    return float((1 / ratio_VV.sum(-1)).sum())


def law(seed: int, *, size: int, scale: float = 1.5) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(size, generator=gen, dtype=torch.float64)).softmax(-1)


def without(p_V: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """The distribution without some tokens, as of a draft whose vocabulary does not have them."""
    q_V = p_V.clone()
    q_V[tokens] = 0
    return q_V / q_V.sum()


LAWS = {
    "2 tokens": (law(0, size=2), law(1, size=2)),
    "5 tokens": (law(2, size=5), law(3, size=5)),
    "alike": (law(4, size=6), 0.9 * law(4, size=6) + 0.1 * law(5, size=6)),
    "a smaller draft vocabulary": (law(6, size=8), without(law(7, size=8), [1, 6])),
    "no common token": (without(law(8, size=6), [0, 1, 2]), without(law(9, size=6), [3, 4, 5])),
    "the same": (law(10, size=7), law(10, size=7)),
}


@pytest.mark.parametrize("name", LAWS)
def test_shared_noise_accepts_with_the_probability_of_the_closed_form(name: str) -> None:
    """Both argmaxes with the noise that serves, over many keys; and the closed form given the target's token."""
    (p_V, q_V), draws = LAWS[name], 60_000
    noise_NV = gumbel(torch.arange(draws), torch.arange(draws) % 7, torch.arange(len(p_V))).double()
    own_N, proposed_N = (p_V.log() + noise_NV).argmax(-1), (q_V.log() + noise_NV).argmax(-1)
    expected = both_choose(p_V, q_V)
    error = max((expected * (1 - expected) / draws) ** 0.5, 1e-9)
    assert abs(float((own_N == proposed_N).double().mean()) - expected) < 4 * error
    vocabulary_D = q_V.nonzero()[:, 0]
    p_D, q_D = p_V[vocabulary_D], q_V[vocabulary_D]
    given_D = torch.stack([acceptance_given_token(p_D, q_D, torch.tensor(i)) for i in range(len(p_D))])
    assert float((p_D * given_D).sum()) == pytest.approx(expected, abs=1e-12)
    for i, token in enumerate(vocabulary_D.tolist()):
        drawn_N = own_N == token
        count = max(1, int(drawn_N.sum()))
        rate = float((proposed_N[drawn_N] == token).double().mean()) if drawn_N.any() else 0.0
        chance = float(given_D[i]) if drawn_N.any() else 0.0
        assert abs(rate - chance) < 4.5 * max((chance * (1 - chance) / count) ** 0.5, 1e-9)


def test_the_overlap_bounds_the_acceptance_with_shared_noise() -> None:
    """(1 − TV)/(1 + TV) ≤ acceptance ≤ 1 − TV (Daliri, Musco, Suresh 2025), here strictly between."""
    for seed in range(300):
        p_V, q_V = law(seed, size=2 + seed % 9), law(1000 + seed, size=2 + seed % 9, scale=0.2 + seed % 5)
        rate, alpha = both_choose(p_V, q_V), float(overlap(p_V, q_V))
        tv = float((p_V - q_V).abs().sum() / 2)
        assert alpha == pytest.approx(1 - tv)
        assert (1 - tv) / (1 + tv) <= rate + 1e-12
        assert rate <= alpha + 1e-12
    between = [(both_choose(p, q), float(overlap(p, q))) for p, q in (LAWS["5 tokens"], LAWS["alike"])]
    assert all(alpha / (2 - alpha) + 1e-3 < rate < alpha - 1e-3 for rate, alpha in between), between


def test_a_token_that_the_draft_does_not_propose_is_not_accepted() -> None:
    p_D, q_D = torch.tensor([0.5, 0.3]), torch.tensor([1.0, 0.0])
    given = acceptance_given_token(p_D.expand(2, 2), q_D.expand(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(given, torch.tensor([1.0, 0.0]))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_native_kernel_equals_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lk, "_CHUNK_ROWS", 3)
    K, N, D, H, G = 3, 21, 48, 24, 16
    gen = torch.Generator().manual_seed(3)
    target_h, target_weight = torch.randn(N, G, generator=gen), torch.randn(D, G, generator=gen)
    outside = torch.randn(N, generator=gen)
    lse = torch.logaddexp((target_h @ target_weight.t()).logsumexp(-1), outside)
    row_weight = torch.rand(K, N, generator=gen)
    row_weight[1, 4:7] = 0.0
    gain = 1 + torch.rand(K, N, generator=gen)
    results = []
    for uses_kernel in (True, False):
        monkeypatch.setattr(lk_loss_kernel, "is_supported", lambda logits, uses_kernel=uses_kernel: uses_kernel)
        h = torch.randn(K, N, H, generator=torch.Generator().manual_seed(5)).requires_grad_()
        weight = torch.randn(D, H, generator=torch.Generator().manual_seed(6)).requires_grad_()
        target = TargetRows(h_NG=target_h, weight_DG=target_weight, lse_N=lse)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, stats = fused_lk_loss(h_NH=h, weight_DH=weight, row_weight_N=row_weight, target=target, gain_N=gain)
        loss.backward()
        results.append((loss, stats.alpha_N, stats.kl_N, stats.top1_match_N, h.grad, weight.grad))
    for ours, expected in zip(*(result[:4] for result in results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5  # sums of other chunks
    for ours, expected in zip(*(result[4:] for result in results), strict=True):
        assert float((ours - expected).norm()) < tolerance * float(expected.norm())
