"""The versions of vLLM whose runners are known, and what of a runner is relied on.

A runner is checked before anything of it is wrapped: its vLLM must be of a known version, its methods must have the
parameters written here, and its state the fields. Otherwise nothing is wrapped. To add a version: read its two runners
against runners.py, run tests/vllm in an environment with it, and extend KNOWN_VERSIONS and docs/vllm.md.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from aurora_lit.errors import AuroraError
from aurora_lit.vllm.runners import V1, V2, RunnerReader

KNOWN_VERSIONS = ("0.32",)
"""Beginnings of the version numbers whose runners were read; docs/vllm.md says which of them were run."""


class UnknownVersionError(AuroraError):
    """This vLLM is not one of the known ones, or its runner is not as written here."""


@dataclass(frozen=True, kw_only=True)
class KnownRunner:
    """One kind of model runner."""

    module: str
    """Module of its GPUModelRunner; runners of other platforms derive from that."""
    reader: RunnerReader
    methods: dict[str, tuple[str, ...]]
    """Parameters of the methods that are wrapped or called, without `self`."""
    state_fields: tuple[str, ...]
    """Fields of its ExecuteModelState that are read."""
    refused: tuple[str, ...] = ()
    """Attributes that must be None: with them, rows are laid out otherwise."""


RUNNERS = (
    KnownRunner(
        module="vllm.v1.worker.gpu_model_runner",
        reader=V1,
        methods={
            "execute_model": ("scheduler_output", "intermediate_tensors"),
            "_sample": ("logits", "spec_decode_metadata"),
            "sample_tokens": ("grammar_output",),
            "_input_fits_in_drafter": ("common_attn_metadata",),
            "get_model": (),
            "get_draft_model": (),
        },
        state_fields=(
            "scheduler_output",
            "spec_decode_common_attn_metadata",
            "hidden_states",
            "aux_hidden_states",
        ),
    ),
    KnownRunner(
        module="vllm.v1.worker.gpu.model_runner",
        reader=V2,
        methods={
            "execute_model": (
                "scheduler_output",
                "intermediate_tensors",
                "dummy_run",
                "skip_attn_for_dummy_run",
                "is_profile",
                "context_len",
                "valid_dummy_state_slots",
                "randomize_inputs",
            ),
            "sample": ("hidden_states", "input_batch", "grammar_output"),
            "sample_tokens": ("grammar_output",),
            "get_model": (),
            "get_draft_model": (),
        },
        state_fields=("input_batch", "hidden_states", "aux_hidden_states", "num_spec_tokens_to_schedule"),
        refused=("pcp_manager", "adaptive_verification"),
    ),
)


def check_version(version: str) -> None:
    """Raise UnknownVersionError unless this version of vLLM is known."""
    if not any(version == known or version.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        raise UnknownVersionError(f"vLLM {version} is not known (known: {', '.join(KNOWN_VERSIONS)})")


def reader_of(runner: Any, version: str) -> RunnerReader:
    """How this runner is read. Raises UnknownVersionError if it is not as written here."""
    check_version(version)
    modules = {kind.__module__ for kind in type(runner).__mro__}
    known = next((each for each in RUNNERS if each.module in modules), None)
    if known is None:
        raise UnknownVersionError(f"vLLM {version} runs {type(runner).__name__}, which is not a known runner")
    differences = signature_differences(known, type(runner), sys.modules[known.module].__dict__["ExecuteModelState"])
    if differences:
        raise UnknownVersionError(f"vLLM {version} is not as expected: {'; '.join(differences)}")
    set_otherwise = [name for name in known.refused if getattr(runner, name, None) is not None]
    if set_otherwise:
        raise UnknownVersionError(f"traces cannot be made with {', '.join(set_otherwise)}")
    return known.reader


def signature_differences(known: KnownRunner, runner_class: type, state_class: Any) -> list[str]:
    """What of a runner's class and its state differs from what is written here."""
    differences = []
    for name, parameters in known.methods.items():
        method = getattr(runner_class, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != parameters:
            differences.append(f"{name} takes {found}, not {parameters}")
    missing = set(known.state_fields) - set(getattr(state_class, "_fields", ()))
    if missing:
        differences.append(f"ExecuteModelState has no {', '.join(sorted(missing))}")
    return differences
