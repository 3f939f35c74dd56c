"""Loads a target from a model folder: natively where its family has a row and there are kernels, otherwise in torch.

    target = load_target(folder, precision="int4")
    target = load_target(folder, precision="int4", cache_dir=cache)     # in a second or less from the second time on

A model is read as fp32 and packed, or packed tensor by tensor from a GGUF file (gguf_model.py). It is compared with its
own forward pass, and its layers are replaced by native ones. With a `cache_dir`, everything that a native target's
forward pass reads is then kept in a file of its packed weights, and read from there the next time: no fp32, no
transformers. The file is not used if anything has changed that determines its content: the source, the precision, our
code, the kernels, the processor, the libraries. What was proved when it was written therefore still holds, and outputs
are equal bit for bit.

Leaves out the file's format (packed_file.py). A target that is not native, or that is small, has no such file.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from aurora_lit.durable import changed_at
from aurora_lit.errors import AuroraError, CacheError, SourceError
from aurora_lit.kernels import native
from aurora_lit.kernels.packed_linear import PackedLinear, pack_model
from aurora_lit.models import packed_file
from aurora_lit.models.gguf import gguf_in
from aurora_lit.models.gguf_folder import check_weights
from aurora_lit.models.interface import CPU
from aurora_lit.models.native_target import NativeTarget, make_native, packed_contents, read_native
from aurora_lit.models.source import UNQUANTISED, check_names, loading_error, unreadable_weights
from aurora_lit.models.target_check import check_target
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.progress import waiting

_SMALLEST_BYTES = 64 << 20
"""Smaller sources are packed as fast as a file is read."""
_KEPT_FILES = 2
"""Files of one source and precision that stay in the cache, the newest: two versions of the code can share it."""
_ABANDONED_AFTER_S = 3600
"""A file that is not finished after this time is of a process that was killed; writing takes seconds."""
_SAMPLE_BYTES = 4096
_GGUF_SAMPLES = 1024
"""Places of a GGUF file that are read to identify it."""
_WEIGHTS = (".safetensors", ".gguf")
_MAX_HEADER_BYTES = 100 << 20
"""safetensors reads no longer ones."""
_CODE = (*Path(native.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.py"))
_log = logging.getLogger(__name__)


def load_target(
    folder: Path, *, precision: str, device: torch.device = CPU, cache_dir: Path | None = None, mapped: bool = False
) -> NativeTarget | TorchTarget:
    """Load a model folder. `precision`: one of fp32, bf16, int8, int4, auto (see `pack_model`).

    With native kernels, linear layers are packed for them and only their weights have that precision. Without, and on
    other devices than the CPU, the whole model is fp32 or bf16.

    `cache_dir`: where packed files are kept; a target that is read from one has no `in_torch`. None: nowhere.
    `mapped`: weights of a packed file stay there until they are used, which is slower and needs less memory.

    Raises SourceError.
    """
    size = sum(path.stat().st_size for path in (gguf_in(folder), *folder.glob("*.safetensors")) if path is not None)
    if cache_dir is None or native.library() is None or size < _SMALLEST_BYTES:
        return _load(folder, precision=precision, device=device)
    key = packed_key(folder, precision=precision)
    path = packed_path(folder, key=key, cache_dir=cache_dir)
    try:
        return read_native(*packed_file.read(path, key=key, mapped=mapped))
    except FileNotFoundError:
        pass
    except CacheError as error:
        _log.warning("%s; it is made again", error)
    target = _load(folder, precision=precision, device=device)
    if isinstance(target, TorchTarget):
        return target
    try:
        facts, tensors = packed_contents(target)
        packed_file.write(path, tensors, facts=facts, key=key)
        _remove_older(path)
        if gguf_in(folder) is not None:  # what was packed is all that is in memory; read again it would be twice
            target.in_torch = None
            return target
        packed = read_native(*packed_file.read(path, key=key, mapped=mapped))
    except (OSError, CacheError) as error:
        _log.warning("the packed weights are not kept, so that every start packs them: %s", error)
        return target
    del target, tensors
    gc.collect()  # the model refers to itself
    return packed


def _load(folder: Path, *, precision: str, device: torch.device) -> NativeTarget | TorchTarget:
    """As `load_target`, from the model's own files."""
    packing = device.type == "cpu" and native.library() is not None
    dtype = model_dtype(precision, device)
    if precision in ("int8", "int4") and device.type != "cpu":
        raise SourceError(f"target.precision={precision} runs on the CPU only; set engine.device=cpu, or use bf16")
    if not packing and precision in ("int8", "int4"):
        reason, remedy, _ = native.absence() or native.Absence("they are not in use", "see `aurora-lit doctor`")
        raise SourceError(f"target.precision={precision} needs the native kernels: {reason}; {remedy}, or use bf16")
    if (unreadable := unreadable_weights(folder)) is not None:
        raise SourceError(f"target.source: {folder} {unreadable}; {UNQUANTISED}")
    with waiting(f"Loading {folder.name}"):
        check_weights(folder)
        model = _packed_from_gguf(folder, precision) if packing and gguf_in(folder) is not None else None
        if model is None:
            model = transformers_model(folder, dtype=torch.float32 if packing else dtype)
            if packing:
                pack_model(model, precision=precision, head=model.get_output_embeddings())
        elif precision == "auto":
            dtype = _kv_dtype(model)
    target = TorchTarget(model.to(device), kv_dtype=dtype)
    check_target(target)
    if not packing:
        return target
    found = make_native(target)
    if isinstance(found, NativeTarget):
        return found
    target.why_not_native = found
    return target


def transformers_model(folder: Path, *, dtype: torch.dtype) -> Any:
    """The model of a folder as transformers loads it, all of it in one type. Raises SourceError."""
    from transformers import AutoModelForCausalLM  # takes seconds, and a packed file needs none of it

    try:
        if gguf_in(folder) is not None:
            from aurora_lit.models.gguf_model import plain_model

            return plain_model(folder, dtype=dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except SourceError:
        raise
    except Exception as error:  # families and quantisers raise exceptions of all kinds
        raise loading_error(folder, error) from error
    model, loading = loaded
    check_names(folder, missing=loading["missing_keys"], unread=loading["unexpected_keys"])
    return model


def _packed_from_gguf(folder: Path, precision: str) -> Any:
    """The packed model of a GGUF folder; None if its family is not packed from there, which the log says."""
    from aurora_lit.models.gguf_model import packed_model

    try:
        found = packed_model(folder, precision=precision)
    except SourceError:
        raise
    except Exception as error:  # what transformers and gguf raise
        raise loading_error(folder, error) from error
    if isinstance(found, str):
        _log.debug("%s is read with transformers: %s", folder.name, found)
        return None
    return found


def _kv_dtype(model: Any) -> torch.dtype:
    """Of a packed model: that of its layers' format."""
    layer = next(each for each in model.modules() if isinstance(each, PackedLinear))
    return layer.weight_format.kv_dtype


def model_dtype(precision: str, device: torch.device = CPU) -> torch.dtype:
    """Type of a model's keys and values, and of weights that are not packed, for a setting of target.precision.

    `auto` is fp32 on CPUs where torch has no oneDNN (Macs) and there are no kernels: torch then multiplies bf16 in a
    plain loop, so that a prompt takes ten times as long as in fp32.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    slow_bf16 = device.type == "cpu" and not has_onednn and native.library() is None
    return torch.float32 if precision == "fp32" or (precision == "auto" and slow_bf16) else torch.bfloat16


def packed_path(folder: Path, *, key: Mapping[str, str], cache_dir: Path) -> Path:
    """The file for a model folder. Versions of the code or of the machine have names of their own."""
    source = hashlib.sha256(f"{folder.resolve()} {key['precision']}".encode()).hexdigest()[:16]
    version = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]
    return cache_dir / "packed" / f"{source}-{version}.safetensors"


def packed_key(folder: Path, *, precision: str) -> dict[str, str]:
    """Everything that determines a packed file's content, by what it is.

    Files of weights are identified by name, size, time of change and the beginning of each tensor: to read them whole
    would take as long as loading, and some tools give every file the same time.
    """
    source, code = hashlib.sha256(), hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            status = path.stat()
            source.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            for part in _sample(path):
                source.update(part)
        elif path.name in ("config.json", "generation_config.json"):
            source.update(path.read_bytes())
    for path in sorted(_CODE):
        code.update(path.read_bytes())
    return {
        "precision": precision,
        "source": source.hexdigest(),
        "code": code.hexdigest(),
        "kernels": native.build_digest(),
        "libraries": f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}",
    }


def weights_digest(folder: Path) -> str:
    """Digest of a sample of the weights, or traces, in a folder. A copy of the folder has the same one.

    Raises AuroraError if there are none: all such folders would have the same digest.
    """
    digest, paths = hashlib.sha256(), sorted(path for path in folder.glob("*") if path.suffix in _WEIGHTS)
    if not paths:
        raise AuroraError(f"{folder} holds no *.safetensors or *.gguf file; name the folder that does")
    for path in paths:
        for part in _sample(path):
            digest.update(part)
    return digest.hexdigest()


def _sample(path: Path) -> Iterator[bytes]:
    """A safetensors file's header, and the beginning of each tensor; of a GGUF file places at equal distances."""
    with path.open("rb") as file:
        if path.suffix == ".gguf":
            size = os.fstat(file.fileno()).st_size
            for place in range(_GGUF_SAMPLES):
                yield os.pread(file.fileno(), _SAMPLE_BYTES, size * place // _GGUF_SAMPLES)
            return
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _MAX_HEADER_BYTES))
        yield header
        try:
            begins = [entry["data_offsets"][0] for name, entry in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):  # loading it will say what is wrong
            return
        for begin in begins:
            yield os.pread(file.fileno(), _SAMPLE_BYTES, 8 + length + begin)


def _remove_older(path: Path) -> None:
    """Delete all but the newest files of a source, and what killed processes left of them."""
    source, _ = path.stem.split("-")
    files = sorted(path.parent.glob(f"{source}-*.safetensors"), key=changed_at)
    abandoned_before = time.time() - _ABANDONED_AFTER_S
    unfinished = path.parent.glob(f".{source}-*.safetensors.*")
    for old in [*files[:-_KEPT_FILES], *(each for each in unfinished if changed_at(each) < abandoned_before)]:
        old.unlink(missing_ok=True)
