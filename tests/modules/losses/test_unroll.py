"""Training on what is served: unrolled chains equal the drafter's, along the text and along rejected proposals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, draft_batch, draft_module, random_draft, save_model
from support.toy_rounds import chain_logprobs, chain_states, rounds

from aurora_lit.kernels import native
from aurora_lit.models.target import Target
from aurora_lit.serve.speculation.drafter import Drafted, Drafter, DraftInputs, DraftNoise

K = 4
TEMPERATURES = (1.0, 0.7, 1.5)
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return Target.load(folder, precision="fp32")


def drawn_chain(drafter: Drafter, inputs: DraftInputs) -> Drafted:
    """Chains of K tokens, drawn at each sequence's temperature, with their log-probabilities."""
    noise = DraftNoise(
        temperature_B=torch.tensor(TEMPERATURES),
        key_B=torch.arange(3) + sum(inputs.lengths),
        position_B=torch.tensor(inputs.lengths),
    )
    return drafter.propose(inputs, num_steps=K, noise=noise, with_logprobs=True)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@torch.no_grad()
def test_the_unrolled_steps_are_the_drafters_chain(kernels: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    target = Target.load(folder, precision="fp32")
    draft = random_draft(target)
    module = draft_module(target, copy.deepcopy(draft), num_steps=K)
    ids_BT = torch.randint(0, VOCAB, (3, 80), generator=torch.Generator().manual_seed(0))
    features_BTF, _ = target.forward_uncached(ids_BT)

    capacity = 80 + K + 1
    tokens_SL = torch.zeros(5, capacity + 1, dtype=torch.int64)
    slots = torch.tensor([4, 1, 2])
    drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=capacity)
    known = [0, 0, 0]
    # Sequences with many new tokens and with few; one of them at the end of its capacity.
    for lengths in ([9, 50, 2], [12, 51, 7], [13, 79, 8]):
        for row, length in enumerate(lengths):
            tokens_SL[slots[row], :length] = ids_BT[row, :length]
            aux_TF = features_BTF[row, known[row] : length - 1]
            drafter.store_features(slot=int(slots[row]), start=known[row], aux_TF=aux_TF)
            known[row] = length - 1
        drafted = drawn_chain(drafter, DraftInputs(slots_B=slots, lengths=list(lengths)))
        assert drafted.logprob_BK is not None
        for row, length in enumerate(lengths):
            # The tokens that the chain has read, as a trace to train on.
            sequence = torch.cat([ids_BT[row, :length], drafted.token_BK[row]])[None]
            batch = draft_batch(target, sequence)
            hidden_KBTH = module.unroll(batch)
            alpha_KBT = module.training_step(batch).stats.alpha_N.view(K, 1, -1)
            p_TD = torch.exp(target.logits(batch.last_BTH[0]) - batch.lse_BT[0, :, None])[:, draft.draft_token_ids]
            temperature = TEMPERATURES[row]
            for step in range(K):
                position = length - 1 + step  # the step's target position
                hidden_H = hidden_KBTH[step, 0, position]
                q_D = torch.softmax(module.draft.compute_logits(hidden_H) / temperature, dim=-1)
                index = int((draft.draft_token_ids == drafted.token_BK[row, step]).nonzero())
                torch.testing.assert_close(drafted.logprob_BK[row, step], q_D[index].log(), **CLOSE)
                if step < K - 1:
                    torch.testing.assert_close(
                        drafted.outcome_JB[step][row], module.draft.compute_value(hidden_H), **CLOSE
                    )
                if temperature == 1.0:
                    alpha = torch.minimum(q_D, p_TD[position]).sum()
                    torch.testing.assert_close(alpha_KBT[step, 0, position], alpha, **CLOSE)


@torch.no_grad()
def test_unrolling_along_proposals_is_the_drafters_chain_also_after_a_rejection(target: Target) -> None:
    draft = random_draft(target)
    module = draft_module(target, copy.deepcopy(draft))
    ids_BT = torch.randint(0, VOCAB, (3, 80), generator=torch.Generator().manual_seed(0))
    features_BTF, _ = target.forward_uncached(ids_BT)
    capacity = 80 + K + 1
    tokens_SL = torch.zeros(3, capacity + 1, dtype=torch.int64)
    drafter = Drafter(draft, target, tokens_SL=tokens_SL, capacity=capacity)
    slots = torch.arange(3)
    proposed, logprob_of, value_of = [], [], []
    for lengths in ([9, 50, 2], [12, 51, 7], [13, 79, 8]):
        for row, length in enumerate(lengths):
            tokens_SL[row, :length] = ids_BT[row, :length]
            drafter.store_features(slot=row, start=0, aux_TF=features_BTF[row, : length - 1])
        drafted = drawn_chain(drafter, DraftInputs(slots_B=slots, lengths=list(lengths)))
        assert drafted.logprob_BK is not None
        for row, length in enumerate(lengths):
            path = drafted.token_BK[row].tolist()
            if length < 77:
                assert path != ids_BT[row, length : length + K].tolist(), "the test needs rejected proposals"
            proposed.append((row, length - 1, path))
            logprob_of.append(drafted.logprob_BK[row])
            value_of.append(drafted.outcome_JB[: K - 1, row])
    batch = rounds(target, ids_BT, proposed, verified="own_draw")
    batch = replace(batch, rounds=replace(batch.rounds, draft_temperature_Q=torch.tensor(TEMPERATURES * 3)))
    index_QK = torch.tensor(
        [[draft.draft_token_ids.tolist().index(token) for token in path] for _, _, path in proposed]
    )
    logprob_QK = chain_logprobs(module, batch).gather(2, index_QK[..., None])[..., 0]
    torch.testing.assert_close(logprob_QK, torch.stack(logprob_of), atol=1e-4, rtol=0.0)

    values_QK = module.draft.compute_value(chain_states(module, batch)[:, : K - 1])
    torch.testing.assert_close(values_QK, torch.stack(value_of), atol=1e-4, rtol=0.0)


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
