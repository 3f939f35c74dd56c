"""The sizes of a target and its draft, from their configurations; no weights are loaded or downloaded.

    shape = model_shape(config, folder=None)             # from the file that target.config_file names
    model_sizes(shape).parameters

Leaves out how much memory they need (cli/footprint.py).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from aurora_lit.config import PROJECT_FOLDER, AuroraConfig, draft_folder
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE
from aurora_lit.errors import ConfigError, SourceError
from aurora_lit.models.kv_cache import head_dim_of
from aurora_lit.models.source import OWN_CODE, needs_own_code
from aurora_lit.models.torch_target import aux_layer_ids, decoder_layers
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft


class ModelSizes(NamedTuple):
    """Numbers of parameters."""

    parameters: int
    """Of the whole model."""
    largest_layer: int
    experts: int
    """Of all experts, of which a token uses some; 0: it has none."""


def model_shape(config: AuroraConfig, *, folder: Path | None) -> PretrainedConfig | None:
    """The model's configuration, from its `folder`, else from target.config_file; None if there is neither.

    Raises SourceError or ConfigError if it is not that of a causal language model.
    """
    if folder is not None:
        try:
            own: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            _check_sizes(own)
        except Exception as error:  # transformers' checks of a file's fields raise exceptions of their own kinds
            if needs_own_code(error):
                raise SourceError(f"target.source={config.target.source!r}: {OWN_CODE}") from error
            raise SourceError(
                f"target.source={config.target.source!r}: {folder / 'config.json'} is not that of a causal language "
                f"model ({_first_line(error)}); name a folder into which save_pretrained has written one"
            ) from error
        return own
    if config.target.config_file is None:
        return None
    path = Path(config.target.config_file).expanduser()
    path = path if path.is_absolute() or path.is_file() else PROJECT_FOLDER / path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        shape: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
        _check_sizes(shape)
    except Exception as error:
        raise ConfigError(
            f"target.config_file={config.target.config_file} cannot be read ({_first_line(error)}); name a model's "
            "config.json"
        ) from error
    return shape


def _check_sizes(shape: PretrainedConfig) -> None:
    """Raise an exception, of any kind, if this is not the configuration of a causal language model."""
    text = shape.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        getattr(text, name)
    model_sizes(shape)


def _first_line(error: Exception) -> str:
    """Kind and text of an exception, without the lists of models that transformers adds."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class _TargetShape:
    """The sizes of a target that a draft must match."""

    vocab_size: int
    hidden_size: int
    aux_layer_ids: tuple[int, int, int]


def target_shape(shape: PretrainedConfig) -> _TargetShape:
    """The sizes that `Target` has with this configuration."""
    text = shape.get_text_config()
    return _TargetShape(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        aux_layer_ids=aux_layer_ids(text.num_hidden_layers),
    )


def model_sizes(shape: PretrainedConfig) -> ModelSizes:
    """The numbers of parameters, counted on the meta device."""
    return _sizes(shape.to_json_string())


@functools.lru_cache(maxsize=4)
def _sizes(shape_json: str) -> ModelSizes:
    fields = json.loads(shape_json)
    shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    layers = decoder_layers(model, shape.get_text_config().num_hidden_layers)
    largest: int = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    whole: int = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    return ModelSizes(parameters=whole, largest_layer=largest, experts=experts)


def draft_shape(config: AuroraConfig, text: PretrainedConfig) -> Eagle3Config:
    """The configuration of draft.checkpoint, or of an untrained draft (drafts/initial.py)."""
    folder = draft_folder(config)
    if folder is not None:
        return read_config(folder)
    return Eagle3Config(
        hidden_size=text.hidden_size,
        target_hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_attention_heads,
        head_dim=head_dim_of(text),
        vocab_size=text.vocab_size,
        draft_vocab_size=min(DRAFT_VOCABULARY_SIZE, text.vocab_size),
        aux_layer_ids=aux_layer_ids(text.num_hidden_layers),
        max_position_embeddings=config.engine.max_seq_len,
    )


def draft_parameters(config: Eagle3Config) -> tuple[int, int]:
    """Number of parameters of a draft, and of those that Muon optimises (modules/losses/draft_module.py)."""
    with torch.device("meta"):
        draft = Eagle3Draft(replace(config, max_position_embeddings=1))
    heads = (draft.lm_head.weight, draft.value_head.weight)
    matrices = [p for p in draft.parameters() if p.ndim > 1 and not any(p is head for head in heads)]
    return sum(p.numel() for p in draft.parameters()), sum(p.numel() for p in matrices)
