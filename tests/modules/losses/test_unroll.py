"""Training on what is served: unrolled chains equal the drafter's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, draft_batch, draft_module, random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.lk import overlap
from aurora_lit.modules.losses.unroll import StepwiseChains
from aurora_lit.modules.sampling.noise import gumbel
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs

K = 4
TEMPERATURES = (1.0, 0.7, 1.5)
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(folder, precision="fp32")


class Drafting:
    """A draft that proposes for three texts, with noise at three temperatures."""

    def __init__(self, target: Target, draft: Eagle3Draft) -> None:
        self.ids_BT = torch.randint(0, VOCAB, (3, 80), generator=torch.Generator().manual_seed(0))
        self.slots_B = torch.tensor([4, 1, 2])
        capacity = 80 + K + 1
        self.tokens_SL = torch.zeros(5, capacity + 1, dtype=torch.int64)
        self.drafter = Drafter(draft, target, tokens_SL=self.tokens_SL, capacity=capacity)
        self.features_BTF, _ = target.in_torch.forward_uncached(self.ids_BT)
        self.known = [0, 0, 0]

    def propose(self, lengths: list[int]) -> Drafted:
        """Chains after the first `lengths` tokens of the texts."""
        for row, (slot, length) in enumerate(zip(self.slots_B.tolist(), lengths, strict=True)):
            self.tokens_SL[slot, :length] = self.ids_BT[row, :length]
            new_TF = self.features_BTF[row, self.known[row] : length - 1]
            self.drafter.store_features(slot=slot, start=self.known[row], aux_TF=new_TF)
            self.known[row] = length - 1
        inputs = DraftInputs(slots=self.slots_B.tolist(), lengths=lengths)
        noise = ColumnDraws(temperatures=TEMPERATURES, keys=lengths, positions=[0, 1, 2])
        return self.drafter.propose(inputs, num_steps=K, noise=noise)


ALL_LENGTHS = ([9, 50, 2], [12, 51, 7], [13, 79, 8])
"""Sequences with many new tokens and with few; one of them at the end of its capacity."""


@pytest.mark.parametrize("kernels", ["native", "torch"])
@torch.no_grad()
def test_the_unrolled_steps_are_the_drafters_chain(kernels: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    target = load_target(folder, precision="fp32")
    draft = random_draft(target)
    module = draft_module(target, copy.deepcopy(draft), num_steps=K)
    drafting = Drafting(target, draft)
    for lengths in ALL_LENGTHS:
        drafted = drafting.propose(lengths)
        for row, length in enumerate(lengths):
            # The tokens that the chain has read, as a trace to train on.
            sequence = torch.cat([drafting.ids_BT[row, :length], drafted.token_BK[row]])[None]
            batch = draft_batch(target, sequence)
            hidden_KBTH = module.unroll(batch)
            alpha_KBT = module.score(batch)[0].alpha_N.view(K, 1, -1)
            p_TD = torch.exp(target.logits(batch.last_BTH[0]) - batch.lse_BT[0, :, None])[:, draft.draft_token_ids]
            key_1 = torch.tensor([length])
            for step in range(K):
                position = length - 1 + step  # the step's target position
                hidden_H = hidden_KBTH[step, 0, position]
                logits_D = module.draft.compute_logits(hidden_H)
                noise_D = gumbel(key_1, torch.tensor([row + step]), draft.draft_token_ids)[0]
                chosen = int((logits_D / TEMPERATURES[row] + noise_D).argmax())
                assert int(draft.draft_token_ids[chosen]) == drafted.tokens[row][step]
                if step < K - 1:
                    torch.testing.assert_close(
                        drafted.outcome_JB[step][row], module.draft.compute_value(hidden_H), **CLOSE
                    )
                alpha = overlap(logits_D.softmax(-1), p_TD[position])
                torch.testing.assert_close(alpha_KBT[step, 0, position], alpha, **CLOSE)


def test_a_chain_reads_no_later_token_and_no_padding(target: Target) -> None:
    module = draft_module(target, random_draft(target), num_steps=3)
    ids_BT = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before_KBTH = module.unroll(draft_batch(target, ids_BT))
        ids_BT[0, 12:] = (ids_BT[0, 12:] + 1) % VOCAB
        after_KBTH = module.unroll(draft_batch(target, ids_BT))
    same_KT = (before_KBTH - after_KBTH).abs().amax(-1)[:, 0] < 1e-5
    assert same_KT[:, :12].all(), "target position 11 depends on the first 12 tokens only"
    assert not same_KT[:, 13:].any()


def test_leaving_out_unneeded_chains_does_not_change_the_others(target: Target) -> None:
    """Losses and gradients are those of running a chain from every position."""
    ids_BT = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(3))
    batch = draft_batch(target, ids_BT)
    needed_BT = torch.zeros(3, 24, dtype=torch.bool)
    needed_BT[0, 9:15] = needed_BT[1, 20:] = needed_BT[2, 0] = True
    module = draft_module(target, random_draft(target), num_steps=3)
    weights = torch.randn(3, 3, 24, 64, generator=torch.Generator().manual_seed(4)) * needed_BT[..., None]
    gradients = []
    for run_BT in (torch.ones_like(needed_BT), needed_BT):
        module.zero_grad()
        hidden_KBTH = module.unroll(batch, run_BT)
        (hidden_KBTH * weights).sum().backward()
        kept_KBTH = hidden_KBTH.detach() * needed_BT[..., None]
        gradients.append([kept_KBTH, *(p.grad for p in module.draft.parameters() if p.grad is not None)])
    for full, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-4, atol=1e-4)
    assert gradients[0][0][:, 0, 9:15].abs().sum() > 0


def test_chains_learn_through_their_own_positions_and_not_through_the_text_before_them(target: Target) -> None:
    """Where all positions are needed the gradients are those of `unroll`; a prompt is attended to without gradient."""
    draft = random_draft(target)
    module = draft_module(target, draft, num_steps=1)
    batch = draft_batch(target, torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(6)))
    weights_BTH = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(7))

    def gradients(first: int, *, stepwise: bool) -> list[torch.Tensor]:
        """Of the states, and of the target's hidden states, where chains begin before target position `first`."""
        module.zero_grad()
        aux_BT3H = batch.aux_BT3H.clone().requires_grad_()
        needed_BT = (torch.arange(24) >= first).expand(2, 24)
        if stepwise:
            chains = StepwiseChains(
                draft,
                token_ids_BT=batch.token_ids_BT,
                aux_BT3H=aux_BT3H,
                embed=module.embed,
                needed_BT=needed_BT,
            )
            hidden_MH, place = chains.hidden_MH[: chains.count], (chains.row_M, chains.target_M)
            weights_MH = weights_BTH[place][: chains.count]
        else:
            hidden_MH = module.unroll(replace(batch, aux_BT3H=aux_BT3H), needed_BT)[0][needed_BT]
            weights_MH = weights_BTH[needed_BT]
        (hidden_MH * weights_MH).sum().backward()
        assert aux_BT3H.grad is not None
        return [aux_BT3H.grad, *(p.grad.clone() for p in draft.parameters() if p.grad is not None)]

    for ours, theirs in zip(gradients(1, stepwise=True), gradients(1, stepwise=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = gradients(10, stepwise=True)[0], gradients(10, stepwise=False)[0]
    assert (ours[:, :9] == 0).all()
    assert (theirs[:, :9].abs().amax((1, 2)) > 0).all()
    assert (ours[:, 9:23].abs().amax(-1) > 0).all()


def test_stepwise_chains_are_the_unrolled_ones_whichever_of_them_end(target: Target) -> None:
    draft = random_draft(target)
    module = draft_module(target, draft, num_steps=K)
    batch = draft_batch(target, torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(4)))
    whole_KBTH = module.unroll(batch)
    needed_BT = torch.rand(3, 24, generator=torch.Generator().manual_seed(5)) < 0.6
    needed_BT[:, 0] = True  # no chain: there is no token before it
    chains = StepwiseChains(
        draft,
        token_ids_BT=batch.token_ids_BT,
        aux_BT3H=batch.aux_BT3H,
        embed=module.embed,
        needed_BT=needed_BT,
    )
    assert chains.count == int(needed_BT[:, 1:].sum())
    for step in range(K):
        assert chains.count <= len(chains.row_M) in (16, 24, 32, 48)
        expected_MH = whole_KBTH[step, chains.row_M, chains.target_M]
        torch.testing.assert_close(chains.hidden_MH, expected_MH, **CLOSE)
        if step + 1 < K:
            goes_on_N = (chains.target_M + 1 < 24) & (torch.arange(len(chains.row_M)) % 3 != step % 3)
            goes_on_N = goes_on_N[: chains.count]
            assert 0 < int(goes_on_N.sum()) < chains.count
            chains.advance(goes_on_N.nonzero()[:, 0])


def test_draft_ids_are_right_whatever_their_order(target: Target) -> None:
    draft = random_draft(target)
    ids = draft.draft_token_ids.flip(0)
    draft.d2t.copy_(ids - torch.arange(len(ids)))
    assert draft.draft_index(ids).tolist() == list(range(len(ids)))


def test_chains_may_be_longer_than_the_drafts_rotary_table(target: Target) -> None:
    draft = random_draft(target)
    ids_BT = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    made, batch = draft_module(target, draft, num_steps=3), draft_batch(target, ids_BT)
    expected_KBTH = made.unroll(batch)
    draft.cos_LD, draft.sin_LD = draft.cos_LD[:5], draft.sin_LD[:5]
    assert torch.equal(made.unroll(batch), expected_KBTH)
