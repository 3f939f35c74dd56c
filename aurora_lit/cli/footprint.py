"""What memory a deployment needs, from the measures of its model alone: nothing is loaded, nothing fetched.

Left out: what the machine has, and whether that is enough (checks.py).

    shape = model_shape(config, folder=None)             # the file that target.config_file names
    for need in needs(config, shape, devices=4): ...     # a line of the table each
    fewest_devices(config, shape, card_gb=80)            # (4, 1): four and one for the learner

Shapes in the formulas: P parameters, L layers, H hidden, V vocabulary, S slots, C positions of a slot, N devices.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from aurora_lit.config import PROJECT_FOLDER, AuroraConfig, draft_folder
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE
from aurora_lit.errors import ConfigError
from aurora_lit.models.target import aux_layer_ids, decoder_layers
from aurora_lit.models.kv_cache import padded_positions
from aurora_lit.modules.draft.eagle3 import Draft, DraftConfig
from aurora_lit.serve.worker.build import drafts

CARDS_GB = (24, 40, 80, 141)
"""Memory of common GPUs, in 10^9 bytes."""
_USABLE = 0.95
"""Of a card: the rest is lost between allocations."""
_CONTEXT_BYTES = 1 << 30
"""What a process with its GPU context takes of a device before anything is loaded; about."""
_WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "auto": 2.0, "int8": 34 / 32, "int4": 20 / 32}
"""Of a weight by `target.precision`, scales and minima included; at most, for auto; of int4 without the head's own."""
_MOST_DEVICES = 64
_MIB = 1 << 20

Place = Literal["every device", "first device", "learner's device", "host"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """One line of the table."""

    what: str
    where: Place
    """On every device alike, on the first one beside that, on the learner's (the first one too with learn.enabled), or
    in the machine's own memory."""
    num_bytes: int
    how: str
    """The formula, in words."""


def model_shape(config: AuroraConfig, *, folder: Path | None) -> PretrainedConfig | None:
    """The model's configuration: its own where it is there (`folder`), else target.config_file's; None without either.

    Raises ConfigError when target.config_file names no readable configuration.
    """
    if folder is not None:
        own: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return own
    if config.target.config_file is None:
        return None
    path = Path(config.target.config_file).expanduser()
    path = path if path.is_absolute() or path.is_file() else PROJECT_FOLDER / path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        shape: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"target.config_file={config.target.config_file} cannot be read ({error!r}); name a model's config.json"
        ) from error
    return shape


def needs(config: AuroraConfig, shape: PretrainedConfig, *, devices: int) -> list[Need]:
    """All lines, with the target shared by `devices` as engine.strategy says.

    Raises CheckpointError where draft.checkpoint is no draft.
    """
    text, engine = shape.get_text_config(), config.engine
    element_bytes = 4 if config.target.precision == "fp32" else 2  # of whatever is no weight of the target
    by_heads = engine.strategy == "tensor_parallel" and devices > 1
    whole_layers = engine.strategy == "fsdp" and devices > 1
    weight_bytes = _WEIGHT_BYTES[config.target.precision]
    parameters, largest_layer = _parameters(shape.to_json_string())
    slots, capacity = engine.max_batch_size, engine.max_seq_len + engine.max_draft_tokens + 1
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kv_heads = math.ceil(kv_heads / devices) if by_heads else kv_heads
    kept_positions = slots * padded_positions(capacity)
    H, L, D = text.hidden_size, text.num_hidden_layers, _head_dim(text)

    lines = [
        Need(
            what="weights",
            where="every device",
            num_bytes=int(math.ceil(parameters / devices) * weight_bytes),
            how=f"{parameters:,} parameters / {devices} x {weight_bytes:g} bytes",
        ),
        Need(
            what="keys and values",
            where="every device",
            num_bytes=2 * L * kv_heads * D * kept_positions * element_bytes,
            how=f"2 x {L} layers x {kv_heads} heads x {D} x {kept_positions:,} positions x {element_bytes} bytes",
        ),
        Need(
            what="one pass (about)",
            where="every device",
            num_bytes=_pass_bytes(config, text, devices=devices),
            how="logits, MLP and attention of the widest round, fp32",
        ),
        Need(what="process", where="every device", num_bytes=_CONTEXT_BYTES, how="about"),
    ]
    if whole_layers:
        gathered = Need(
            what="layers gathered",
            where="every device",
            num_bytes=2 * largest_layer * element_bytes,
            how=f"2 x {largest_layer:,} parameters x {element_bytes} bytes: one runs, one comes",
        )
        lines.insert(1, gathered)
    if drafts(config):
        lines += _draft_needs(config, text, element_bytes=element_bytes)
        lines.append(
            Need(
                what="traces, kept states",
                where="first device",
                num_bytes=slots * (capacity + 1) * H * 2,
                how=f"{slots} x {capacity + 1:,} positions x {H} x 2 bytes",
            )
        )
        lines.append(
            Need(
                what="traces, ring",
                where="host",
                num_bytes=config.trace.capacity_mb * _MIB,
                how="trace.capacity_mb, in shared memory",
            )
        )
        lines += _learner_needs(config, text, element_bytes=element_bytes)
        lines.append(
            Need(
                what="learner, its start",
                where="host",
                num_bytes=4 * parameters,
                how="the target, read once for its two ends, fp32",
            )
        )
        lines.append(
            Need(
                what="learner, memory of traffic",
                where="host",
                num_bytes=config.learn.reservoir_mb * _MIB * 9 // 8,
                how="learn.reservoir_mb, and an eighth of it for what is new",
            )
        )
    return lines


def total(lines: list[Need], *places: Place) -> int:
    """Bytes of some places together."""
    return sum(need.num_bytes for need in lines if need.where in places)


def fewest_devices(config: AuroraConfig, shape: PretrainedConfig, *, card_gb: int) -> tuple[int, int] | None:
    """The smallest set of cards: for the target (doubling from 1), and for a learner; None where none will do.

    The server's own learner (learn.enabled) shares the first card; one that is attached by hand gets learn.devices.
    Without a strategy there is one card; tensor_parallel takes at most one a key-value head.
    """
    text = shape.get_text_config()
    most = {
        "single": 1,
        "tensor_parallel": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "fsdp": _MOST_DEVICES,
    }[config.engine.strategy]
    room = _USABLE * card_gb * 10**9
    for devices in (2**i for i in range(most.bit_length())):
        lines = needs(config, shape, devices=devices)
        serving, learning = total(lines, "every device", "first device"), total(lines, "learner's device")
        apart = not config.learn.enabled and learning > 0
        if max(serving, learning + _CONTEXT_BYTES) <= room if apart else serving + learning <= room:
            return devices, config.learn.devices if apart else 0
    return None


def draft_shape(config: AuroraConfig, text: PretrainedConfig) -> DraftConfig:
    """The draft checkpoint's shape, or that of a draft begun from scratch (drafts/initial.py)."""
    folder = draft_folder(config)
    if folder is not None:
        return read_config(folder)
    return DraftConfig(
        hidden_size=text.hidden_size,
        target_hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_attention_heads,
        head_dim=_head_dim(text),
        vocab_size=text.vocab_size,
        draft_vocab_size=min(DRAFT_VOCABULARY_SIZE, text.vocab_size),
        aux_layer_ids=aux_layer_ids(text.num_hidden_layers),
        max_position_embeddings=config.engine.max_seq_len,
    )


def _draft_needs(config: AuroraConfig, text: PretrainedConfig, *, element_bytes: int) -> list[Need]:
    draft = draft_shape(config, text)
    parameters, _ = _draft_parameters(draft)
    slots, capacity = config.engine.max_batch_size, config.engine.max_seq_len + config.engine.max_draft_tokens + 1
    features, kept_positions = 3 * text.hidden_size, slots * padded_positions(capacity)
    kv_elements = 2 * draft.num_key_value_heads * draft.head_dim
    return [
        Need(
            what="draft",
            where="first device",
            num_bytes=2 * parameters * element_bytes,
            how=f"{parameters:,} parameters x {element_bytes} bytes, twice: one serves, one is swapped in",
        ),
        Need(
            what="draft, keys and values",
            where="first device",
            num_bytes=kv_elements * kept_positions * element_bytes,
            how=f"{kv_elements} x {kept_positions:,} positions x {element_bytes} bytes",
        ),
        Need(
            what="draft, features",
            where="first device",
            num_bytes=slots * capacity * features * element_bytes,
            how=f"{slots} x {capacity:,} positions x {features} x {element_bytes} bytes; traces are cut from them",
        ),
    ]


def _learner_needs(config: AuroraConfig, text: PretrainedConfig, *, element_bytes: int) -> list[Need]:
    draft, learn = draft_shape(config, text), config.learn
    parameters, matrices = _draft_parameters(draft)
    H, V = text.hidden_size, text.vocab_size
    state = 16 * parameters + 4 * matrices + 8 * (parameters - matrices)
    rows = 2 * draft.draft_vocab_size * H * element_bytes
    step = learn.batch_positions * (3 * H + learn.unroll_steps * (8 * H + 3 * draft.intermediate_size)) * 2
    return [
        Need(
            what="learner, the target's ends",
            where="learner's device",
            num_bytes=V * H * (4 + element_bytes) + rows,
            how=f"embedding fp32 and head, {V:,} x {H}; twice the head's {draft.draft_vocab_size:,} rows",
        ),
        Need(
            what="learner, draft",
            where="learner's device",
            num_bytes=state,
            how=f"{parameters:,} x (weights, gradient, average, champion 4 bytes each); "
            f"Muon 4 bytes for {matrices:,}, AdamW 8 for the rest",
        ),
        Need(
            what="learner, a step (about)",
            where="learner's device",
            num_bytes=step,
            how=f"{learn.batch_positions:,} positions x {learn.unroll_steps} steps, bf16",
        ),
    ]


def _pass_bytes(config: AuroraConfig, text: PretrainedConfig, *, devices: int) -> int:
    """Activations at their widest, where no native kernel runs: an estimate."""
    engine = config.engine
    checked = engine.max_batch_size * (engine.max_draft_tokens + 1)
    rows = checked + engine.prefill_chunk_tokens
    length = engine.max_seq_len + engine.max_draft_tokens + 1
    heads = text.num_attention_heads if engine.strategy == "fsdp" else math.ceil(text.num_attention_heads / devices)
    logits = 2 * checked * text.vocab_size
    mlp = rows * (4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size))
    attention = 2 * heads * length * max(engine.prefill_chunk_tokens, checked)
    num_bytes: int = 4 * (logits + mlp + attention)
    return num_bytes


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@functools.lru_cache(maxsize=4)
def _parameters(shape_json: str) -> tuple[int, int]:
    """Parameters of the whole model and of its largest layer, counted on a model without memory."""
    fields = json.loads(shape_json)
    shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    layers = decoder_layers(model, shape.get_text_config().num_hidden_layers)
    largest: int = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    whole: int = sum(parameter.numel() for parameter in model.parameters())
    return whole, largest


def _draft_parameters(config: DraftConfig) -> tuple[int, int]:
    """Parameters of a draft, and those of its matrices that Muon moves (modules/losses/draft_module.py)."""
    with torch.device("meta"):
        draft = Draft(replace(config, max_position_embeddings=1))
    heads = (draft.lm_head.weight, draft.value_head.weight)
    matrices = [p for p in draft.parameters() if p.ndim > 1 and not any(p is head for head in heads)]
    return sum(p.numel() for p in draft.parameters()), sum(p.numel() for p in matrices)
