"""EAGLE-3 checkpoints as SGLang, SpecForge and speculators write them are read, and computed as they are meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aurora_lit.drafts.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_draft, read_config, save_draft
from aurora_lit.errors import CheckpointError
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft, Llama3Scaling, rotary_table

SHAPE = Eagle3Config(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=40,
    draft_vocab_size=12,
    aux_layer_ids=(2, 4, 6),
    max_position_embeddings=64,
)
LAYER = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "vocab_size": 40,
}
SPECFORGE = {
    **LAYER,
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 12,
    "rope_theta": 10_000.0,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5], "use_aux_hidden_state": True},
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 12,
    "target_hidden_size": 16,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
    "transformer_layer_config": {**LAYER, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
}


def made(**changes: Any) -> Eagle3Draft:
    """A draft with random weights, norms included."""
    torch.manual_seed(0)
    draft = Eagle3Draft(replace(SHAPE, **changes), torch.arange(3, 39, 3))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.3)
    return draft


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    return folder


def tensors_of(draft: Eagle3Draft, *, layer: str = "midlayer.", without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Its tensors as other trainers name them, the embedding among them."""
    own = {name: tensor for name, tensor in draft.state_dict().items() if not name.startswith("value_head")}
    named = {name.replace("midlayer.", layer): tensor for name, tensor in own.items() if name not in without}
    return {**named, "embed_tokens.weight": torch.zeros(40, 16)}


def same_weights(left: Eagle3Draft, right: Eagle3Draft) -> bool:
    others = right.state_dict()
    return all(torch.equal(t, others[n]) for n, t in left.state_dict().items() if not n.startswith("value_head"))


@pytest.mark.parametrize("without", [(), ("t2d",)])
def test_specforges_form_is_read(tmp_path: Path, without: tuple[str, ...]) -> None:
    folder = write(tmp_path / "draft", SPECFORGE, tensors_of(made(), without=without))
    draft = load_draft(folder, SHAPE)
    assert draft.config == SHAPE
    assert same_weights(draft, made())


def test_speculators_form_is_read_with_its_normed_residual(tmp_path: Path) -> None:
    written = made(norm_before_residual=True)
    folder = write(tmp_path / "draft", SPECULATORS, tensors_of(written, layer="layers.0."))
    draft = load_draft(folder, SHAPE)
    assert draft.config == replace(SHAPE, norm_before_residual=True)
    assert same_weights(draft, written)


def test_a_prefix_of_the_model_is_left_out_and_a_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    config = replace(SHAPE, draft_vocab_size=40)
    torch.manual_seed(0)
    whole = Eagle3Draft(config)
    tensors = {
        name if name == "lm_head.weight" else f"model.{name}": tensor
        for name, tensor in tensors_of(whole, without=("d2t", "t2d")).items()
    }
    fields = {name: value for name, value in SPECFORGE.items() if name != "draft_vocab_size"}
    assert same_weights(load_draft(write(tmp_path / "draft", fields, tensors), config), whole)


VARIANTS: list[dict[str, Any]] = [
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True},
    {"norm_before_fc": True, "fc_norm": True},
]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_a_variant_keeps_its_form_when_it_is_published(tmp_path: Path, flags: dict[str, Any]) -> None:
    """What vLLM reads (llama_eagle3.py): the flags in config.json, `input_norm` and `fc_norm.0` … `.2` as tensors."""
    save_draft(made(**flags), tmp_path / "draft", dtype=torch.float32)
    config = json.loads((tmp_path / "draft" / CONFIG_NAME).read_text())
    assert {name: config.get(name, False) for name in flags} == flags
    names = set(load_file(tmp_path / "draft" / WEIGHTS_NAME))
    assert ("input_norm.weight" in names) == ("norm_before_fc" in flags)
    assert {f"fc_norm.{i}.weight" for i in range(3)} <= names or "fc_norm" not in flags
    assert same_weights(load_draft(tmp_path / "draft", SHAPE), made(**flags))


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
@torch.no_grad()
def test_a_variant_computes_what_its_flags_say(flags: dict[str, Any]) -> None:
    draft = made(**flags)
    aux_BT3H, attended_BTC, hidden_BTH = torch.randn(1, 2, 48), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    wanted = aux_BT3H
    if "norm_before_fc" in flags:
        wanted = _normed(wanted, draft.input_norm.weight)
    if "fc_norm" in flags:
        parts = zip(wanted.chunk(3, -1), draft.fc_norm, strict=True)
        wanted = torch.cat([_normed(part, norm.weight) for part, norm in parts], -1)  # type: ignore[arg-type]
    torch.testing.assert_close(draft.combine_hidden_states(aux_BT3H), draft.fc(wanted))
    layer = draft.midlayer
    residual = _normed(hidden_BTH, layer.hidden_norm.weight) if "norm_before_residual" in flags else hidden_BTH
    middle = residual + layer.self_attn.o_proj(attended_BTC)
    wanted = middle + layer.mlp(_normed(middle, layer.post_attention_layernorm.weight))
    torch.testing.assert_close(draft.complete_layer(attended_BTC, hidden_BTH), wanted)


def test_llama_3s_rotary_embedding_is_that_of_transformers() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **scaling},
    )
    cos_1LD, sin_1LD = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(20_000)[None])
    ours = replace(SHAPE, head_dim=128, rope_theta=500_000.0, rope_scaling=Llama3Scaling(**scaling))  # type: ignore[arg-type]
    cos_LD, sin_LD = rotary_table(20_000, ours)
    torch.testing.assert_close(cos_LD, cos_1LD[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(sin_LD, sin_1LD[0], atol=2e-3, rtol=0)
    assert (rotary_table(20_000, replace(ours, rope_scaling=None))[0] - cos_LD).abs().max() > 0.5


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_a_stretched_rotary_embedding_is_read_and_published(tmp_path: Path, where: str) -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    fields = {"rope_type": "llama3", **vars(scaling)}
    draft = load_draft(write(tmp_path / "draft", {**SPECFORGE, where: fields}, tensors_of(made())), SHAPE)
    assert draft.config.rope_scaling == scaling
    save_draft(draft, tmp_path / "published")
    assert read_config(tmp_path / "published").rope_scaling == scaling


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "biases in the attention"),
        ({"norm_output": True}, "norm_output"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 2048}, "sliding_window is 2048"),
        ({"use_sliding_window": True, "sliding_window": 512}, "sliding_window is 512"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "architectures is"),
        ({**SPECULATORS, "transformer_layer_config": {**LAYER, "model_type": "qwen3"}}, "qwen3"),
    ],
)
def test_what_would_compute_something_else_is_refused_with_its_name(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = write(tmp_path / "draft", {**SPECFORGE, **changes}, tensors_of(made()))
    with pytest.raises(CheckpointError, match=f"draft.checkpoint: .* is refused: .*{reason}"):
        load_draft(folder, SHAPE)


def test_a_width_that_is_null_is_the_drafts_own(tmp_path: Path) -> None:
    """As speculators writes it."""
    folder = write(tmp_path, {**SPECULATORS, "hidden_size": 16, "target_hidden_size": None}, {})
    assert read_config(folder).target_hidden_size == 16


def test_a_form_that_does_not_name_its_layers_is_told_what_to_add(tmp_path: Path) -> None:
    """As SpecForge's own configurations are."""
    config = {name: value for name, value in SPECFORGE.items() if name != "eagle_config"}
    with pytest.raises(CheckpointError, match=r"add eagle_aux_hidden_state_layer_ids to config.json: .*\[2, n // 2"):
        read_config(write(tmp_path, config, {}))


def test_a_window_that_is_not_used_and_the_activation_by_name_are_accepted(tmp_path: Path) -> None:
    for fields in ({"use_sliding_window": False, "sliding_window": 131072}, {"hidden_act": "silu"}):
        read_config(write(tmp_path, {**SPECFORGE, **fields}, {}))
