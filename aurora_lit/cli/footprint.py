"""How much memory a deployment needs, computed from its model's sizes; no weights are loaded or downloaded.

    shape = model_shape(config, folder=None)             # cli/model_sizes.py
    for need in needs(config, shape, devices=4): ...     # one line of the table each
    fewest_devices(config, shape, card_gb=80)            # (4, 1): four, and one for the learner

Leaves out the sizes (cli/model_sizes.py), how much memory the machine has, and whether that is enough (cli/checks.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from aurora_lit.cli.model_sizes import draft_parameters, draft_shape, model_sizes
from aurora_lit.config import AuroraConfig, resolved_memory_scope
from aurora_lit.models.kv_cache import cache_bytes, head_dim_of, kv_heads_of, padded_positions
from aurora_lit.models.loading import model_dtype
from aurora_lit.serve.engine.slot_allocator import slot_capacity
from aurora_lit.serve.worker.load_models import uses_draft

CARDS_GB = (24, 40, 80, 141)
"""Memory of common GPUs, in 10^9 bytes."""
_USABLE = 0.95
"""Usable share of a GPU's memory; the rest is lost to fragmentation."""
_PROCESS_BYTES = 1 << 30
"""About what a process takes on its device before anything is loaded, such as the GPU context."""
_BYTES_PER_WEIGHT = {"int8": 34 / 32, "int4": 20 / 32}
"""Of target.precision, scales and minima included; int4: without the head's eight bits."""
_MOST_DEVICES = 64
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


def needs(config: AuroraConfig, shape: PretrainedConfig, *, devices: int) -> list[Need]:
    """All lines of the table, with the target split over `devices` by engine.strategy.

    Raises CheckpointError if draft.checkpoint is not a valid draft.
    """
    text, engine = shape.get_text_config(), config.engine
    element_bytes = model_dtype(config.target.precision).itemsize  # of everything but quantised weights
    by_heads = engine.strategy == "tensor_parallel" and devices > 1
    whole_layers = engine.strategy == "fsdp" and devices > 1
    weight_bytes = _BYTES_PER_WEIGHT.get(config.target.precision, element_bytes)  # auto: the most it can be
    parameters, largest_layer, _ = model_sizes(shape)
    slots, capacity = engine.max_batch_size, _slot_capacity(config)
    kv_heads = math.ceil(kv_heads_of(text) / devices) if by_heads else kv_heads_of(text)
    kept_positions = slots * padded_positions(capacity)
    H, L, D = text.hidden_size, text.num_hidden_layers, head_dim_of(text)
    sizes = {"num_slots": slots, "capacity": capacity, "element_bytes": element_bytes}

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
            num_bytes=cache_bytes(num_layers=L, num_kv_heads=kv_heads, head_dim=D, **sizes),
            how=f"2 x {L} layers x {kv_heads} heads x {D} x {kept_positions:,} positions x {element_bytes} bytes",
        ),
        Need(
            what="one forward pass (about)",
            where="every device",
            num_bytes=_pass_bytes(config, text, devices=devices),
            how="logits, MLP and attention of the largest round, fp32",
        ),
        Need(what="process", where="every device", num_bytes=_PROCESS_BYTES, how="about"),
    ]
    if engine.strategy == "single":
        loading = Need(
            what="weights, while loading", where="host", num_bytes=4 * parameters, how="read as fp32, the first time"
        )
        lines.append(loading)
    if whole_layers:
        gathered = Need(
            what="gathered layers",
            where="every device",
            num_bytes=2 * largest_layer * element_bytes,
            how=f"2 x {largest_layer:,} parameters x {element_bytes} bytes: one runs while the next is gathered",
        )
        lines.insert(1, gathered)
    if engine.speculate and resolved_memory_scope(config) != "off":
        lines.append(
            Need(
                what="traffic memory",
                where="host",
                num_bytes=config.memory.capacity_mb * _MIB,
                how="memory.capacity_mb, as it fills",
            )
        )
    if uses_draft(config):
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
                how="trace.capacity_mb, in shared memory, from when a learner is attached",
                for_learner=True,
            )
        )
        lines += learner_needs(config, text)
        reading = max(1, config.learn.devices - 1)  # the first process reads before it starts the others
        by_each = f" by each of {reading} processes" if reading > 1 else ""
        lines.append(
            Need(
                what="learner, while starting",
                where="host",
                num_bytes=4 * parameters * reading,
                how=f"the target, read once{by_each} for its embedding and head, fp32",
                for_learner=True,
            )
        )
        lines.append(
            Need(
                what="learner, reservoir",
                where="host",
                num_bytes=config.learn.reservoir_mb * _MIB * 11 // 8,
                how="learn.reservoir_mb, and three eighths of it for new traces and those that drafts are compared on",
                for_learner=True,
            )
        )
    return lines


def total(lines: list[Need], *places: Place) -> int:
    """Bytes in these places together."""
    return sum(need.num_bytes for need in lines if need.where in places)


def host_total(config: AuroraConfig, lines: list[Need], *, gpus: int = 0) -> int:
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


def fewest_devices(config: AuroraConfig, shape: PretrainedConfig, *, card_gb: int) -> tuple[int, int] | None:
    """The smallest number of GPUs for the target (a power of 2), and for a learner of its own; None if none suffices.

    The server's own learner (learn.enabled) shares the target's GPUs, and has others only if learn.devices is more;
    one that is attached separately gets learn.devices. Strategy single has one GPU; tensor_parallel has at most one for
    each key-value head.
    """
    text = shape.get_text_config()
    most = {
        "single": 1,
        "tensor_parallel": kv_heads_of(text),
        "fsdp": _MOST_DEVICES,
    }[config.engine.strategy]
    room = _USABLE * card_gb * 10**9
    for devices in (2**i for i in range(most.bit_length())):
        lines = needs(config, shape, devices=devices)
        serving, learning = total(lines, "every device", "first device"), total(lines, "learner's device")
        if config.learn.enabled or learning == 0:
            if serving + learning <= room:
                return devices, max(0, config.learn.devices - devices) if learning else 0
        elif max(serving, learning + _PROCESS_BYTES) <= room:
            return devices, config.learn.devices
    return None


def _slot_capacity(config: AuroraConfig) -> int:
    """Positions of a slot of the KV cache."""
    return slot_capacity(config.engine, config.memory)


def _draft_needs(config: AuroraConfig, text: PretrainedConfig, *, element_bytes: int) -> list[Need]:
    draft = draft_shape(config, text)
    parameters, _ = draft_parameters(draft)
    slots, capacity = config.engine.max_batch_size, _slot_capacity(config)
    features, kept_positions = 3 * text.hidden_size, slots * padded_positions(capacity)
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
    ]


def learner_needs(config: AuroraConfig, text: PretrainedConfig) -> list[Need]:
    """What the learner holds on its device."""
    draft, learn = draft_shape(config, text), config.learn
    element_bytes = 4 if config.target.precision == "fp32" else 2
    parameters, matrices = draft_parameters(draft)
    H, V = text.hidden_size, text.vocab_size
    copies = ["weights", "gradient", *(["average"] if learn.ema_decay else []), "champion"]
    state = 4 * len(copies) * parameters + 4 * matrices + 8 * (parameters - matrices)
    rows = 2 * draft.draft_vocab_size * H * element_bytes
    step = learn.batch_positions * (3 * H + learn.unroll_steps * (8 * H + 3 * draft.intermediate_size)) * 2
    return [
        Need(
            what="learner, the target's embedding and head",
            where="learner's device",
            num_bytes=V * H * (4 + element_bytes) + rows,
            how=f"embedding fp32 and head, {V:,} x {H}; the head's {draft.draft_vocab_size:,} draft rows, twice",
            for_learner=True,
        ),
        Need(
            what="learner, draft",
            where="learner's device",
            num_bytes=state,
            how=f"{parameters:,} x ({', '.join(copies)} 4 bytes each); "
            f"Muon 4 bytes for {matrices:,}, AdamW 8 for the rest",
            for_learner=True,
        ),
        Need(
            what="learner, one step (about)",
            where="learner's device",
            num_bytes=step,
            how=f"{learn.batch_positions:,} positions x {learn.unroll_steps} steps, bf16",
            for_learner=True,
        ),
    ]


def _pass_bytes(config: AuroraConfig, text: PretrainedConfig, *, devices: int) -> int:
    """Estimate of the largest activations without native kernels, where rounds propose chains only."""
    engine = config.engine
    verified = engine.max_batch_size * (engine.max_draft_tokens + 1)
    positions = verified + engine.prefill_chunk_tokens
    length = _slot_capacity(config)
    heads = text.num_attention_heads if engine.strategy == "fsdp" else math.ceil(text.num_attention_heads / devices)
    logits = 2 * verified * text.vocab_size
    mlp = positions * (4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size))
    attention = 2 * heads * length * max(engine.prefill_chunk_tokens, verified)
    num_bytes: int = 4 * (logits + mlp + attention)
    return num_bytes
