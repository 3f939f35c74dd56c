"""GGUF files: what is read from each type of block, and a model that is packed from them tensor by tensor."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from support.tiny_gguf import gguf_header, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from aurora_lit.errors import SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.quantization import dequantize_grouped
from aurora_lit.models.gguf import GgufFile
from aurora_lit.models.gguf_blocks import TOLERANCE, codes, values
from aurora_lit.models.gguf_folder import folder_of_file
from aurora_lit.models.gguf_model import in_safetensors, plain_model
from aurora_lit.models.loading import load_target, transformers_model
from aurora_lit.models.native_target import NativeTarget

EXACT = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")


def write_blocks(path: Path, kind: Type, *, rows: int = 40, inputs: int = 512) -> np.ndarray[Any, Any]:
    """A file with one matrix of random blocks, whose fp16 numbers are of a usual size."""
    rng = np.random.default_rng(int(kind))
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows * inputs // block_values, block_bytes), dtype=np.uint8)
    halves = {Type.Q6_K: (208,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q4_1: (0, 2), Type.Q5_1: (0, 2)}
    for place in halves.get(kind, (0,)):
        numbers = rng.uniform(1e-3, 4e-3, (len(data), 1)).astype(np.float16)
        data[:, place : place + 2] = numbers.view(np.uint8)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("matrix", data.reshape(rows, -1), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    expected: np.ndarray[Any, Any] = gguf.dequantize(data.reshape(rows, -1), kind)
    return expected


@pytest.mark.parametrize("kind", [*EXACT, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_codes_have_the_files_values(kind: Type, tmp_path: Path) -> None:
    expected_OI = torch.from_numpy(write_blocks(tmp_path / "x.gguf", kind))
    file = GgufFile(tmp_path / "x.gguf")
    found = codes(file, "matrix", 8)
    assert found is not None
    value_OI = dequantize_grouped(*found)
    assert torch.equal(values(file, "matrix", 8), expected_OI[8:])
    if kind in EXACT:
        assert torch.equal(value_OI, expected_OI[8:])
    span = found[1].scale_inputs
    error_OG = (value_OI - expected_OI[8:]).view(len(value_OI), -1, span).abs().amax(-1)
    assert bool((error_OG <= TOLERANCE * expected_OI[8:].view(len(value_OI), -1, span).abs().amax(-1)).all())


@pytest.mark.parametrize(
    ("kind", "place", "scales"), [(Type.Q4_K, 0, slice(4, 12)), (Type.Q6_K, 208, slice(192, 208))], ids=["Q4_K", "Q6_K"]
)
def test_scales_that_fp16_does_not_hold_are_refused(kind: Type, place: int, scales: slice, tmp_path: Path) -> None:
    write_blocks(tmp_path / "x.gguf", kind)
    file = GgufFile(tmp_path / "x.gguf")
    content = np.fromfile(file.path, np.uint8)
    block = content[file.tensors["matrix"].offset :]
    block[place : place + 2] = np.array([2000], np.float16).view(np.uint8)
    block[scales] = 60
    content.tofile(file.path)
    assert codes(file, "matrix", 0, 1) is None
    assert codes(file, "matrix", 1) is not None


@pytest.mark.parametrize("damage", ["no GGUF", "half a header", "half the tensors", "unknown type", "version 9"])
def test_a_damaged_file_is_refused_with_a_remedy(damage: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    content, remedy = bytearray(path.read_bytes()), "copy or download it again"
    if damage == "no GGUF":
        content[:4] = b"PK\3\4"
    elif damage == "half a header":
        content = content[:300]
    elif damage == "half the tensors":
        content = content[: len(content) - 4000]
    elif damage == "version 9":
        content[4] = 9
        remedy = "convert it to version 3"
    else:
        name = b"token_embd.weight"
        place = content.index(name) + len(name) + 4 + 16
        content[place : place + 4] = (99).to_bytes(4, "little")
        remedy = "name a file in another quantisation"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=f"target.source: .*{remedy}"):
        GgufFile(path)


_OF_STRING, _OF_ARRAY = (struct.pack("<Q1sII", 1, b"k", 9, kind) for kind in (8, 9))


@pytest.mark.parametrize(
    "content",
    [
        gguf_header(struct.pack("<Q17sII", 17, b"general.alignment", 4, 0)),
        gguf_header(struct.pack("<Q17sIf", 17, b"general.alignment", 6, 1.5)),
        gguf_header(struct.pack("<Q17sIQ1s", 17, b"general.alignment", 8, 1, b"x")),
        gguf_header(_OF_STRING + struct.pack("<QQ", 2, 2**64 - 1)),
        gguf_header(_OF_ARRAY + struct.pack("<QI", 1, 9) * 5000),
        gguf_header(shape=(0, 1 << 62)),
    ],
    ids=["alignment 0", "alignment 1.5", "alignment x", "endless text", "nested", "empty tensor"],
)
def test_a_header_of_wrong_values_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_header())
    assert GgufFile(tmp_path / "x.gguf").rows("x").shape == (4, 128)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(SourceError, match="is no whole GGUF file"):
        GgufFile(tmp_path / "x.gguf")


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("quantised", ["F32", "Q8_0", "Q5_1", "F16"])
def test_a_packed_model_computes_what_transformers_does_with_the_file(
    architecture: str, quantised: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "x.gguf", architecture=architecture, kind=Type[quantised])
    folder = folder_of_file(path, cache_dir=tmp_path / "cache")
    assert folder is not None
    ids_BT = torch.arange(1, 13)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    expected_BTV = theirs(ids_BT).logits
    assert torch.equal(transformers_model(folder, dtype=torch.float32)(ids_BT).logits, expected_BTV)
    for precision in ("fp32", "auto", "int8"):
        target = load_target(folder, precision=precision)
        assert isinstance(target, NativeTarget)
        kv_cache = target.make_kv_cache(num_slots=1, capacity=32)
        zero_B = torch.tensor([0])
        logits_BTV = target.logits(target(ids_BT, kv_cache=kv_cache, slots_B=zero_B, starts_B=zero_B)[1])
        error = float((logits_BTV - expected_BTV).norm() / expected_BTV.norm())
        is_exact = precision == "fp32" or (precision == "auto" and quantised in ("F32", "F16"))
        assert error < (1e-4 if is_exact else 0.1), precision  # inputs are rounded to 8 bits
        if precision != "int8":
            own_VH = plain_model(folder, dtype=torch.float32).get_input_embeddings().weight
            assert torch.equal(target.embedding_rows(), own_VH)


def test_the_configuration_is_that_of_the_whole_header(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", architecture="qwen2")
    folder = folder_of_file(path, cache_dir=tmp_path / "cache")
    assert folder is not None
    ours, theirs = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf")
    own = {"architectures", "dtype", "_name_or_path"}
    assert {k: v for k, v in ours.to_dict().items() if k not in own} == {
        k: v for k, v in theirs.to_dict().items() if k not in own
    }


def test_a_file_on_disk_is_linked_and_a_changed_one_is_read_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    first = folder_of_file(path, cache_dir=tmp_path / "cache")
    assert first is not None
    assert (first / "x.gguf").resolve() == path
    write_gguf(path, architecture="qwen2")
    assert folder_of_file(path, cache_dir=tmp_path / "cache", local_only=True) is None
    assert folder_of_file(path, cache_dir=tmp_path / "cache") != first


def test_other_programs_get_it_in_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path / "cache"))
    folder = folder_of_file(write_gguf(tmp_path / "x.gguf", kind=Type.Q8_0), cache_dir=tmp_path / "cache")
    assert folder is not None
    out = in_safetensors(folder)
    ids_BT = torch.arange(1, 13)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(theirs(ids_BT).logits, transformers_model(folder, dtype=torch.float32)(ids_BT).logits)
    assert in_safetensors(folder) == out
    assert in_safetensors(out) == out
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
