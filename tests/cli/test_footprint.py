"""The memory table: against arithmetic by hand, and against what a tiny model of each family has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, reference_model, save_model, tiny_config

from aurora_lit.cli.doctor import doctor
from aurora_lit.cli.footprint import fewest_devices, needs, total
from aurora_lit.cli.model_sizes import draft_shape, model_shape
from aurora_lit.config import DEFAULT_CONFIG, AuroraConfig, load_config
from aurora_lit.drafts.initial import initial_draft
from aurora_lit.errors import ConfigError
from aurora_lit.kernels import native
from aurora_lit.models.loading import load_target
from aurora_lit.modules.draft.eagle3 import Eagle3Draft


def deployment(name: str, *, strategy: str, devices: int, learn: bool = False) -> AuroraConfig:
    """Sixteen requests of 8192 positions, 15 copied tokens, k = 4, bf16, a draft from scratch."""
    config = load_config(
        None,
        [
            f"target.config_file=configs/shapes/{name}.json",
            "draft.checkpoint=null",
            "learn.from_scratch=true",
            "engine.max_batch_size=16",
            "engine.max_seq_len=8192",
            "engine.prefill_chunk_tokens=512",
            "trace.capacity_mb=4096",
            f"learn.enabled={learn}",
        ],
    )
    return replace(config, engine=replace(config.engine, strategy=strategy, devices=devices))


def table(config: AuroraConfig) -> dict[str, int]:
    shape = model_shape(config, folder=None)
    assert shape is not None
    return {need.what: need.num_bytes for need in needs(config, shape, devices=config.engine.devices)}


# By hand: after 8192 positions a slot has one for the last committed token and 15 for what a round copies, more than
# the draft's four. The KV caches round up to whole blocks of 64 positions.
CAPACITY = 8192 + 1 + 15
KEPT = 16 * 129 * 64


def test_llama_70b_by_hand() -> None:
    found = table(deployment("llama-3.1-70b", strategy="tensor_parallel", devices=4))
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
    assert found["learner, the target's embedding and head"] == 128256 * 8192 * (4 + 2) + 2 * 16_384 * 8192 * 2
    assert found["learner, draft"] == 3 * 4 * draft + 4 * matrices + 8 * (draft - matrices)


def test_where_auto_is_fp32_the_table_counts_four_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deployment("llama-3.1-70b", strategy="single", devices=1)
    in_bf16 = table(config)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # as on a Mac
    monkeypatch.setattr(native, "library", lambda: None)
    in_fp32 = table(config)
    for what in ("weights", "keys and values", "draft"):
        assert in_fp32[what] == 2 * in_bf16[what]


@pytest.mark.parametrize(("name", "card_gb", "devices"), [("llama-3.1-70b", 80, 4), ("mixtral-8x22b", 80, 8)])
def test_the_shipped_deployments_use_the_smallest_set_of_gpus(
    name: str, card_gb: int, devices: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = DEFAULT_CONFIG.with_name(f"{name}.yaml")
    config = load_config(path, [f"target.cache_dir={tmp_path}"])
    shape = model_shape(config, folder=None)
    assert shape is not None
    assert config.engine.devices == devices
    found = fewest_devices(config, shape, card_gb=card_gb)
    assert found == (devices, int(not config.learn.enabled))
    ring_positions = (config.trace.capacity_mb << 20) // (8 * shape.hidden_size)  # four hidden states, 2 bytes each
    assert f"about {ring_positions // 1000} k positions" in path.read_text()
    doctor(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"Memory over {devices} devices with tensor_parallel" in said
    assert f"80 GB: {devices}" in said


def test_all_gpus_of_the_learner_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = DEFAULT_CONFIG.with_name("llama-3.1-70b.yaml")
    doctor(load_config(path, [f"target.cache_dir={tmp_path}", "learn.devices=2"]))
    assert "80 GB: 4 and 2 for the learner" in " ".join(capsys.readouterr().out.split())


def test_mixtral_8x22b_by_hand() -> None:
    found = table(deployment("mixtral-8x22b", strategy="fsdp", devices=8))
    attention = 2 * 6144 * (48 * 128) + 2 * 6144 * (8 * 128)
    layer = attention + 8 * 3 * 6144 * 16384 + 8 * 6144 + 2 * 6144  # eight experts, their router, two norms
    parameters = 56 * layer + 2 * 32768 * 6144 + 6144
    assert parameters == 140_630_071_296  # 141 billion
    assert found["weights"] == parameters * 2 // 8
    assert found["gathered layers"] == 2 * layer * 2
    assert found["keys and values"] == 2 * 56 * 8 * 128 * KEPT * 2, "every rank keeps all heads"


@pytest.mark.parametrize(
    ("name", "strategy", "learn", "smallest"),
    [
        ("llama-3.1-70b", "tensor_parallel", False, {24: None, 40: None, 80: (4, 1), 141: (2, 1)}),
        ("llama-3.1-70b", "tensor_parallel", True, {40: None, 80: (8, 0), 141: (4, 0)}),
        ("mixtral-8x22b", "tensor_parallel", True, {40: None, 80: (8, 0), 141: (4, 0)}),
        ("mixtral-8x22b", "single", True, {141: None}),
    ],
)
def test_the_smallest_set_of_gpus(
    name: str, strategy: str, learn: bool, smallest: dict[int, tuple[int, int] | None]
) -> None:
    config = deployment(name, strategy=strategy, devices=1, learn=learn)
    shape = model_shape(config, folder=None)
    assert shape is not None
    for card_gb, wanted in smallest.items():
        assert fewest_devices(config, shape, card_gb=card_gb) == wanted
        if wanted is None or learn:
            continue
        lines = needs(config, shape, devices=wanted[0])
        assert total(lines, "every device", "first device") < card_gb * 10**9
        fewer = needs(config, shape, devices=wanted[0] // 2)
        assert total(fewer, "every device", "first device") > 0.95 * card_gb * 10**9


def test_each_process_of_the_servers_own_learner_has_a_gpu() -> None:
    config = deployment("mixtral-8x22b", strategy="tensor_parallel", devices=1, learn=True)
    shape = model_shape(config, folder=None)
    assert shape is not None
    for processes, wanted in ((2, (8, 0)), (8, (8, 0)), (10, (8, 2))):
        several = replace(config, learn=replace(config.learn, devices=processes))
        assert fewest_devices(several, shape, card_gb=80) == wanted


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
            "engine.prefill_chunk_tokens=16",
        ],
    )
    shape = model_shape(config, folder=tmp_path)
    assert shape is not None
    lines = {need.what: need.num_bytes for need in needs(config, shape, devices=1)}
    assert lines["weights"] == 4 * sum(parameter.numel() for parameter in reference_model(tmp_path).parameters())
    slots = target.make_kv_cache(num_slots=3, capacity=64 + 16 + 1)
    kept = sum(tensor.nbytes for tensor in (*slots.keys_SGCQPE, *slots.values_SGMDE))
    assert lines["keys and values"] == kept
    wanted = initial_draft(target.in_torch, torch.arange(target.vocab_size), max_positions=64)
    text = tiny_config(family, num_hidden_layers=3).get_text_config()
    own = Eagle3Draft(draft_shape(config, text))
    assert {n: p.shape for n, p in own.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
    assert lines["draft"] == 2 * 4 * sum(parameter.numel() for parameter in own.parameters())


@pytest.mark.parametrize("content", [None, "", "[]", '{"hidden_size": 3}', '{"model_type": "no such"}'])
def test_an_invalid_config_file_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"target.config_file={path} cannot be read .*config.json"):
        model_shape(load_config(None, [f"target.config_file={path}"]), folder=None)


def test_without_model_and_config_file_there_is_no_table() -> None:
    assert model_shape(load_config(None, []), folder=None) is None
