"""A draft starts from the target's last layer, on any family, with the most frequent tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    make_engine,
    reference_model,
    request,
    run,
    save_model,
)

from aurora_lit.drafts.initial import choose_vocabulary, initial_draft
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target


def test_a_draft_starts_from_the_targets_last_layer(target: Target, folder: Path) -> None:
    ids = torch.tensor([1, 4, 30, 60])
    draft = initial_draft(target.in_torch, ids)
    layer, size = target.in_torch.model.base_model.layers[-1], target.hidden_size
    assert draft.draft_token_ids.tolist() == ids.tolist()
    assert torch.equal(draft.lm_head.weight, target.head_rows(ids))
    assert torch.equal(draft.norm.weight, target.in_torch.model.base_model.norm.weight)
    assert torch.equal(draft.midlayer.hidden_norm.weight, layer.input_layernorm.weight)
    assert torch.equal(draft.midlayer.post_attention_layernorm.weight, layer.post_attention_layernorm.weight)
    assert draft.config.aux_layer_ids == target.aux_layer_ids
    assert (draft.config.intermediate_size, draft.config.head_dim) == (96, 32)
    plain = reference_model(folder).model.layers[-1]
    for own, name in ((draft.midlayer.mlp, "gate_proj"), (draft.midlayer.mlp, "down_proj")):
        assert torch.equal(getattr(own, name).weight, getattr(plain.mlp, name).weight)
    assert torch.equal(draft.midlayer.self_attn.o_proj.weight, plain.self_attn.o_proj.weight)
    values = plain.self_attn.v_proj.weight.repeat(2, 1)  # two heads share one of the target's
    assert torch.equal(draft.midlayer.self_attn.v_proj.weight[:, size:], values)
    highest = draft.fc.weight[:, 2 * size :] - torch.eye(size)
    assert max(draft.fc.weight[:, : 2 * size].abs().max(), highest.abs().max()) < 0.1


def test_heads_that_share_keys_in_the_target_start_with_them(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, num_attention_heads=4, num_key_value_heads=2)
    target = load_target(folder, precision="fp32")
    draft, plain = initial_draft(target.in_torch, torch.arange(40)), reference_model(folder).model.layers[-1].self_attn
    for name, shared in (("q", 1), ("k", 2), ("v", 2)):
        own_GDH = getattr(plain, f"{name}_proj").weight.view(-1, 32, 64)
        made_QDH = getattr(draft.midlayer.self_attn, f"{name}_proj").weight.view(4, 32, 128)[..., 64:]
        for head in range(4):
            assert torch.equal(made_QDH[head], own_GDH[head // shared]), (name, head)


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "gpt2"])
def test_a_draft_can_start_on_any_family(family: str, tmp_path: Path) -> None:
    target = load_target(save_model(family, tmp_path), precision="fp32")
    draft = initial_draft(target.in_torch, torch.arange(40), intermediate_size=None)
    given = run(make_engine(target, draft, max_draft_tokens=2), [request("a", (1, 2, 3), max_tokens=4)])
    assert given["a"].token_ids == run(make_engine(target), [request("a", (1, 2, 3), max_tokens=4)])["a"].token_ids


def test_the_vocabulary_holds_the_most_frequent_tokens() -> None:
    counts = torch.tensor([0, 1, 2, 0, 0, 3, 0, 0, 0, 1, 0, 0])
    assert choose_vocabulary(counts, 3).tolist() == [1, 2, 5]
    assert choose_vocabulary(counts, 3, always=[11]).tolist() == [2, 5, 11]
