"""The memory table: against arithmetic by hand, and against what a tiny model of each family has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, reference_model, save_model, tiny_config
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from aurora_lit.cli.footprint import draft_shape, gguf_bytes, model_shape, needs
from aurora_lit.config import AuroraConfig, load_config
from aurora_lit.drafts.initial import initial_draft
from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
MIXTRAL_8X22B = MixtralConfig(
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=56,
    num_attention_heads=48,
    num_key_value_heads=8,
    num_local_experts=8,
    vocab_size=32768,
    tie_word_embeddings=False,
)


def deployment(*, strategy: str, devices: int) -> AuroraConfig:
    """Sixteen requests of 8192 positions, 15 copied tokens, k = 4, bf16, a draft from scratch."""
    config = load_config(
        None,
        [
            "draft.checkpoint=null",
            "learn.from_scratch=true",
            "engine.max_batch_size=16",
            "engine.max_seq_len=8192",
            "trace.capacity_mb=4096",
        ],
    )
    return replace(config, engine=replace(config.engine, strategy=strategy, devices=devices))


def table(config: AuroraConfig, shape: PretrainedConfig) -> dict[str, int]:
    return {need.what: need.num_bytes for need in needs(config, shape)}


# By hand: after 8192 positions a slot has one for the last committed token and 15 for what a round copies, more than
# the draft's four. The KV caches round up to whole blocks of 64 positions.
CAPACITY = 8192 + 1 + 15
KEPT = 16 * 129 * 64


def test_llama_70b_by_hand() -> None:
    found = table(deployment(strategy="tensor_parallel", devices=4), LLAMA_70B)
    attention = 8192 * (64 * 128) * 2 + 8192 * (8 * 128) * 2
    layer = attention + 3 * 8192 * 28672 + 2 * 8192
    parameters = 80 * layer + 2 * 128256 * 8192 + 8192
    assert parameters == 70_553_706_496  # the model card says 70.6 billion
    assert found["weights"] == parameters * 2 // 4
    assert found["keys and values"] == 2 * 80 * (8 // 4) * 128 * KEPT * 2
    # EAGLE-3's layer: attention from 2H, as wide as the target's 64 heads; fc from 3H; the head of 16,384 rows.
    matrices = 3 * (2 * 8192) * 8192 + 8192 * 8192 + 3 * 8192 * 28672 + 3 * 8192 * 8192
    draft = matrices + 16_384 * 8192 + 4 * 8192 + (8192 + 1)  # four norms, value head
    assert found["draft"] == 2 * draft * 2
    assert found["draft, keys and values"] == 2 * 64 * 128 * KEPT * 2
    assert found["draft, features"] == 16 * CAPACITY * 3 * 8192 * 2
    assert found["traces, kept states"] == 16 * (CAPACITY + 1) * 8192 * 2
    assert found["traces, ring"] == 4096 << 20
    assert found["kept prefixes"] == 256 << 20
    assert found["learner, the target's embedding and head"] == 128256 * 8192 * (4 + 2) + 2 * 16_384 * 8192 * 2
    assert found["learner, draft"] == 3 * 4 * draft + 4 * matrices + 8 * (draft - matrices)


def test_where_auto_is_fp32_the_table_counts_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deployment(strategy="single", devices=1)
    in_bf16 = table(config, LLAMA_70B)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # as on a Mac
    monkeypatch.setattr(native, "library", lambda: None)
    in_fp32 = table(config, LLAMA_70B)
    for what in ("weights", "keys and values", "draft"):
        assert in_fp32[what] == 2 * in_bf16[what]


def test_mixtral_8x22b_by_hand() -> None:
    found = table(deployment(strategy="fsdp", devices=8), MIXTRAL_8X22B)
    attention = 2 * 6144 * (48 * 128) + 2 * 6144 * (8 * 128)
    layer = attention + 8 * 3 * 6144 * 16384 + 8 * 6144 + 2 * 6144  # eight experts, their router, two norms
    parameters = 56 * layer + 2 * 32768 * 6144 + 6144
    assert parameters == 140_630_071_296  # 141 billion
    assert found["weights"] == parameters * 2 // 8
    assert found["gathered layers"] == 2 * layer * 2
    assert found["keys and values"] == 2 * 56 * 8 * 128 * KEPT * 2, "every rank keeps all heads"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_equals_what_a_model_has(family: str, tmp_path: Path) -> None:
    """Weights, KV cache and an untrained draft, on a tiny model of every family."""
    target = load_target(save_model(family, tmp_path, num_hidden_layers=3), precision="fp32")
    config = load_config(
        None,
        [
            f"target.source={tmp_path}",
            "target.precision=fp32",
            "draft.checkpoint=null",
            "learn.from_scratch=true",
            "engine.max_batch_size=3",
            "engine.max_seq_len=64",
        ],
    )
    lines = table(config, model_shape(config, tmp_path))
    assert lines["weights"] == 4 * sum(parameter.numel() for parameter in reference_model(tmp_path).parameters())
    slots = target.make_kv_cache(num_slots=3, capacity=64 + 16 + 1)
    kept = sum(tensor.nbytes for tensor in (*slots.keys_SGCQPE, *slots.values_SGMDE))
    assert lines["keys and values"] == kept
    wanted = initial_draft(target.in_torch, torch.arange(target.vocab_size), max_positions=64)
    text = tiny_config(family, num_hidden_layers=3).get_text_config()
    own = Eagle3Draft(draft_shape(config, text))
    assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    assert lines["draft"] == 2 * 4 * sum(parameter.numel() for parameter in own.parameters())


@pytest.mark.parametrize("content", ["", "[]", '{"hidden_size": 3}', '{"model_type": "no such"}'])
def test_an_invalid_configuration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError, match="config.json is not that of a causal language model .*save_pretrained"):
        model_shape(load_config(None, []), tmp_path)


def test_weights_of_a_gguf_are_counted_by_its_bytes_and_never_held_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(bytes(1000))
    config, shape = load_config(None, ["draft.checkpoint=null", "learn.enabled=false"]), tiny_config("llama")
    found = {need.what: need.num_bytes for need in needs(config, shape, gguf_bytes=gguf_bytes(tmp_path))}
    assert found["weights"] == 1150
    assert "weights, while loading" not in found
    (tmp_path / "model.safetensors").touch()
    assert gguf_bytes(tmp_path) is None, "then these are read"
