"""How much memory a deployment needs, computed from its model's configuration; no weights are loaded.

    shape = model_shape(config, folder)
    for need in needs(config, shape, gguf_bytes=gguf_bytes(folder)): ...     # one line of the table each

Leaves out how much memory the machine has, and whether that is enough (cli/checks.py).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from aurora_lit.config import AuroraConfig, draft_folder, resolved_memory
from aurora_lit.drafts.checkpoint import read_config
from aurora_lit.drafts.initial import DRAFT_VOCABULARY_SIZE
from aurora_lit.errors import SourceError
from aurora_lit.learn.online.build import BATCH_POSITIONS, unroll_steps
from aurora_lit.models.gguf import gguf_in
from aurora_lit.models.kv_cache import TAKEN_POSITIONS, cache_bytes, head_dim_of, kv_heads_of, padded_positions
from aurora_lit.models.loading import model_dtype
from aurora_lit.models.source import OWN_CODE, needs_own_code
from aurora_lit.models.torch_target import aux_layer_ids, decoder_layers
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft
from aurora_lit.serve.engine.prefill import PREFILL_CHUNK_TOKENS
from aurora_lit.serve.engine.slot_allocator import slot_capacity
from aurora_lit.serve.worker.load_models import uses_draft

_PROCESS_BYTES = 1 << 30
"""About what a process takes on its device before anything is loaded, such as the GPU context."""
_BYTES_PER_WEIGHT = {"int8": 34 / 32, "int4": 20 / 32}
"""Of target.precision, scales and minima included; int4: without the head's eight bits."""
_BYTES_PER_GGUF_BYTE = 1.15
"""About what a byte of a GGUF takes with target.precision=auto: codes as they are, scales and minima in fp16."""
_MIB = 1 << 20

Place = Literal["every device", "first device", "learner's device", "host"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """One line of the table."""

    what: str
    where: Place
    """every device: on each device that holds a part of the target. first device: on the first of these in addition.
    learner's device: on that of each of the learn.devices processes; with learn.enabled the first of them is the first
    device too. host: in main memory."""
    num_bytes: int
    how: str
    """The formula, in words."""
    for_learner: bool = False
    """True if only a learner on this machine needs it."""


def needs(config: AuroraConfig, shape: PretrainedConfig, *, gguf_bytes: int | None = None) -> list[Need]:
    """All lines of the table, with the target split over engine.devices by engine.strategy.

    gguf_bytes: see the function of that name. Raises CheckpointError if draft.checkpoint is not a valid draft.
    """
    lines = _target_needs(config, shape, gguf_bytes)
    if prefix_bytes := config.engine.prefix_cache_mb * _MIB:
        how = "engine.prefix_cache_mb, on CPUs as they leave their slots"
        lines.append(Need(what="kept prefixes", where="every device", num_bytes=prefix_bytes, how=how))
    memory_bytes = resolved_memory(config).capacity_mb * _MIB
    if config.engine.speculate and memory_bytes:
        lines.append(
            Need(what="traffic memory", where="host", num_bytes=memory_bytes, how="memory.capacity_mb, as it fills")
        )
    if uses_draft(config):
        draft = draft_shape(config, shape.get_text_config())
        lines += _draft_needs(config, draft) + _learner_needs(config, shape, draft)
    return lines


def total(lines: Sequence[Need], *places: Place) -> int:
    """Bytes in these places together."""
    return sum(need.num_bytes for need in lines if need.where in places)


def host_total(config: AuroraConfig, lines: Sequence[Need], *, gpus: int = 0) -> int:
    """Bytes of main memory, with a learner if learn.enabled.

    gpus: of this machine, if the target computes on them; what they hold takes no main memory. The learner's processes
    are on the CPU unless each has one.
    """
    on_gpus, learners = gpus > 0, config.learn.devices if config.learn.enabled else 0
    others = 0 if on_gpus else (config.engine.devices - 1) * total(lines, "every device")
    if learners > gpus:
        others += (learners if on_gpus else learners - 1) * total(lines, "learner's device")
    counted = [need for need in lines if config.learn.enabled or not need.for_learner]
    return others + sum(need.num_bytes for need in counted if need.where == "host" or not on_gpus)


# -- the model's sizes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """The sizes of a target that a draft must match."""

    vocab_size: int
    hidden_size: int
    aux_layer_ids: tuple[int, int, int]

    @classmethod
    def of(cls, shape: PretrainedConfig) -> TargetShape:
        """The sizes that `Target` has with this configuration."""
        text = shape.get_text_config()
        layers = aux_layer_ids(text.num_hidden_layers)
        return cls(vocab_size=text.vocab_size, hidden_size=text.hidden_size, aux_layer_ids=layers)


def model_shape(config: AuroraConfig, folder: Path) -> PretrainedConfig:
    """The configuration of the model in `folder`. Raises SourceError if it is not that of a causal language model."""
    try:
        shape: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = shape.get_text_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            getattr(text, name)
        _parameters(shape)
    except Exception as error:  # transformers' checks of a file's fields raise exceptions of their own kinds
        if needs_own_code(error):
            raise SourceError(f"target.source={config.target.source!r}: {OWN_CODE}") from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]  # without transformers' lists of models
        raise SourceError(
            f"target.source={config.target.source!r}: {folder / 'config.json'} is not that of a causal language "
            f"model ({reason}); name a folder into which save_pretrained has written one"
        ) from error
    return shape


def gguf_bytes(folder: Path) -> int | None:
    """Size of the GGUF file that has the weights of the model in `folder`; None if they are in safetensors."""
    path = gguf_in(folder)
    return None if path is None else path.stat().st_size


def _parameters(shape: PretrainedConfig) -> tuple[int, int]:
    """Numbers of parameters of the whole model and of its largest layer, counted on the meta device."""
    return _counted(shape.to_json_string())


@functools.lru_cache(maxsize=4)
def _counted(shape_json: str) -> tuple[int, int]:
    fields = json.loads(shape_json)
    shape = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    layers = decoder_layers(model, shape.get_text_config().num_hidden_layers)
    largest: int = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    whole: int = sum(parameter.numel() for parameter in model.parameters())
    return whole, largest


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


def _draft_parameters(config: Eagle3Config) -> tuple[int, int]:
    """Number of parameters of a draft, and of those that Muon optimises (modules/losses/draft_module.py)."""
    with torch.device("meta"):
        draft = Eagle3Draft(replace(config, max_position_embeddings=1))
    heads = (draft.lm_head.weight, draft.value_head.weight)
    matrices = [p for p in draft.parameters() if p.ndim > 1 and not any(p is head for head in heads)]
    return sum(p.numel() for p in draft.parameters()), sum(p.numel() for p in matrices)


# -- the lines ---------------------------------------------------------------------------------------------------------


def _target_needs(config: AuroraConfig, shape: PretrainedConfig, gguf_bytes: int | None) -> list[Need]:
    """Weights, keys and values, and a pass of the target."""
    text, engine, devices = shape.get_text_config(), config.engine, config.engine.devices
    element_bytes = model_dtype(config.target.precision).itemsize  # of everything but quantised weights
    weight_bytes = _BYTES_PER_WEIGHT.get(config.target.precision, element_bytes)  # auto: the most it can be
    parameters, largest_layer = _parameters(shape)
    by_heads = engine.strategy == "tensor_parallel" and devices > 1
    kv_heads = math.ceil(kv_heads_of(text) / devices) if by_heads else kv_heads_of(text)
    slots, capacity = engine.max_batch_size, _slot_capacity(config)
    sizes = {"num_layers": text.num_hidden_layers, "num_kv_heads": kv_heads, "head_dim": head_dim_of(text)}
    kv_bytes = cache_bytes(num_slots=slots, capacity=capacity, element_bytes=element_bytes, **sizes)
    num_bytes = int(math.ceil(parameters / devices) * weight_bytes)
    how = f"{parameters:,} parameters / {devices} x {weight_bytes:g} bytes"
    if gguf_bytes is not None and config.target.precision == "auto" and devices == 1:
        num_bytes = int(_BYTES_PER_GGUF_BYTE * gguf_bytes)
        how = f"{gguf_bytes:,} bytes of GGUF x {_BYTES_PER_GGUF_BYTE}"
    fills = ", as it fills" if capacity > TAKEN_POSITIONS else ""
    lines = [
        Need(what="weights", where="every device", num_bytes=num_bytes, how=how),
        Need(
            what="keys and values",
            where="every device",
            num_bytes=kv_bytes,
            how=f"2 x {text.num_hidden_layers} layers x {kv_heads} heads x {head_dim_of(text)} x "
            f"{slots * padded_positions(capacity):,} positions x {element_bytes} bytes{fills}",
        ),
        Need(
            what="one forward pass (about)",
            where="every device",
            num_bytes=_pass_bytes(config, text),
            how="logits, MLP and attention of the largest round, fp32",
        ),
        Need(what="process", where="every device", num_bytes=_PROCESS_BYTES, how="about"),
    ]
    if engine.strategy == "single" and gguf_bytes is None:  # of a GGUF, one tensor at a time
        loading = Need(
            what="weights, while loading", where="host", num_bytes=4 * parameters, how="read as fp32, the first time"
        )
        lines.append(loading)
    if engine.strategy == "fsdp" and devices > 1:
        gathered = Need(
            what="gathered layers",
            where="every device",
            num_bytes=2 * largest_layer * element_bytes,
            how=f"2 x {largest_layer:,} parameters x {element_bytes} bytes: one runs while the next is gathered",
        )
        lines.insert(1, gathered)
    return lines


def _draft_needs(config: AuroraConfig, draft: Eagle3Config) -> list[Need]:
    """What drafting takes beside the target."""
    element_bytes = model_dtype(config.target.precision).itemsize
    parameters, _ = _draft_parameters(draft)
    slots, capacity = config.engine.max_batch_size, _slot_capacity(config)
    H = draft.target_hidden_size
    features, kept_positions = 3 * H, slots * padded_positions(capacity)
    kv_elements = 2 * draft.num_key_value_heads * draft.head_dim
    return [
        Need(
            what="draft",
            where="first device",
            num_bytes=2 * parameters * element_bytes,
            how=f"{parameters:,} parameters x {element_bytes} bytes, twice: the current draft and the next one",
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
            how=f"{slots} x {capacity:,} positions x {features} x {element_bytes} bytes, on CPUs as they are written; "
            "traces use them too",
        ),
        Need(
            what="traces, kept states",
            where="first device",
            num_bytes=slots * (capacity + 1) * H * 2,
            how=f"{slots} x {capacity + 1:,} positions x {H} x 2 bytes",
        ),
    ]


def _learner_needs(config: AuroraConfig, shape: PretrainedConfig, draft: Eagle3Config) -> list[Need]:
    """What a learner takes, and the ring through which it gets traces."""
    text, learn = shape.get_text_config(), config.learn
    element_bytes = 4 if config.target.precision == "fp32" else 2
    parameters, matrices = _draft_parameters(draft)
    H, V = text.hidden_size, text.vocab_size
    copies = ["weights", "gradient", *(["average"] if learn.ema_decay else []), "champion"]
    state = 4 * len(copies) * parameters + 4 * matrices + 8 * (parameters - matrices)
    rows = 2 * draft.draft_vocab_size * H * element_bytes
    step = BATCH_POSITIONS * (3 * H + unroll_steps(config) * (8 * H + 3 * draft.intermediate_size)) * 2
    reading = max(1, learn.devices - 1)  # the first process reads before it starts the others
    by_each = f" by each of {reading} processes" if reading > 1 else ""
    on_device: dict[str, tuple[int, str]] = {
        "learner, the target's embedding and head": (
            V * H * (4 + element_bytes) + rows,
            f"embedding fp32 and head, {V:,} x {H}; the head's {draft.draft_vocab_size:,} draft rows, twice",
        ),
        "learner, draft": (
            state,
            f"{parameters:,} x ({', '.join(copies)} 4 bytes each); Muon 4 bytes for {matrices:,}, AdamW 8 for the rest",
        ),
        "learner, one step (about)": (step, f"{BATCH_POSITIONS:,} positions x {unroll_steps(config)} steps, bf16"),
    }
    on_host: dict[str, tuple[int, str]] = {
        "traces, ring": (
            config.trace.capacity_mb * _MIB,
            "trace.capacity_mb, in shared memory, from when a learner is attached",
        ),
        "learner, while starting": (
            4 * _parameters(shape)[0] * reading,
            f"the target, read once{by_each} for its embedding and head, fp32",
        ),
        "learner, reservoir": (
            learn.reservoir_mb * _MIB * 11 // 8,
            "learn.reservoir_mb, and three eighths of it for new traces and those that drafts are compared on",
        ),
    }
    places: dict[Place, dict[str, tuple[int, str]]] = {"learner's device": on_device, "host": on_host}
    return [
        Need(what=what, where=where, num_bytes=num_bytes, how=how, for_learner=True)
        for where, lines in places.items()
        for what, (num_bytes, how) in lines.items()
    ]


def _slot_capacity(config: AuroraConfig) -> int:
    """Positions of a slot of the KV cache."""
    return slot_capacity(config.engine, config.memory)


def _pass_bytes(config: AuroraConfig, text: PretrainedConfig) -> int:
    """Estimate of the largest activations without native kernels, where rounds propose chains only."""
    engine = config.engine
    verified = engine.max_batch_size * (engine.max_draft_tokens + 1)
    positions = verified + PREFILL_CHUNK_TOKENS
    devices = 1 if engine.strategy == "fsdp" else engine.devices
    heads = math.ceil(text.num_attention_heads / devices)
    logits = 2 * verified * text.vocab_size
    mlp = positions * (4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size))
    attention = 2 * heads * _slot_capacity(config) * max(PREFILL_CHUNK_TOKENS, verified)
    num_bytes: int = 4 * (logits + mlp + attention)
    return num_bytes
