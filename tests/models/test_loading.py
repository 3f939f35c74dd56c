"""A target from its packed file computes what the freshly packed one does, and only the right file is ever used."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB, make_engine, random_draft, save_model

from aurora_lit.errors import CacheError
from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedEmbedding
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.models import loading, packed_file
from aurora_lit.models.interface import Target
from aurora_lit.models.loading import load_target, packed_key, packed_path
from aurora_lit.models.native_target import NativeTarget, packed_contents, read_native
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.request import Request, SamplingParams

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")


@pytest.fixture(autouse=True)
def no_model_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SMALLEST_BYTES", 0)


def packed_and_fresh(folder: Path, cache_dir: Path, precision: str) -> tuple[NativeTarget, NativeTarget]:
    fresh = load_target(folder, precision=precision)
    key = packed_key(folder, precision=precision)
    path = packed_path(folder, key=key, cache_dir=cache_dir)
    facts, tensors = packed_contents(fresh)
    packed_file.write(path, tensors, facts=facts, key=key)
    return read_native(*packed_file.read(path, key=key)), fresh


def outputs(target: Target) -> list[torch.Tensor]:
    kv_cache, slots_B = target.make_kv_cache(num_slots=2, capacity=64), torch.tensor([1, 0])
    ids_BT = torch.arange(34).remainder(VOCAB).view(2, 17)
    first = target(ids_BT, kv_cache=kv_cache, slots_B=slots_B, starts_B=torch.tensor([0, 0]))
    more = target(ids_BT[:, :1], kv_cache=kv_cache, slots_B=slots_B, starts_B=torch.tensor([17, 17]))
    last_BTH = first[1]
    return [*first, *more, target.logits(last_BTH), target.greedy_tokens(last_BTH)]


def answer(target: Target, draft: Eagle3Draft) -> tuple[list[int], int]:
    """A greedy answer with proposals that branch, and how many proposals were accepted."""
    engine = make_engine(target, draft, branches=True)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    engine.submit(Request(request_id="a", prompt_ids=list(range(5, 20)), params=params))
    found: list[int] = []
    while engine.has_work:
        for output in engine.round():
            found += output.token_ids
    return found, engine.counters.accepted


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 2, "hidden_size": 72, "head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama3", {}),
    ],
)
def test_outputs_are_those_of_the_freshly_packed_target(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder, ids = save_model(family, tmp_path / "model", num_hidden_layers=4, **changes), torch.arange(0, VOCAB, 7)
    for precision in ("fp32", "bf16", "int8", "int4", *(["auto"] if family == "llama" else [])):
        packed, fresh = packed_and_fresh(folder, tmp_path, precision)
        assert packed.has_native_decoder
        for ours, expected in zip(outputs(packed), outputs(fresh), strict=True):
            assert torch.equal(ours, expected)
        assert torch.equal(packed.embedding_rows(), fresh.embedding_rows())
        assert torch.equal(packed.head_rows(ids), fresh.head_rows(ids))
        states_NH = torch.randn(5, packed.hidden_size, generator=torch.Generator().manual_seed(0))
        lse_N, expected_N = (TargetHead(target).log_sum_exp(states_NH) for target in (packed, fresh))
        assert torch.equal(lse_N, expected_N)
        assert {**packed.facts, "logit_transform": None} == {**fresh.facts, "logit_transform": None}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_draft_proposes_the_same_on_it(precision: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=True)
    packed, fresh = packed_and_fresh(folder, tmp_path, precision)
    assert answer(packed, random_draft(packed)) == answer(fresh, random_draft(fresh))


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("int8", True), ("bf16", False)])
def test_a_tied_embedding_is_read_from_the_head_where_that_is_exact(
    precision: str, shared: bool, tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path / "model", tie_word_embeddings=True)
    model = load_target(folder, precision="int8").head_rows(torch.arange(VOCAB))  # values that 8 bits hold
    weights = packed_weights(folder)
    weights["model.embed_tokens.weight"] = model
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    packed, fresh = packed_and_fresh(folder, tmp_path, precision)
    embedding = packed.embedding
    assert isinstance(embedding, PackedEmbedding)
    assert (embedding.table is packed.head) == shared
    assert torch.equal(packed.embedding_rows(), fresh.embedding_rows())


def packed_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "model", num_hidden_layers=4)


def files(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "packed").iterdir())


def test_the_second_load_reads_the_file_and_no_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_target(folder, precision="bf16", cache_dir=tmp_path)
    monkeypatch.setattr(loading, "_load", None)
    second = load_target(folder, precision="bf16", cache_dir=tmp_path)
    assert first.in_torch is None
    assert second.in_torch is None
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "longer", "other facts", "no header"])
def test_a_damaged_file_is_refused_and_made_again(
    damage: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(load_target(folder, precision="int4", cache_dir=tmp_path))
    (path,) = files(tmp_path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "empty": b"",
            "flipped": bytes(flipped),
            "longer": content + b"\0" * 64,
            "other facts": content.replace(b'vocab_size\\": 61', b'vocab_size\\": 62'),
            "no header": b"\xff" * len(content),
        }[damage]
    )
    assert path.read_bytes() != content
    with caplog.at_level(logging.WARNING):
        again = load_target(folder, precision="int4", cache_dir=tmp_path)
    assert [str(path) in record.message for record in caplog.records] == [True]
    assert path.read_bytes() == content
    for ours, wanted in zip(outputs(again), expected, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("changed", ["precision", "source", "code", "kernels", "libraries"])
def test_a_file_made_from_something_else_is_refused(changed: str, folder: Path, tmp_path: Path) -> None:
    load_target(folder, precision="bf16", cache_dir=tmp_path)
    (path,) = files(tmp_path)
    key = packed_key(folder, precision="bf16")
    with pytest.raises(CacheError, match=changed):
        packed_file.read(path, key={**key, changed: "other"})
    assert packed_path(folder, key={**key, changed: "other"}, cache_dir=tmp_path) != path


def test_a_file_is_named_by_the_code_the_kernels_and_the_libraries_that_made_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed_key(folder, precision="bf16")

    def changed() -> set[str]:
        after = packed_key(folder, precision="bf16")
        return {name for name in before if after[name] != before[name]}

    assert not changed()
    with monkeypatch.context() as patched:
        patched.setattr(loading.native, "build_digest", lambda: "of another processor")
        assert changed() == {"kernels"}
    for library in ("torch", "transformers"):
        with monkeypatch.context() as patched:
            patched.setattr(loading.torch, "__version__", "2.99") if library == "torch" else patched.setattr(
                loading.importlib.metadata, "version", lambda name: "9.9"
            )
            assert changed() == {"libraries"}
    with monkeypatch.context() as patched:
        patched.setattr(loading, "_CODE", [*loading._CODE, Path(__file__)])
        assert changed() == {"code"}


def test_a_source_that_was_written_again_is_packed_again(folder: Path, tmp_path: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))
    before = outputs(load_target(folder, precision="fp32", cache_dir=tmp_path))
    weights = packed_weights(folder)
    weights["model.norm.weight"] *= 2
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", ns=(1, 1))  # as tools do that give every file one time
    after = outputs(load_target(folder, precision="fp32", cache_dir=tmp_path))
    assert torch.equal(after[1], before[1] * 2)


def test_the_cache_keeps_two_versions_of_a_source(folder: Path, tmp_path: Path) -> None:
    for version in range(4):
        os.utime(folder / "model.safetensors", ns=(version, version))
        load_target(folder, precision="bf16", cache_dir=tmp_path)
    load_target(folder, precision="fp32", cache_dir=tmp_path)
    assert len(files(tmp_path)) == 3


def test_what_killed_processes_left_is_deleted_and_what_others_write_is_not(folder: Path, tmp_path: Path) -> None:
    load_target(folder, precision="bf16", cache_dir=tmp_path)
    (path,) = files(tmp_path)
    abandoned, being_written = (path.with_name(f".{path.name}.{pid}") for pid in (11, 12))
    for each in (abandoned, being_written):
        each.write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(abandoned, (hours_ago, hours_ago))
    path.unlink()
    load_target(folder, precision="bf16", cache_dir=tmp_path)
    assert path.exists()
    assert being_written.exists()
    assert not abandoned.exists()


def test_a_cache_that_cannot_be_written_is_said_and_serving_goes_on(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "packed").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        target = load_target(folder, precision="bf16", cache_dir=tmp_path)
    assert "every start packs them" in caplog.text
    assert target.has_native_decoder


@pytest.mark.parametrize(("family", "smallest"), [("gpt2", 0), ("llama", 1 << 30)])
def test_models_that_are_small_or_not_fused_have_no_file(
    family: str, smallest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_SMALLEST_BYTES", smallest)
    target = load_target(save_model(family, tmp_path / "model"), precision="bf16", cache_dir=tmp_path)
    assert target.in_torch is not None
    assert not (tmp_path / "packed").exists()


def test_the_file_is_not_longer_for_a_longer_context(tmp_path: Path) -> None:
    sizes = []
    for length in (256, 1 << 16):
        folder = save_model("llama", tmp_path / str(length), max_position_embeddings=length)
        packed, _ = packed_and_fresh(folder, tmp_path / f"cache-{length}", "bf16")
        assert packed.max_positions == length
        sizes.append(files(tmp_path / f"cache-{length}")[0].stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 256, "the digits of that number"


@pytest.mark.parametrize("mapped", [False, True])
def test_the_file_is_valid_safetensors_with_aligned_tensors(mapped: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5), "c": torch.randn(4).bfloat16()}
    packed_file.write(tmp_path / "file", tensors, facts={"x": [1, 2.5]}, key={"k": "v"})
    facts, found = packed_file.read(tmp_path / "file", key={"k": "v"}, mapped=mapped)
    assert facts == {"x": [1, 2.5]}
    plain = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(plain[name], tensor)
        assert found[name].data_ptr() % 64 == 0
    raw = (tmp_path / "file").read_bytes()
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["b"]["dtype"] == "F32"


def test_a_packed_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(packed_file, "sync", full)
    with pytest.raises(OSError, match="no space"):
        packed_file.write(tmp_path / "file", {"x": torch.zeros(8)}, facts={}, key={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("header", [b'{"x": {"data_offsets": []}}', b'{"x": ' + b"[" * 5000, b"\xff", b"[]"])
def test_a_packed_file_with_a_header_of_another_kind_is_not_used(header: bytes, tmp_path: Path) -> None:
    head = header.replace(b"{", b'{"__metadata__": {"aurora-lit": "{\\"key\\": {}}"}, ', 1)
    (tmp_path / "file").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CacheError, match="is not used"):
        packed_file.read(tmp_path / "file", key={})
