"""Reads settings from one YAML file and `key=value` overrides, and validates them.

Leaves out: which settings exist (settings.py), finding the target model (models/source.py) and checking a draft
checkpoint (drafts/checkpoint.py).

    config = load_config(None, ["engine.max_batch_size=4"])     # None: the shipped configs/smollm2.yaml
    config.engine.max_batch_size                                # 4
    load_config(Path("qwen2.5-coder-0.5b"), [])                 # a shipped deployment, by its name in configs/
"""

import dataclasses
import difflib
import functools
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from aurora_lit.errors import ConfigError
from aurora_lit.settings import SAMPLING_RANGES, EngineSettings, MemorySettings
from aurora_lit.settings import AuroraConfig as AuroraConfig

_PACKAGE = Path(__file__).resolve().parent
# In a checkout configs/ and checkpoints/ are beside the package; in a wheel, inside it.
PROJECT_FOLDER = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
DEFAULT_CONFIG = PROJECT_FOLDER / "configs" / "smollm2.yaml"
_COPIED_TOKENS = 15
"""Most tokens that a round copies for a sequence. More are seldom accepted, and each makes every slot longer."""
_SUCCESSORS = dict.fromkeys(
    (
        *("engine.explore_share", "engine.explore_temperature", "schedule"),
        *("learn.ppo_weight", "learn.ppo_clip", "learn.gae_lambda", "learn.value_weight"),
    ),
    "learn.ppo",
)
"""What replaces settings that are gone: PPO needs no rounds that explore."""
_NO_INTERPOLATION = r"write \${ where no interpolation is meant"
_log = logging.getLogger(__name__)


def load_config(path: Path | Sequence[Path] | None, overrides: Sequence[str]) -> AuroraConfig:
    """Read `path` (None: configs/smollm2.yaml), apply `key=value` overrides in order, and validate.

    `path`: a file, or the name of a shipped deployment, which gets neither draft nor learner while its draft does not
    exist. Of several, a later one changes only the settings that it names. Raises ConfigError, which names the key, the
    value and a remedy.
    """
    given = [DEFAULT_CONFIG] if path is None else [path] if isinstance(path, Path) else path
    paths = [_config_file(each) for each in given]
    read = [*(_read_yaml(file) for file in paths), *(_read_override(text) for text in overrides)]
    layers = [_checked(layer, AuroraConfig, prefix="") for layer in read]
    merged: Any = OmegaConf.create({})
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        _check_given(merged)
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError("a setting's value is nested too deeply, or too large a number; give another") from error
    assert isinstance(config, AuroraConfig)
    _check_digest(config, layers[: len(paths)], layers[len(paths) :])
    validate(config)
    naming = [index for index, layer in enumerate(layers) if "checkpoint" in layer.get("draft", {})]
    if naming and naming[-1] < len(paths) and paths[naming[-1]].parent == DEFAULT_CONFIG.parent:
        learns = "enabled" in merged.get("learn", {})
        return _without_missing_draft(config, name=paths[naming[-1]].stem, keeps_learner=learns)
    return config


def to_yaml(config: AuroraConfig) -> str:
    """All settings as YAML; load_config reads an equal config from it. Raises ConfigError if a path is not UTF-8."""
    for name, settings in dataclasses.asdict(config).items():
        for key, value in settings.items():
            if isinstance(value, str) and not _is_utf8(value):
                raise ConfigError(
                    f"{name}.{key}={ascii(value)} is not UTF-8; rename that folder, or begin in another one"
                )
    sections = {
        section: {key: _escaped(value) if isinstance(value, str) else value for key, value in settings.items()}
        for section, settings in dataclasses.asdict(config).items()
    }
    return OmegaConf.to_yaml(OmegaConf.create(sections))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def validate(config: AuroraConfig) -> None:
    """Raise ConfigError if a number is out of range or two settings exclude each other."""
    for section in dataclasses.fields(config):
        record = getattr(config, section.name)
        for setting in dataclasses.fields(record):
            if "low" in setting.metadata:
                low, high = setting.metadata["low"], setting.metadata["high"]
                value = getattr(record, setting.name)
                if not low <= value <= high:
                    raise ConfigError(f"{section.name}.{setting.name}={value} is out of range; use {low} to {high}")
    engine, target = config.engine, config.target
    if engine.strategy == "single" and engine.devices != 1:
        raise ConfigError(
            f"engine.devices={engine.devices} needs a strategy that splits the target; use "
            "engine.strategy=tensor_parallel or fsdp, or engine.devices=1"
        )
    if engine.strategy != "single" and engine.devices == 1:
        raise ConfigError(
            f"engine.strategy={engine.strategy} needs several devices; use engine.devices=2 or more, or "
            "engine.strategy=single"
        )
    if engine.strategy != "single" and engine.compile == "on":
        raise ConfigError(
            f"engine.compile=on cannot be combined with engine.strategy={engine.strategy}; use auto or off"
        )
    if engine.strategy != "single" and target.precision in ("int8", "int4"):
        raise ConfigError(
            f"target.precision={target.precision} cannot be combined with engine.strategy={engine.strategy}; "
            "use bf16 or fp32"
        )
    if target.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", target.sha256):
        raise ConfigError(f"target.sha256={target.sha256!r} is not a SHA-256; use 64 lower-case hex digits or null")
    if not re.fullmatch(r"[\w.-]+", config.checkpoint.run) or config.checkpoint.run.startswith("."):
        raise ConfigError(
            f"checkpoint.run={config.checkpoint.run!r} is not a plain folder name; use letters and digits"
        )
    for key, text in (("target.source", target.source), ("checkpoint.dir", config.checkpoint.dir)):
        if not text.strip():
            raise ConfigError(f"{key}={text!r} is empty; give a value")
    for key, optional in (
        ("server.api_key", config.server.api_key),
        ("server.model_name", config.server.model_name),
        ("draft.checkpoint", config.draft.checkpoint),
        ("memory.keep", config.memory.keep),
        ("trace.record", config.trace.record),
    ):
        if optional is not None and not optional.strip():
            raise ConfigError(f"{key}={optional!r} is empty; use null for none")
    _check_sampling(config.server.default_sampling or {})
    api_key = config.server.api_key
    if api_key is not None and api_key != api_key.strip():  # it is not shown
        raise ConfigError(
            "server.api_key begins or ends with white space, which no header can carry; remove it, such as the line "
            "break at the end of a secret's file"
        )


def _check_sampling(defaults: Mapping[str, Any]) -> None:
    """Raise ConfigError if server.default_sampling has another parameter, or a value that no request may have."""
    for name, value in defaults.items():
        key = f"server.default_sampling.{name}"
        if name not in SAMPLING_RANGES:
            raise ConfigError(f"{key}={value}: there is no such parameter; use {', '.join(SAMPLING_RANGES)}")
        if not is_sampling_value(name, value):
            low, high = SAMPLING_RANGES[name]
            kind = "whole number" if isinstance(low, int) else "number"
            raise ConfigError(f"{key}={value} cannot be used; give a {kind} from {low:g} to {high:g}")


def is_sampling_value(name: str, value: Any) -> bool:
    """True if a request may have this value of a parameter in SAMPLING_RANGES."""
    low, high = SAMPLING_RANGES[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high and (isinstance(value, int) or not isinstance(low, int))


def model_name(config: AuroraConfig) -> str:
    """The name clients see: server.model_name, else the last part of target.source without its `.Q4_1.gguf`."""
    if config.server.model_name is not None:
        return config.server.model_name
    last = re.split(r"[/#]", config.target.source.rstrip("/"))[-1].removeprefix("hf:")
    if parts := re.fullmatch(r"pypi:(.+?)-?(?:part)?-?\{.*", last):
        return parts[1]
    return re.sub(r"(\.(I?Q\d\w*|BF16|F16|F32))?\.gguf$", "", last, flags=re.IGNORECASE)


def resolved_memory(config: AuroraConfig) -> MemorySettings:
    """The memory's settings with a scope of domain or client, which prefixes have too: what auto is, server.host says.

    Scope off means a memory without capacity, and for prefixes auto.
    """
    memory, alone = config.memory, config.server.host == "127.0.0.1"
    if memory.scope == "off":
        memory = dataclasses.replace(memory, capacity_mb=0)
    if memory.scope in ("auto", "off"):
        memory = dataclasses.replace(memory, scope="domain" if alone else "client")
    return memory


def shows_page(config: AuroraConfig) -> bool:
    """Whether the server has the live page: server.page, and for auto what server.host says."""
    return config.server.host == "127.0.0.1" if config.server.page == "auto" else config.server.page == "on"


def copied_tokens(engine: EngineSettings, memory: MemorySettings) -> int:
    """Most tokens that a round copies for a sequence, by n-gram lookup or from the traffic memory; 0: nothing is."""
    remembers = memory.capacity_mb > 0 and memory.scope != "off"
    return _COPIED_TOKENS if engine.speculate and (engine.lookup or remembers) else 0


def max_proposal_length(config: AuroraConfig) -> int:
    """Most consecutive tokens that a round proposes for a sequence, from any source."""
    return max(config.engine.max_draft_tokens, copied_tokens(config.engine, config.memory))


def draft_folder(config: AuroraConfig) -> Path | None:
    """The folder that draft.checkpoint names: in the working directory, else a shipped one; None if it is null."""
    if config.draft.checkpoint is None:
        return None
    folder = Path(config.draft.checkpoint).expanduser()
    shipped = PROJECT_FOLDER / folder
    return shipped if not folder.is_dir() and shipped.is_dir() else folder


def versions_folder(config: AuroraConfig) -> Path:
    """The folder with this deployment's draft versions: checkpoint.dir/checkpoint.run."""
    return Path(config.checkpoint.dir).expanduser() / config.checkpoint.run


def logs_folder(config: AuroraConfig) -> Path:
    """The folder for the learner's metrics (CSV, and TensorBoard if it is installed): logs beside checkpoint.dir."""
    return Path(config.checkpoint.dir).expanduser().parent / "logs"


def _without_missing_draft(config: AuroraConfig, *, name: str, keeps_learner: bool) -> AuroraConfig:
    """The same settings, without the draft and the learner of the shipped deployment `name` if that draft is missing.

    Nothing else can be meant there, while a missing draft that somebody has named themselves is an error.
    keeps_learner: learn.enabled was given, so it stays.
    """
    folder = draft_folder(config)
    if folder is None or folder.is_dir() or config.learn.from_scratch:
        return config
    _log.warning(
        "draft.checkpoint=%s does not exist: n-gram lookup and the traffic memory propose tokens, but no draft does, "
        "and nothing is learned; `aurora-lit pretrain --config %s --prompts FILE --out %s` trains one, and with "
        "draft.checkpoint=null learn.from_scratch=true one learns from traffic",
        *(folder, name, config.draft.checkpoint),
    )
    learn = config.learn if keeps_learner else dataclasses.replace(config.learn, enabled=False)
    return dataclasses.replace(config, draft=dataclasses.replace(config.draft, checkpoint=None), learn=learn)


@functools.cache
def _schema() -> Any:
    """Every setting's type and default; OmegaConf.merge copies it."""
    return OmegaConf.structured(AuroraConfig)


def _config_file(given: Path) -> Path:
    """The file that `--config` names: in the working directory, else a shipped one, by its path or its name alone.

    Raises ConfigError for what can only be meant as a name, and is none.
    """
    folder = DEFAULT_CONFIG.parent
    candidates = (given, PROJECT_FOLDER / given, folder / f"{given}.yaml")
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and len(given.parts) == 1 and given.suffix not in (".yaml", ".yml") and not given.exists():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--config {given}: is neither a file nor one of the deployments {names}; name one of these")
    return found or given


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        repr(content)  # an integer may have too many digits to be told
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror or error}); name a YAML file") from error
    except OmegaConfBaseException as error:
        reason = f"{error.full_key or 'a value'}: {str(error).splitlines()[0].rstrip('.')}"
        raise ConfigError(f"--config {path}: {reason}; {_NO_INTERPOLATION}") from error
    except Exception as error:  # PyYAML raises what converting a text does, such as one with the tag !!int
        raise ConfigError(f"--config {path}: is not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {path}: holds a {type(content).__name__}; use sections such as `engine:`")
    return typing.cast(Mapping[str, Any], content)


def _read_override(text: str) -> Mapping[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not an override; write key=value, such as engine.max_batch_size=4")
    parts = key.split(".")
    # Text settings keep the characters as typed (the API key 0123 is not a number); other values are YAML.
    try:
        tree: Any = value if _is_text(_type_of(parts)) and value != "null" else yaml.safe_load(value)
        repr(tree)
    except Exception as error:  # as in a file
        raise ConfigError(f"{_assignment(key, value)}: the value is not valid YAML; quote it") from error
    for part in reversed(parts):
        tree = {part: tree}
    return typing.cast(Mapping[str, Any], tree)


def _escaped(text: str) -> str:
    r"""The text with `\${` for `${`, which would be an interpolation; backslashes before it are doubled."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _type_of(parts: Sequence[str]) -> Any:
    """The type of a setting, or of a section; None if there is no such setting."""
    kind: Any = AuroraConfig
    for part in parts:
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _is_text(kind: Any) -> bool:
    return kind is str or str in typing.get_args(kind) or typing.get_origin(kind) is Literal


def _checked(tree: Mapping[str, Any], kind: type, *, prefix: str) -> dict[str, Any]:
    """The same tree, if every key is known and has text where it is text; OmegaConf checks other types."""
    known = typing.get_type_hints(kind)
    checked: dict[str, Any] = {}
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            successor = _SUCCESSORS.get(full) or (f"{prefix}{close[0]}" if close else "")
            hint = f"did you mean {successor}?" if successor else f"use one of {', '.join(known)}"
            shown = full if isinstance(value, Mapping) else _assignment(full, value)
            raise ConfigError(f"{shown}: there is no such setting; {hint}")
        if isinstance(value, bool) and (word := "on" if value else "off") in typing.get_args(known[key]):
            value = word  # YAML 1.1 reads an unquoted on/off as true/false
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                first = next(iter(typing.get_type_hints(known[key])))
                more = ", or leave it out" if value is None else ""
                raise ConfigError(f"{full}={value} is a section; set one of its keys, such as {full}.{first}{more}")
            value = _checked(value, typing.cast(type, known[key]), prefix=f"{full}.")
        elif _is_text(known[key]) and not isinstance(value, str) and value is not None:
            raise ConfigError(
                f"{_assignment(full, value)} must be text, not {type(value).__name__}; {_remedy(known[key], value)}"
            )
        elif isinstance(value, list):  # which OmegaConf does not merge with a mapping
            raise ConfigError(f"{_assignment(full, value)} cannot be used; {_remedy(known[key], value)}")
        checked[str(key)] = value
    return checked


def _check_given(merged: Any) -> None:
    """Raise ConfigError if a setting is still to be given, OmegaConf's `???`, which would become the default."""
    unresolved: Any = OmegaConf.to_container(merged)
    for section, settings in unresolved.items():
        for key, value in settings.items():
            if value == "???":
                raise ConfigError(f"{section}.{key}=??? has no value yet; give one, or leave it out")


def _check_digest(
    config: AuroraConfig, files: Sequence[Mapping[str, Any]], overrides: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ConfigError if a file, or the overrides together, name another source and leave it the former's SHA-256.

    Otherwise the whole model would be downloaded first, and then refused.
    """
    together = {key: value for each in overrides for key, value in each.get("target", {}).items()}
    source = of_sha256 = AuroraConfig().target.source
    for target in (*(file.get("target", {}) for file in files), together):
        source = target.get("source", source)
        if "sha256" in target:
            of_sha256 = source
    found = config.target  # where interpolations are resolved
    if found.sha256 is not None and of_sha256 not in (source, found.source) and found.source.startswith("pypi:"):
        raise ConfigError(
            f"target.source={found.source} is not the source that target.sha256={found.sha256} belongs to; set "
            "target.sha256 to match or to null"
        )


def _assignment(key: str, value: object) -> str:
    """A setting and its value for an error message, without the value if it may be the API key, misspelt as it is."""
    return key if "key" in key.lower() else f"{key}={value}"


def _remedy(kind: Any, value: object) -> str:
    """What a setting of this type accepts, which this value is not."""
    if typing.get_origin(kind) is Literal:
        return f"use one of {', '.join(typing.get_args(kind))}"
    words = {int: "use a whole number", float: "use a number", bool: "use true or false"}
    if kind in words:
        return words[kind]
    if value is None:
        return "give a value, or leave it out"
    return "give one value" if isinstance(value, list | dict) else "put it in quotes"


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's error on one line, with a remedy."""
    if isinstance(error, InterpolationKeyError):
        remedy = f"name a setting that exists, use ${{oc.env:NAME}} for an environment variable, or {_NO_INTERPOLATION}"
    elif isinstance(error, GrammarParseError | UnsupportedInterpolationType):
        remedy = _NO_INTERPOLATION
    elif "resolving" in str(error.msg):
        remedy = "set that variable or the value itself"
    else:
        kind = _type_of(str(error.full_key or "").split("."))
        remedy = _remedy(kind, None)  # all that is wrong with a text here is that it has no value
    first_line = str(error.msg or error).splitlines()[0].rstrip(".")
    return f"{error.full_key or 'configuration'}: {first_line}; {remedy}"
