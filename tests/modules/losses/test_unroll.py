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
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.request import SamplingParams
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

K = 4
TEMPERATURES = (1.0, 0.7, 1.5)
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return Target.load(folder, precision="fp32")


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
    sampled = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=t) for t in TEMPERATURES])
    known = [0, 0, 0]
    # Sequences with many new tokens and with few; one of them at the end of its capacity.
    for lengths in ([9, 50, 2], [12, 51, 7], [13, 79, 8]):
        for row, length in enumerate(lengths):
            tokens_SL[slots[row], :length] = ids_BT[row, :length]
            drafter.store_features(
                slots_B=slots[row : row + 1],
                starts_B=torch.tensor([known[row]]),
                aux_BT3H=features_BTF[row : row + 1, known[row] : length - 1],
            )
            known[row] = length - 1
        proposals, values = drafter.propose(
            DraftInputs(slots_B=slots, lengths=list(lengths)),
            options=sampled,
            num_steps=K,
            uniform_BK=torch.rand(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(lengths[0])),
        )
        assert proposals.q_BKD is not None
        for row, length in enumerate(lengths):
            # The tokens that the chain has read, as a trace to train on.
            sequence = torch.cat([ids_BT[row, :length], proposals.token_BK[row]])[None]
            batch = draft_batch(target, sequence)
            hidden_KBTH = module.unroll(batch)
            alpha_KBT = module.training_step(batch).stats.alpha_N.view(K, 1, -1)
            p_TD = torch.exp(target.logits(batch.last_BTH[0]) - batch.lse_BT[0, :, None])[:, draft.draft_token_ids]
            temperature = TEMPERATURES[row]
            for step in range(K):
                position = length - 1 + step  # the step's target position
                hidden_H = hidden_KBTH[step, 0, position]
                q_D = torch.softmax(module.draft.compute_logits(hidden_H) / temperature, dim=-1)
                torch.testing.assert_close(proposals.q_BKD[row, step], q_D, **CLOSE)
                if step < K - 1:
                    torch.testing.assert_close(values[step][row], module.draft.compute_value(hidden_H), **CLOSE)
                if temperature == 1.0:
                    alpha = torch.minimum(proposals.q_BKD[row, step], p_TD[position]).sum()
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
    sampled = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=t) for t in TEMPERATURES])
    proposed, q_of, value_of = [], [], []
    for lengths in ([9, 50, 2], [12, 51, 7], [13, 79, 8]):
        for row, length in enumerate(lengths):
            tokens_SL[row, :length] = ids_BT[row, :length]
            drafter.store_features(
                slots_B=slots[row : row + 1],
                starts_B=torch.tensor([0]),
                aux_BT3H=features_BTF[row : row + 1, : length - 1],
            )
        proposals, values = drafter.propose(
            DraftInputs(slots_B=slots, lengths=list(lengths)),
            options=sampled,
            num_steps=K,
            uniform_BK=torch.rand(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(lengths[0])),
        )
        assert proposals.q_BKD is not None
        for row, length in enumerate(lengths):
            path = proposals.token_BK[row].tolist()
            if length < 77:
                assert path != ids_BT[row, length : length + K].tolist(), "the test needs rejected proposals"
            proposed.append((row, length - 1, path))
            q_of.append(proposals.q_BKD[row])
            value_of.append(values[: K - 1, row])
    batch = rounds(target, ids_BT, proposed, verified="own_draw")
    batch = replace(batch, rounds=replace(batch.rounds, draft_temperature_Q=torch.tensor(TEMPERATURES * 3)))
    torch.testing.assert_close(chain_logprobs(module, batch).exp(), torch.stack(q_of), atol=1e-4, rtol=0.0)

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
