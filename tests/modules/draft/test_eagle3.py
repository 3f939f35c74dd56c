"""The draft learns what it serves: the unrolled training steps are the chain of the drafter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB, draft_batch, draft_module, random_draft, save_model

from aurora_lit.kernels import native
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.modules.sampling.proposals import DraftVocabulary
from aurora_lit.request import SamplingParams
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs

K = 4
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return Target.load(folder, precision="fp32")


@pytest.mark.parametrize("kernels", ["native", "torch"])
@torch.no_grad()
def test_the_unrolled_training_steps_are_the_drafters_chain(
    kernels: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    sampled = LogitOptions.from_params([SamplingParams(max_tokens=1, temperature=t) for t in (1.0, 0.7, 1.5)])
    known = [0, 0, 0]
    # Rows far behind and rows hardly behind; one of them at its very end.
    for lengths in ([9, 50, 2], [12, 51, 7], [13, 79, 8]):
        for row, length in enumerate(lengths):
            tokens_SL[slots[row], :length] = ids_BT[row, :length]
            drafter.store_features(
                slots_B=slots[row : row + 1],
                starts_B=torch.tensor([known[row]]),
                aux_BT3H=features_BTF[row : row + 1, known[row] : length - 1],
            )
            known[row] = length - 1
        values: list[torch.Tensor] = []
        proposals = drafter.propose(
            DraftInputs(slots_B=slots, lengths=list(lengths)),
            options=sampled,
            num_steps=K,
            uniform_BK=torch.rand(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(lengths[0])),
            should_continue=lambda done, values_B, values=values: values.append(values_B) or True,
        )
        assert proposals.q_BKD is not None
        for row, length in enumerate(lengths):
            # What the chain saw, as a sequence to learn from.
            sequence = torch.cat([ids_BT[row, :length], proposals.token_BK[row]])[None]
            batch = draft_batch(target, sequence)
            hidden_KBTH = module.unroll(batch)
            alpha_KBT = module.training_step(batch).stats.alpha_N.view(K, 1, -1)
            p_TD = torch.exp(target.logits(batch.last_BTH[0]) - batch.lse_BT[0, :, None])[:, draft.draft_token_ids]
            temperature = (1.0, 0.7, 1.5)[row]
            for step in range(K):
                aim = length - 1 + step  # the target position whose distribution the step imitates
                hidden_H = hidden_KBTH[step, 0, aim]
                q_D = torch.softmax(module.draft.compute_logits(hidden_H) / temperature, dim=-1)
                torch.testing.assert_close(proposals.q_BKD[row, step], q_D, **CLOSE)
                if step < K - 1:
                    torch.testing.assert_close(values[step][row], module.draft.compute_value(hidden_H), **CLOSE)
                if temperature == 1.0:
                    alpha = torch.minimum(proposals.q_BKD[row, step], p_TD[aim]).sum()
                    torch.testing.assert_close(alpha_KBT[step, 0, aim], alpha, **CLOSE)


def test_learning_sees_no_later_token_and_no_padding(target: Target) -> None:
    module = draft_module(target, random_draft(target), num_steps=3)
    ids_BT = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before_KBTH = module.unroll(draft_batch(target, ids_BT))
        ids_BT[0, 12:] = (ids_BT[0, 12:] + 1) % VOCAB
        after_KBTH = module.unroll(draft_batch(target, ids_BT))
    same_KT = (before_KBTH - after_KBTH).abs().amax(-1)[:, 0] < 1e-5
    assert same_KT[:, :12].all(), "the first 12 tokens decide what is expected of position 11"
    assert not same_KT[:, 13:].any()


def test_weights_choose_what_is_learnt(target: Target) -> None:
    """A batch with half of its positions switched off gives the loss of the other half alone."""
    module = draft_module(target, random_draft(target), num_steps=2)
    batch = draft_batch(target, torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2)))
    alone = draft_batch(target, batch.token_ids_BT[:1])
    batch.weight_BT[1] = 0.0
    torch.testing.assert_close(module.training_step(batch).loss, module.training_step(alone).loss)
    batch.weight_BT[0] = 0.0
    nothing = module.training_step(batch).loss
    nothing.backward()
    assert nothing.item() == 0.0


def test_chains_that_nobody_asks_for_change_nothing_of_the_others(target: Target) -> None:
    """Losses and gradients are those of running a chain from every position."""
    ids_BT = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(3))
    batch = draft_batch(target, ids_BT)
    wanted_BT = torch.zeros(3, 24, dtype=torch.bool)
    wanted_BT[0, 9:15] = wanted_BT[1, 20:] = wanted_BT[2, 0] = True
    module = draft_module(target, random_draft(target), num_steps=3)
    weights = torch.randn(3, 3, 24, 64, generator=torch.Generator().manual_seed(4)) * wanted_BT[..., None]
    gradients = []
    for asked_BT in (torch.ones_like(wanted_BT), wanted_BT):
        module.zero_grad()
        hidden_KBTH = module.unroll(batch, asked_BT)
        (hidden_KBTH * weights).sum().backward()
        kept_KBTH = hidden_KBTH.detach() * wanted_BT[..., None]
        gradients.append([kept_KBTH, *(p.grad for p in module.draft.parameters() if p.grad is not None)])
    for full, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-4, atol=1e-4)
    assert gradients[0][0][:, 0, 9:15].abs().sum() > 0


# -- the reduced vocabulary ----------------------------------------------------------------------------------------


def test_the_two_maps_of_the_vocabulary(target: Target) -> None:
    draft = random_draft(target, draft_vocab_size=4)
    draft.set_vocabulary(torch.tensor([2, 3, 30, 60]))
    assert draft.d2t.tolist() == [2, 2, 28, 57]
    assert draft.t2d.nonzero().flatten().tolist() == [2, 3, 30, 60]
    assert draft.draft_token_ids.tolist() == [2, 3, 30, 60]
    vocabulary = DraftVocabulary.from_offsets(draft.d2t, vocab_size=VOCAB)
    assert vocabulary.target_id_D.tolist() == [2, 3, 30, 60]
    assert [int(vocabulary.draft_id_V[i]) for i in (2, 3, 30, 60, 0, 59)] == [0, 1, 2, 3, -1, -1]
