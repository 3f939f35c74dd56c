"""The losses of DraftModule: weights of positions, the online terms and their sum, PPO along chains and at rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, draft_batch, draft_module, random_draft, save_model, supervised_loss
from torch import Tensor

from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.chain_losses import _uniform
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.lk import KL_DECAY, lk_loss, overlap
from aurora_lit.modules.losses.objective import OnlineReport, OnlineWeights


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision="fp32")


def online_batch(target: Target) -> OnlineBatch:
    """Three texts, of which the second is replayed, and what was proposed in four rounds."""
    ids_BT = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    return OnlineBatch(
        traces=draft_batch(target, ids_BT),
        live_B=torch.tensor([True, False, True]),
        proposed_P=torch.arange(8, 17),
        tested_K=torch.tensor([4, 3, 1]),
        accepted_K=torch.tensor([3, 2, 1]),
    )


def module(target: Target, **changes: Any) -> DraftModule:
    return draft_module(target, random_draft(target), num_steps=3, **changes)


def step(target: Target, batch: OnlineBatch, weights: OnlineWeights | None = None, **changes: Any) -> OnlineReport:
    return module(target, online=weights or OnlineWeights(), **changes).training_step(batch)


# -- along traces --------------------------------------------------------------------------------------------------


def test_positions_without_weight_do_not_count(target: Target) -> None:
    """Of a batch where one text has weight 0 the other's statistics are those of that text alone."""
    module = draft_module(target, random_draft(target), num_steps=2)
    batch = draft_batch(target, torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2)))
    batch.weight_BT[1] = 0.0
    stats, mask_KBT = module.score(batch)
    alone, mask_K1T = module.score(draft_batch(target, batch.token_ids_BT[:1]))
    assert mask_KBT[:, 1].sum() == stats.alpha_N[:, 16:].sum() == 0
    assert torch.equal(mask_KBT[:, :1], mask_K1T)
    assert mask_K1T.sum(2)[:, 0].tolist() == [15, 14], "a chain begins before its target"
    torch.testing.assert_close(stats.alpha_N[:, :16], alone.alpha_N)
    batch.weight_BT[0] = 0.0
    assert module.score(batch)[1].sum() == 0
    with pytest.raises(ValueError, match="lse_BT is None"):
        module.score(replace(batch, lse_BT=None))


# -- the loss ------------------------------------------------------------------------------------------------------


def test_without_online_terms_and_later_steps_it_is_the_supervised_loss(target: Target) -> None:
    batch = replace(online_batch(target), live_B=torch.ones(3, dtype=torch.bool))
    made = draft_module(target, random_draft(target), num_steps=1, online=OnlineWeights())
    # Online the target's distribution is that within the draft vocabulary, and so are the positions that count.
    within = replace(
        batch.traces,
        lse_BT=(batch.traces.last_BTH @ made.head_VdH.T).logsumexp(-1),
        weight_BT=batch.traces.weight_BT * can_be_proposed(made, batch),
    )
    plain, online = supervised_loss(made, within), made.training_step(batch)
    share = within.weight_BT[:, 1:].sum() / batch.traces.weight_BT[:, 1:].sum()
    assert 0.5 < share < 1
    torch.testing.assert_close(online.loss, share * plain)
    torch.testing.assert_close(online.stats.alpha_N, made.score(within)[0].alpha_N)
    gradients = [torch.autograd.grad(loss, list(made.draft.parameters())) for loss in (plain, online.loss)]
    gradients[0] = [share * gradient for gradient in gradients[0]]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b.to_dense())


EVERY_STEP = OnlineWeights(certain_survival=0.0)
"""No chain ends by chance."""


def test_each_step_of_a_chain_counts_by_the_probability_that_it_is_reached(target: Target) -> None:
    batch = texts_alone(target)
    made = module(target, online=EVERY_STEP, value_weight=0.0)
    report = made.training_step(batch)
    p_BTD = target_distribution(made, batch)
    hidden_KBTH = made.unroll(batch.traces)
    B, T = batch.traces.token_ids_BT.shape
    expected = torch.zeros(())
    counts_BT = can_be_proposed(made, batch)
    for row in range(B):
        for first in range(1, T):
            reached = torch.tensor(1.0)
            for step in range(min(3, T - first)):
                assert report.mask_KBT[step, row, first + step] == counts_BT[row, first : first + step + 1].all()
                if not counts_BT[row, first + step]:
                    break
                q_D = made.draft.compute_logits(hidden_KBTH[step, row, first + step]).softmax(-1)
                p_D = p_BTD[row, first + step]
                expected = expected + reached * lk_loss(p_D, q_D)
                reached = reached * overlap(p_D, q_D).detach()
    mean = expected / (B * (T - 1))
    assert 10 < int(counts_BT[:, 1:].sum()) < B * (T - 1)
    torch.testing.assert_close(report.loss, mean)
    parameters = [p for n, p in made.draft.named_parameters() if "value" not in n]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (report.loss, mean)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.to_dense(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("certain", [pytest.param(0.2, marks=pytest.mark.slow), 1.0])
def test_chains_that_end_by_chance_have_the_loss_and_the_gradient_of_all_in_expectation(
    certain: float, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_lit.modules.losses.chain_losses.noise_bits", new_bits())
    batch = texts_alone(target, copies=10)
    made = module(target, online=EVERY_STEP, value_weight=0.5)
    parameters = [p for n, p in made.draft.named_parameters() if "value" not in n]

    def found(certain_survival: float) -> tuple[Tensor, Tensor, Tensor, float]:
        made.online = replace(made.online, certain_survival=certain_survival)
        report = made.training_step(batch)
        flat = torch.cat([g.to_dense().flatten() for g in torch.autograd.grad(report.loss, parameters)])
        return report.lk_live, flat, report.mask_KBT, float(report.mask_KBT.sum())

    loss, gradient, mask_KBT, steps = found(0.0)
    some = [found(certain) for _ in range(20)]
    losses = torch.stack([each[0] for each in some])
    assert abs(float(losses.mean() - loss)) < 4 * float(losses.std()) / len(some) ** 0.5
    assert float(losses.std()) > 0
    mean = torch.stack([each[1] for each in some]).mean(0)
    assert torch.nn.functional.cosine_similarity(mean, gradient, dim=0) > 0.999
    assert float(mean.norm() / gradient.norm()) == pytest.approx(1.0, abs=0.02)
    assert sum(each[3] for each in some) / len(some) < 0.97 * steps
    assert all(((each[2] > 0) <= (mask_KBT > 0)).all() for each in some)


def test_what_the_value_head_is_taught_is_the_expected_acceptance_though_chains_end_by_chance(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_lit.modules.losses.chain_losses.noise_bits", new_bits())
    batch = texts_alone(target, copies=20)

    def gradient(certain_survival: float, turns: int) -> Tensor:
        made = module(target, online=OnlineWeights(certain_survival=certain_survival), value_weight=1.0)
        weight = made.draft.value_head.weight
        each = [torch.autograd.grad(made.training_step(batch).loss, weight)[0] for _ in range(turns)]
        return torch.stack(each).mean(0)

    exact, mean = gradient(0.0, 1), gradient(1.0, 30)
    torch.testing.assert_close(mean, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


def new_bits() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In place of `noise_bits`: other uniform bits each time, where the loss has the same for the same states."""
    generator = torch.Generator().manual_seed(0)
    return lambda key_N, position_N, token_id: torch.randint(0, 2**32, token_id.shape, generator=generator)


def test_which_chains_end_depends_on_the_targets_states_alone_and_is_uniform() -> None:
    last_CH = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    numbers = torch.stack([_uniform(last_CH, step=step) for step in range(2)])
    assert torch.equal(_uniform(last_CH[1000:1005], step=1), numbers[1, 1000:1005])
    assert len(numbers.unique()) > 7990
    for share in (0.1, 0.5, 0.9):
        assert float((numbers < share).double().mean()) == pytest.approx(share, abs=0.02)
    assert abs(float(torch.corrcoef(numbers)[0, 1])) < 0.05


def texts_alone(target: Target, *, copies: int = 1) -> OnlineBatch:
    """The same texts, all live, without proposals; all of them several times if asked."""
    return OnlineBatch.without_rounds(online_batch(target).traces.select(torch.arange(3).repeat(copies)))


def can_be_proposed(made: DraftModule, batch: OnlineBatch) -> Tensor:
    """Whether the draft has the token after each position [B, T]; the last one's is not known."""
    counts_BT = torch.ones_like(batch.traces.token_ids_BT, dtype=torch.bool)
    counts_BT[:, :-1] = made.draft.t2d[batch.traces.token_ids_BT[:, 1:]]
    return counts_BT


def target_distribution(made: DraftModule, batch: OnlineBatch) -> Tensor:
    """The target's probabilities within the draft vocabulary [B, T, D]."""
    return (batch.traces.last_BTH @ made.head_VdH.T).softmax(-1)


def test_a_loss_over_sampled_tokens_has_the_gradient_of_the_whole_vocabulary(target: Target) -> None:
    """Averaged over many samples, for the hidden states and for the rows of the tokens that are in all of them."""
    batch = online_batch(target)
    short = replace(batch.traces, token_ids_BT=batch.traces.token_ids_BT % 8 + 8)
    batch = replace(batch, traces=short, proposed_P=batch.proposed_P[:0])
    made = module(target, online=EVERY_STEP, value_weight=0.0)

    def gradients(sampled_tokens: int) -> tuple[Tensor, Tensor]:
        made.online = replace(made.online, sampled_tokens=sampled_tokens)
        weights = [made.draft.midlayer.mlp.down_proj.weight, made.draft.lm_head.weight]
        down, head = torch.autograd.grad(made.training_step(batch).loss, weights)
        return down, head.to_dense()

    exact_down, exact_head = gradients(10**6)
    found = [gradients(32) for _ in range(64)]
    assert not torch.equal(found[0][0], found[1][0])
    down, head = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
    certain = torch.stack([each[1] for each in found]).abs().amin(0).sum(-1) > 0
    assert 16 <= int(certain.sum()) < 32
    for mean, exact in ((down, exact_down), (head[certain], exact_head[certain])):
        assert torch.nn.functional.cosine_similarity(mean.flatten(), exact.flatten(), dim=0) > 0.97
        assert float(mean.norm() / exact.norm()) == pytest.approx(1.0, abs=0.15)
    assert (head[~certain] == 0).all(), "rows that are only drawn do not move"


def test_the_total_is_the_sum_of_its_terms(target: Target) -> None:
    report = step(target, online_batch(target), OnlineWeights(replay_weight=0.4), value_weight=0.2)
    torch.testing.assert_close(report.loss, report.lk_live + 0.4 * report.lk_replay + 0.2 * report.value_loss)
    assert report.value_loss > 0


def test_live_and_replayed_traces_are_averaged_separately(target: Target) -> None:
    batch = online_batch(target)
    report = step(target, batch, OnlineWeights())
    for name, rows in (("lk_live", [0, 2]), ("lk_replay", [1])):
        alone = OnlineBatch.without_rounds(batch.traces.select(torch.tensor(rows)))
        torch.testing.assert_close(
            getattr(report, name), step(target, alone, OnlineWeights(), value_weight=0.0).loss.detach()
        )


def test_live_positions_weigh_no_more_than_among_the_fewest(target: Target) -> None:
    """The batch has 38; replayed ones weigh what they did."""
    batch = online_batch(target)
    report = step(target, batch, OnlineWeights(fewest_live=64, replay_weight=0.4), value_weight=0.0)
    torch.testing.assert_close(report.loss.detach(), 38 / 64 * report.lk_live + 0.4 * report.lk_replay)
    enough = step(target, batch, OnlineWeights(fewest_live=38, replay_weight=0.4), value_weight=0.0)
    torch.testing.assert_close(enough.loss.detach(), report.lk_live + 0.4 * report.lk_replay)


def test_every_weight_changes_the_loss(target: Target) -> None:
    batch = online_batch(target)
    plain = step(target, batch).loss.detach()
    for changed in ({"replay_weight": 0.5}, {"fewest_live": 64}, {"base_loss": "kl"}, {"ppo": True}):
        assert abs(float(step(target, batch, OnlineWeights(**changed)).loss.detach() - plain)) > 1e-5, changed  # type: ignore[arg-type]


def test_what_was_proposed_is_in_the_sample_of_tokens_for_certain(target: Target) -> None:
    made, batch = module(target, online=OnlineWeights(sampled_tokens=32)), online_batch(target)
    short = replace(batch.traces, token_ids_BT=batch.traces.token_ids_BT % 8 + 8)
    batch = replace(batch, traces=short, proposed_P=torch.tensor([40, 5, 41]))  # it does not have id 5
    sample = made._sample_tokens(batch)
    assert sample is not None
    certain = set(made.draft.draft_token_ids[sample.index_S[: sample.num_certain]].tolist())
    assert {*range(8, 16), 40, 41} <= certain
    assert len(certain) < 32


# -- PPO -----------------------------------------------------------------------------------------------------------


def valued_module(target: Target, weights: OnlineWeights) -> DraftModule:
    """With a value head that differs from position to position."""
    made = module(target, online=weights, value_weight=0.0)
    torch.nn.init.normal_(made.draft.value_head.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    torch.nn.init.constant_(made.draft.value_head.bias, 1.0)
    return made


def draft_gradient(made: DraftModule, loss: Tensor) -> Tensor:
    parameters = [p for n, p in made.draft.named_parameters() if "value" not in n]
    return torch.cat([each.to_dense().flatten() for each in torch.autograd.grad(loss, parameters)])


def test_ppo_credits_each_step_with_the_value_of_the_next(target: Target) -> None:
    batch = texts_alone(target)
    made = valued_module(target, replace(EVERY_STEP, ppo=True))
    found = draft_gradient(made, made.training_step(batch).loss)
    p_BTD, hidden_KBTH = target_distribution(made, batch), made.unroll(batch.traces)
    B, T = batch.traces.token_ids_BT.shape
    counts_BT, expected = can_be_proposed(made, batch), torch.zeros(())
    for row in range(B):
        for first in range(1, T):
            reached = torch.tensor(1.0)
            for step in range(min(3, T - first)):
                place = first + step
                if not counts_BT[row, place]:
                    break
                goes_on = step < 2 and place + 1 < T and bool(counts_BT[row, place + 1])
                next_value = torch.zeros(())
                if goes_on:
                    next_value = made.draft.compute_value(hidden_KBTH[step + 1, row, place + 1]).detach()
                q_D = made.draft.compute_logits(hidden_KBTH[step, row, place]).softmax(-1)
                p_D = p_BTD[row, place]
                alpha = overlap(p_D, q_D)
                share = torch.exp(-KL_DECAY * alpha.detach())
                kl = (p_D * (p_D.log() - q_D.log())).sum()
                gain = 1 + next_value.clamp(0, 2 - step)
                expected = expected + reached * (share * kl + (1 - share) * gain * (1 - alpha))
                reached = reached * alpha.detach()
    torch.testing.assert_close(found, draft_gradient(made, expected / (B * (T - 1))), rtol=1e-4, atol=1e-6)
    made.online = EVERY_STEP
    plain = draft_gradient(made, made.training_step(batch).loss)
    assert float((found - plain).norm() / plain.norm()) > 0.1
    made.online = replace(EVERY_STEP, ppo=True)
    torch.nn.init.zeros_(made.draft.value_head.weight)
    torch.nn.init.zeros_(made.draft.value_head.bias)
    torch.testing.assert_close(draft_gradient(made, made.training_step(batch).loss), plain, rtol=1e-5, atol=1e-7)


def test_where_chains_end_by_chance_ppo_has_the_same_gradient_in_expectation(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_lit.modules.losses.chain_losses.noise_bits", new_bits())
    batch = texts_alone(target, copies=10)
    made = valued_module(target, replace(EVERY_STEP, ppo=True))
    exact = draft_gradient(made, made.training_step(batch).loss)
    made.online = OnlineWeights(ppo=True)
    found = torch.stack([draft_gradient(made, made.training_step(batch).loss) for _ in range(20)]).mean(0)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > 0.998
    assert float(found.norm() / exact.norm()) == pytest.approx(1.0, abs=0.03)


def test_at_rest_ppo_keeps_to_the_draft_that_the_rest_began_with(target: Target) -> None:
    batch = replace(online_batch(target), live_B=torch.zeros(3, dtype=torch.bool), at_rest=True)
    made = valued_module(target, replace(EVERY_STEP, ppo=True))

    def gradient(*, at_rest: bool) -> Tensor:
        return draft_gradient(made, made.training_step(replace(batch, at_rest=at_rest)).loss)

    def stopped() -> Tensor:
        return made.training_step(batch).stats.stopped_R2

    torch.testing.assert_close(gradient(at_rest=True), gradient(at_rest=False), rtol=1e-4, atol=1e-6)
    names = set(made.state_dict())
    assert stopped()[:, 0].sum() == 0
    assert stopped()[:, 1].sum() > 10
    made.draft.lm_head.weight.data.mul_(1.5)
    mass_R2 = stopped()
    assert 0 < mass_R2[:, 0].sum() < mass_R2[:, 1].sum()
    assert set(made.state_dict()) == names, "what is kept for the rest is not saved"
    kept, free = gradient(at_rest=True), gradient(at_rest=False)
    assert float((kept - free).norm() / free.norm()) > 0.01
    stopped()  # it begins anew
    assert stopped()[:, 0].sum() == 0
    made.draft.lm_head.weight.data.mul_(1.5)
    assert stopped()[:, 0].sum() > 0
    for end_of_rest in (lambda: made.training_step(online_batch(target)), made.forget_rest):
        end_of_rest()
        assert stopped()[:, 0].sum() == 0, "the next rest begins with the present draft"
        made.draft.lm_head.weight.data.mul_(1.2)


# -- batches -------------------------------------------------------------------------------------------------------


def test_the_value_loss_does_not_train_the_draft(target: Target) -> None:
    made = module(target, value_weight=1e6)
    batch = replace(online_batch(target), live_B=torch.zeros(3, dtype=torch.bool))
    made.online = replace(made.online, replay_weight=0.0)
    assert float(draft_gradient(made, made.training_step(batch).loss).abs().max()) == 0


def test_it_runs_in_bf16(target: Target) -> None:
    batch = online_batch(target)
    half = replace(
        batch,
        traces=replace(
            batch.traces,
            aux_BT3H=batch.traces.aux_BT3H.bfloat16(),
            last_BTH=batch.traces.last_BTH.bfloat16(),
        ),
    )
    for weights in (EVERY_STEP, replace(EVERY_STEP, ppo=True)):
        exact = step(target, batch, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = module(target, online=weights)
            reports = [made.training_step(each) for each in (half, replace(half, at_rest=True))]
        for report in reports:
            made.zero_grad()
            report.loss.backward()
            torch.testing.assert_close(report.loss, exact.loss, rtol=0.05, atol=0.02)
            for name, parameter in made.draft.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.to_dense().isfinite().all(), name


def test_moving_a_batch_moves_all_tensors(target: Target) -> None:
    moved = online_batch(target).to("meta")
    for record in (moved, moved.traces):
        assert all(v.device.type == "meta" for v in vars(record).values() if isinstance(v, Tensor))
    assert moved.traces.domains == ("chat",) * 3
