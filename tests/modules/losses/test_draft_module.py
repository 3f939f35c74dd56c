"""The losses of DraftModule: weights of positions, the online terms and their sum, and which rounds can be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, draft_batch, draft_module, random_draft, save_model, supervised_loss
from support.toy_rounds import chain_logprobs, rounds, some_rounds
from torch import Tensor

from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.modules.losses.chain_losses import _uniform
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.fused_lk import fused_lk_loss
from aurora_lit.modules.losses.lk import LKStats, lk_loss, overlap
from aurora_lit.modules.losses.objective import OnlineReport, OnlineWeights

OFF = OnlineWeights(ppo_weight=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save_model("llama", tmp_path_factory.mktemp("llama")), precision="fp32")


def online_batch(target: Target, *, verified: str = "own_draw") -> OnlineBatch:
    """Three texts and four rounds of different lengths; the behaviour policy differs a little from the draft."""
    ids_BT = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    proposed = [(2, 9, (8, 9, 10)), (0, 4, (11, 12)), (2, 3, (13,)), (0, 15, (14, 15, 16))]
    batch = rounds(target, ids_BT, proposed, verified=verified, accepted=[1, 2, 0, 3])
    behaviour_QK = present_logprobs(target, batch) + torch.tensor([0.5, 0.05, -0.5])
    recorded = replace(batch.rounds, behaviour_logprob_QK=behaviour_QK)
    return replace(batch, rounds=recorded, live_B=torch.tensor([True, False, True]))


@torch.no_grad()
def present_logprobs(target: Target, batch: OnlineBatch) -> Tensor:
    """The present draft's log-probabilities; NaN after a round's last proposal. It does not have the ids 0, 5 and 6."""
    index_QK = (batch.rounds.proposal_QK - 3).clamp_min(0)
    logq_QK = chain_logprobs(module(target), batch).gather(2, index_QK[..., None])[..., 0]
    return logq_QK.where(batch.rounds.proposal_QK >= 0, float("nan"))


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
    made = draft_module(target, random_draft(target), num_steps=1, online=OFF)
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
    assert online.policy.num_rounds == 0
    assert online.policy_weight == 0


EVERY_STEP = replace(OFF, certain_survival=0.0)
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
    batch, value_alone = texts_alone(target, copies=20), replace(OFF, base_loss="none")

    def gradient(certain_survival: float, turns: int) -> Tensor:
        made = module(target, online=replace(value_alone, certain_survival=certain_survival), value_weight=1.0)
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
    """The same texts, all live, without rounds; all of them several times if asked."""
    batch = online_batch(target)
    return replace(
        batch,
        traces=batch.traces.select(torch.arange(3).repeat(copies)),
        live_B=torch.ones(3 * copies, dtype=torch.bool),
        rounds=batch.rounds.select(batch.rounds.row_Q[:0]),
    )


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
    batch = replace(batch, traces=short, rounds=batch.rounds.select(batch.rounds.row_Q[:0]))
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
    weights = OnlineWeights(ppo_weight=0.7, replay_weight=0.4)
    report = step(target, online_batch(target), weights, value_weight=0.2)
    policy = report.policy
    assert policy.num_rounds == 4
    assert 4 < policy.num_proposals <= 9
    total = report.lk_live + 0.4 * report.lk_replay + report.policy_weight * policy.policy_loss
    total = total + 0.2 * report.value_loss
    torch.testing.assert_close(report.loss, total)

    valid_KBT = report.mask_KBT * torch.tensor([1.0, 0.0, 1.0])[:, None]
    mean_alpha = (report.stats.alpha_N.view_as(valid_KBT) * valid_KBT).sum() / valid_KBT.sum()
    evidence = policy.num_proposals / (policy.num_proposals + valid_KBT.sum())
    torch.testing.assert_close(report.policy_weight, 0.7 * (1 - torch.exp(-3 * mean_alpha)) * evidence)


def test_the_policy_weight_grows_with_the_sampled_proposals_unless_it_is_the_only_loss(target: Target) -> None:
    batch = online_batch(target)
    many, few = step(target, batch), step(target, some_rounds(batch, [0]))
    assert 0 < few.policy_weight < 0.5 * many.policy_weight
    bare = OnlineWeights(base_loss="none")
    torch.testing.assert_close(
        step(target, batch, bare).policy_weight, step(target, some_rounds(batch, [0]), bare).policy_weight
    )


def test_the_policy_alone_computes_no_gradients_of_the_supervised_loss(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, sums = online_batch(target), []

    def recorded(**inputs: Any) -> tuple[Tensor, LKStats]:
        sums.append(fused_lk_loss(**inputs))
        return sums[-1]

    monkeypatch.setattr("aurora_lit.modules.losses.chain_losses.fused_lk_loss", recorded)
    full, bare = (step(target, batch, weights) for weights in (OnlineWeights(), OnlineWeights(base_loss="none")))
    needed = [loss.requires_grad for loss, _ in sums]
    assert needed == [True] * (len(sums) // 2) + [False] * (len(sums) // 2)
    torch.testing.assert_close(bare.stats.alpha_N, full.stats.alpha_N)
    torch.testing.assert_close(bare.value_loss, full.value_loss)
    assert bare.loss.requires_grad, "policy and value head are trained"


def test_live_and_replayed_traces_are_averaged_separately(target: Target) -> None:
    batch = online_batch(target)
    report = step(target, batch, OFF)
    for name, rows in (("lk_live", [0, 2]), ("lk_replay", [1])):
        alone = OnlineBatch(
            traces=batch.traces.select(torch.tensor(rows)),
            live_B=torch.ones(len(rows), dtype=torch.bool),
            rounds=batch.rounds.select(batch.rounds.row_Q[:0]),
        )
        torch.testing.assert_close(getattr(report, name), step(target, alone, OFF, value_weight=0.0).loss.detach())


def test_live_positions_weigh_no_more_than_among_the_fewest(target: Target) -> None:
    """The batch has 38; replayed ones weigh what they did."""
    batch = online_batch(target)
    report = step(target, batch, replace(OFF, fewest_live=64, replay_weight=0.4), value_weight=0.0)
    torch.testing.assert_close(report.loss.detach(), 38 / 64 * report.lk_live + 0.4 * report.lk_replay)
    enough = step(target, batch, replace(OFF, fewest_live=38, replay_weight=0.4), value_weight=0.0)
    torch.testing.assert_close(enough.loss.detach(), report.lk_live + 0.4 * report.lk_replay)


def test_every_weight_changes_the_loss(target: Target) -> None:
    batch = online_batch(target)
    plain = step(target, batch).loss.detach()
    changes: tuple[dict[str, Any], ...] = ({"ppo_weight": 0.0}, {"ppo_weight": 0.5}, {"clip": 0.6}, {"gae_lambda": 0.3})
    for changed in (*changes, {"replay_weight": 0.5}, {"fewest_live": 64}):
        assert abs(float(step(target, batch, OnlineWeights(**changed)).loss.detach() - plain)) > 1e-5, changed


# -- the rounds ----------------------------------------------------------------------------------------------------


def test_rounds_of_different_lengths_do_not_influence_each_other(target: Target) -> None:
    batch = online_batch(target)
    together = step(target, batch).policy
    alone = [step(target, some_rounds(batch, [q])).policy for q in range(4)]
    torch.testing.assert_close(together.policy_loss, torch.stack([a.policy_loss for a in alone]).mean())
    torch.testing.assert_close(together.accepted_length, torch.stack([a.accepted_length for a in alone]).mean())
    assert together.num_proposals == sum(a.num_proposals for a in alone)
    reversed_ = step(target, some_rounds(batch, [3, 2, 1, 0])).policy
    torch.testing.assert_close(together.policy_loss, reversed_.policy_loss)


def test_rounds_without_a_policy_ratio_are_left_out(target: Target) -> None:
    """Stale ones, proposals that were not drawn to explore or one of which was not, and tokens that the draft lacks."""
    batch = online_batch(target)
    others = step(target, some_rounds(batch, [1, 2, 3]))
    for name, index, value in (
        ("fresh_Q", 0, False),
        ("behaviour_logprob_QK", 0, float("nan")),
        ("behaviour_logprob_QK", (0, 2), float("nan")),
        ("proposal_QK", (0, 1), 5),
    ):
        spoiled = getattr(batch.rounds, name).clone()
        spoiled[index] = value
        report = step(target, replace(batch, rounds=replace(batch.rounds, **{name: spoiled})))
        assert report.policy.num_rounds == 3, (name, index)
        torch.testing.assert_close(report.policy.policy_loss, others.policy.policy_loss)
        assert report.tested_K[0] == 4, "statistics of serving count all rounds"


@pytest.mark.parametrize("index", [[], [0]])
def test_a_batch_without_usable_rounds_is_supervised_only(index: list[int], target: Target) -> None:
    batch = some_rounds(online_batch(target), index)
    batch = replace(batch, rounds=replace(batch.rounds, fresh_Q=torch.zeros(len(index), dtype=torch.bool)))
    report = step(target, batch)
    torch.testing.assert_close(report.loss, step(target, batch, OFF).loss)
    report.loss.backward()


def test_acceptance_by_position_is_what_was_served(target: Target) -> None:
    report = step(target, online_batch(target))  # proposed 3, 2, 1, 3 and accepted 1, 2, 0, 3
    assert report.tested_K.tolist() == [4, 3, 1]
    assert report.accepted_K.tolist() == [3, 2, 1]


def test_the_ratio_is_taken_at_the_temperature_of_the_round(target: Target) -> None:
    batch = online_batch(target)
    batch = replace(batch, rounds=replace(batch.rounds, draft_temperature_Q=torch.full((4,), 0.5)))
    behaviour = replace(batch.rounds, behaviour_logprob_QK=present_logprobs(target, batch))
    on_policy = step(target, replace(batch, rounds=behaviour)).policy
    assert float(on_policy.mean_ratio) == pytest.approx(1.0, abs=1e-5)
    assert on_policy.clip_fraction == 0
    off_policy = step(target, batch).policy
    assert abs(float(off_policy.mean_ratio) - 1) > 0.1
    assert off_policy.clip_fraction > 0


def test_the_value_loss_does_not_train_the_draft(target: Target) -> None:
    made = module(target)
    made.training_step(online_batch(target)).policy.value_loss.backward()
    trained = {name for name, parameter in made.draft.named_parameters() if parameter.grad is not None}
    assert trained == {"value_head.weight", "value_head.bias"}


def test_it_runs_in_bf16(target: Target) -> None:
    batch = online_batch(target)
    exact = step(target, batch)
    half = replace(
        batch,
        rounds=replace(batch.rounds, path_last_QKH=batch.rounds.path_last_QKH.bfloat16()),
        traces=replace(
            batch.traces,
            aux_BT3H=batch.traces.aux_BT3H.bfloat16(),
            last_BTH=batch.traces.last_BTH.bfloat16(),
        ),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = module(target)
        report = made.training_step(half)
    report.loss.backward()
    torch.testing.assert_close(report.loss, exact.loss, rtol=0.05, atol=0.02)
    assert report.policy.mean_ratio.dtype == torch.float32
    torch.testing.assert_close(report.policy.mean_ratio, exact.policy.mean_ratio, rtol=0.02, atol=0.0)
    for name, parameter in made.draft.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.to_dense().isfinite().all(), name


def test_moving_a_batch_moves_all_tensors(target: Target) -> None:
    moved = online_batch(target).to("meta")
    for record in (moved, moved.traces, moved.rounds):
        assert all(v.device.type == "meta" for v in vars(record).values() if isinstance(v, Tensor))
    assert moved.traces.domains == ("chat",) * 3
