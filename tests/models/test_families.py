"""Every model family: greedy output with a draft equals transformers', drafts learn, unsupported models are refused.

Their logits are tested in test_target.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    FAMILIES,
    VOCAB,
    draft_batch,
    draft_module,
    make_engine,
    random_draft,
    reference_model,
    request,
    run,
    save_model,
    supervised_loss,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from aurora_lit.drafts.initial import initial_draft
from aurora_lit.errors import SourceError
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models.attention import ATTENTION_NAME
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target
from aurora_lit.models.target_check import check_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.lk import lk_loss

LENGTHS, NEW = (3, 17, 30), 12
LEARNED = ("llama", "gemma2", "mixtral", "gpt2")
"""Families on whose answers a draft is trained: of the others its loss is the same function of states and head, which
`test_learning_uses_the_targets_own_distribution` looks at."""


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """A tiny model of a family, the same in transformers, and prompts."""

    family: str
    target: Target
    model: PreTrainedModel
    prompts: list[list[int]]

    @torch.no_grad()
    def choices(self, answers: list[list[int]]) -> list[list[int]]:
        """What transformers chooses at each place of these answers; if it is what they hold, they are greedy."""
        return [
            self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]

    def answer(self, draft: Eagle3Draft | None, *, batch: int) -> tuple[list[list[int]], float]:
        """The engine's answers, and the mean accepted length of rounds with proposals."""
        engine = make_engine(self.target, copy.deepcopy(draft), max_draft_tokens=3, max_batch_size=batch)
        given = run(engine, [request(str(i), prompt, max_tokens=NEW) for i, prompt in enumerate(self.prompts)])
        rounds = [output for answer in given.values() for output in answer.rounds if output.num_proposed]
        length = sum(len(output.token_ids) for output in rounds) / max(1, len(rounds))
        return [given[str(i)].token_ids for i in range(len(self.prompts))], length


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=4)
    gen = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=gen).tolist() for length in LENGTHS]
    return FamilyCase(
        family=request.param,
        target=load_target(folder, precision="fp32"),
        model=reference_model(folder),
        prompts=prompts,
    )


def test_greedy_output_equals_transformers_and_a_draft_learns_to_predict_it(case: FamilyCase) -> None:
    draft = random_draft(case.target)
    greedy, length_before = case.answer(draft, batch=3)
    assert [len(answer) for answer in greedy] == [NEW] * 3
    assert greedy == case.choices(greedy)
    assert case.answer(draft, batch=1)[0] == greedy
    if case.family not in LEARNED:
        return
    width = max(LENGTHS) + NEW
    texts = [(p + a + [0] * width)[:width] for p, a in zip(case.prompts, greedy, strict=True)]
    module, batch = draft_module(case.target, draft, num_steps=2), draft_batch(case.target, torch.tensor(texts))
    optimizer, losses = torch.optim.AdamW(draft.parameters(), lr=8e-3), []
    for _ in range(30):
        loss = supervised_loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    answers, length = case.answer(draft, batch=3)
    assert answers == greedy
    assert losses[-1] < 0.4 * losses[0]
    assert length > length_before + 0.4


@torch.no_grad()
def test_learning_uses_the_targets_own_distribution(case: FamilyCase) -> None:
    """Including bias and soft cap of the head; the learner has no model, only the head."""
    target, draft = case.target, random_draft(case.target)
    batch = draft_batch(target, torch.tensor([case.prompts[2]]))
    module = draft_module(target, draft, num_steps=1)
    p_TV = target.logits(batch.last_BTH[0]).softmax(-1)
    lse_T = TargetHead(target).log_sum_exp(batch.last_BTH[0], temperature=0.0)
    torch.testing.assert_close(lse_T, target.logits(batch.last_BTH[0]).logsumexp(-1), atol=1e-5, rtol=0)
    hidden_TH = module.unroll(batch)[0, 0]
    expected_T = lk_loss(p_TV[:, draft.draft_token_ids], draft.compute_logits(hidden_TH).softmax(-1))
    stats, mask_KBT = module.score(batch)
    counted_T = mask_KBT[0, 0] > 0
    torch.testing.assert_close(stats.loss_N[0][counted_T], expected_T[counted_T], atol=1e-4, rtol=0)
    p_TD = (module.logit_transform(batch.last_BTH[0] @ module.head_VdH.T) - lse_T[:, None]).exp()
    torch.testing.assert_close(p_TD, p_TV[:, draft.draft_token_ids], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma", 1.0), ("gemma3", 1.0), ("phi", None)])
def test_a_new_drafts_norms_equal_those_that_the_target_applies(
    family: str, offset: float | None, tmp_path: Path
) -> None:
    """Gemma multiplies by one plus the weight, and its norm before the MLP has another name."""
    target = load_target(save_model(family, tmp_path), precision="fp32")
    draft, base = initial_draft(target.in_torch, torch.arange(40)), target.in_torch.model.base_model
    layer = base.layers[-1]
    assert torch.equal(draft.midlayer.hidden_norm.weight, layer.input_layernorm.weight + (offset or 0.0))
    if offset is None:  # one norm for attention and MLP, and a final one of another name
        assert torch.equal(draft.norm.weight, torch.ones(target.hidden_size))
        return
    before_mlp = layer.pre_feedforward_layernorm if family == "gemma3" else layer.post_attention_layernorm
    assert torch.equal(draft.midlayer.post_attention_layernorm.weight, before_mlp.weight + offset)
    assert torch.equal(draft.norm.weight, base.norm.weight + offset)


@pytest.mark.parametrize("family", ["bloom", "stablelm"])
def test_a_model_whose_layers_bypass_the_attention_interface_is_refused(family: str, tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="in . of . layers .* does not attend .*choose a model"):
        load_target(tmp_path, precision="fp32")


def test_a_model_that_computes_its_logits_in_another_way_is_refused(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), precision="fp32").in_torch
    target.in_torch.model.register_forward_hook(
        lambda module, args, out: out.__setitem__("logits", out.logits.square()) or out
    )
    with pytest.raises(SourceError, match="LlamaForCausalLM computes its logits"):
        check_target(target)


def test_the_layers_of_a_model_with_a_vision_tower_are_those_of_its_language_model(tmp_path: Path) -> None:
    """Though the tower has as many."""
    text = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    target = load_target(tmp_path, precision="fp32")
    ids_BT = torch.tensor([[1, 2, 3]])
    expected = target.in_torch.model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    aux_BT3H, _ = target.in_torch.forward_uncached(ids_BT)
    torch.testing.assert_close(aux_BT3H, torch.cat([expected[i] for i in target.aux_layer_ids], dim=-1))


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("gemma3n_text", {"altup_num_inputs": 2, "laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": None}),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 96, "do_layer_norm_before": False}),
    ],
)
def test_a_model_whose_hidden_states_are_of_another_shape_is_refused(
    family: str, own: dict[str, Any], tmp_path: Path
) -> None:
    """Gemma 3n's layers pass several versions of them on, and OPT-350m's are wider than its embedding and its head."""
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    if family == "gemma3n_text":
        shape |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": [96] * 4}
        shape |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
        shape |= {"activation_sparsity_pattern": [0.0] * 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **own)).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"shapes \[\[.* hidden_size=64 means .*; choose another model"):
        load_target(tmp_path, precision="fp32")


def test_keys_whose_shape_contradicts_the_configuration_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="keys of 2 heads of size 32, but its configuration says 1 heads of size 32"):
        load_target(save_model("gpt_neox", tmp_path, num_key_value_heads=1), precision="fp32")


def test_longrope_models_are_served_up_to_their_original_length(tmp_path: Path) -> None:
    """Once one sequence is longer, Phi-3's long models rotate every sequence of the batch differently."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    folder = save_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=128)
    assert load_target(folder, precision="fp32").max_positions == 128


@pytest.mark.parametrize(
    ("family", "own", "served"),
    [
        ("phimoe", {"sliding_window": 9, "num_local_experts": 4}, 9),
        ("phimoe", {"sliding_window": None, "num_local_experts": 4}, 256),
        ("mixtral", {"sliding_window": 9, "num_local_experts": 4}, 256),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_experts": 4}, 8),
    ],
)
def test_contexts_end_with_a_window_that_a_mask_alone_has(
    family: str, own: dict[str, Any], served: int, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 256}
    shape |= {"vocab_size": VOCAB, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **own)).save_pretrained(tmp_path)
    target = load_target(tmp_path, precision="fp32").in_torch
    assert target.max_positions == served
    ids_BT = torch.randint(1, VOCAB, (1, min(served, 40)))
    target.in_torch.model.set_attn_implementation("eager")
    expected_BTV = target.in_torch.model(input_ids=ids_BT).logits
    target.in_torch.model.set_attn_implementation(ATTENTION_NAME)
    torch.testing.assert_close(
        target.logits(target.in_torch.forward_uncached(ids_BT)[1]), expected_BTV, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "reason", "precision"),
    [
        ("falcon_h1", "keeps more than keys and values", "fp32"),
        ("falcon_h1", "keeps more than keys and values", "bf16"),
        ("diffllama", "two attentions", "fp32"),
        ("diffllama", "two attentions", "bf16"),
        ("doge", "adds to its attention", "fp32"),  # its bias is small, and may be rounding in bf16
    ],
)
def test_a_model_with_states_or_attention_of_its_own_is_refused(
    family: str, reason: str, precision: str, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    own = {
        "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "head_dim": 16},
        "doge": {"use_cache": False},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **own.get(family, {})))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # states that start at zero would change nothing
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=reason):
        load_target(tmp_path, precision=precision)
