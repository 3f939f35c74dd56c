"""Reads what vLLM's two model runners hold between `execute_model` and the end of `sample_tokens`.

Everything that depends on vLLM's own names is here and in reload.py. The runners differ in where they keep a batch;
both compute the rows of all requests end to end.

A runner is checked before anything of it is wrapped: its vLLM must be of a known version, its methods must have the
parameters written here, and its state the fields. Otherwise nothing is wrapped. To add a version: read its two runners
against this file, run tests/vllm in an environment with it, and extend KNOWN_VERSIONS and docs/vllm.md.

Shapes: B requests of a step, Q rows, H hidden, K proposals.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aurora_lit.errors import AuroraError
from aurora_lit.vllm.capture import RequestInfo, label

KNOWN_VERSIONS = ("0.32",)
"""Beginnings of the version numbers whose runners were read; docs/vllm.md says which of them were run."""


class UnknownVersionError(AuroraError):
    """This vLLM is not one of the known ones, or its runner is not as written here."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step that the target has computed and that is not sampled yet."""

    request_ids: list[str]
    row_starts: list[int]
    num_rows: list[int]
    num_drafted: list[int]
    is_unfinished: list[bool]
    """True while a prompt is not read to its end; what is sampled for it is discarded."""
    drafts_next: bool
    """False if no draft runs in this step, since a sequence is too long for it."""
    token_ids_Q: Tensor
    position_Q: Tensor
    aux_QH: Sequence[Tensor]
    last_QH: Tensor


@dataclass(frozen=True, kw_only=True)
class KnownRunner:
    """One kind of model runner: what of it is relied on, and how it is read."""

    module: str
    """Module of its GPUModelRunner; runners of other platforms derive from that."""
    methods: dict[str, tuple[str, ...]]
    """Parameters of the methods that are wrapped or called, without `self`."""
    state_fields: tuple[str, ...]
    """Fields of its ExecuteModelState that are read."""
    refused: tuple[str, ...] = ()
    """Attributes that must be None: with them, rows are laid out otherwise."""
    sample_method: str
    """The method that samples; its result holds how many tokens were sampled."""
    read_batch: Callable[[Any], Batch | None]
    """Between `execute_model` and `sample_tokens`, in the runner's own tensors; None if the step computed nothing, or
    no auxiliary states."""
    read_num_sampled: Callable[[Any], Tensor]
    """From the result of `sample_method`, in a tensor of our own: [B]."""


def new_requests(scheduler_output: Any) -> list[tuple[RequestInfo, int]]:
    """Requests whose first step this is, each with the position at which it begins."""
    found = []
    for new in scheduler_output.scheduled_new_reqs:
        params = new.sampling_params
        if params is None or new.prompt_token_ids is None:  # pooling, or only embeddings
            continue
        domain, may_be_stored = label(params.extra_args)
        stop_ids = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
        info = RequestInfo(
            request_id=new.req_id,
            prompt_tokens=len(new.prompt_token_ids),
            max_tokens=params.max_tokens,
            stop_ids=frozenset(stop_ids or ()),
            temperature=float(params.temperature),
            domain=domain,
            has_grammar=params.structured_outputs is not None,
            has_options=_has_options(params),
            recordable=may_be_stored
            and new.lora_request is None
            and not new.mm_features
            and new.prompt_embeds is None,  # their positions have tokens that mean nothing
        )
        found.append((info, int(new.num_computed_tokens)))
    return found


def _has_options(params: Any) -> bool:
    shifted = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty or params.logit_bias
    truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return bool(shifted) or (truncated and params.temperature > 0)


def resumed_requests(scheduler_output: Any) -> list[tuple[str, int]]:
    """Requests computed again after a preemption, each with the position at which it begins."""
    cached = scheduler_output.scheduled_cached_reqs
    positions = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return [(request_id, positions[request_id]) for request_id in cached.resumed_req_ids if request_id in positions]


# -- V1 (vllm/v1/worker/gpu_model_runner.py) ---------------------------------------------------------------------------


def _read_v1(runner: Any) -> Batch | None:
    state = runner.execute_model_state
    if state is None or state.aux_hidden_states is None:
        return None
    scheduled, count = state.scheduler_output, runner.input_batch.num_reqs
    request_ids = list(runner.input_batch.req_ids[:count])
    drafted = scheduled.scheduled_spec_decode_tokens
    total = scheduled.total_num_scheduled_tokens
    return Batch(
        request_ids=request_ids,
        row_starts=runner.query_start_loc.np[:count].tolist(),
        num_rows=[scheduled.num_scheduled_tokens[request_id] for request_id in request_ids],
        num_drafted=[len(drafted.get(request_id, ())) for request_id in request_ids],
        is_unfinished=runner.discard_request_mask.np[:count].tolist(),
        drafts_next=runner._input_fits_in_drafter(state.spec_decode_common_attn_metadata),
        token_ids_Q=runner.input_ids.gpu[:total],
        position_Q=runner.positions[:total],  # not `_get_positions`: of a target with M-RoPE those are [3, Q]
        aux_QH=state.aux_hidden_states,
        last_QH=state.hidden_states,
    )


def _v1_num_sampled(sampler_output: Any) -> Tensor:
    sampled_BK: Tensor = sampler_output.sampled_token_ids
    return (sampled_BK != -1).sum(1)


V1 = KnownRunner(
    module="vllm.v1.worker.gpu_model_runner",
    methods={
        "execute_model": ("scheduler_output", "intermediate_tensors"),
        "_sample": ("logits", "spec_decode_metadata"),
        "sample_tokens": ("grammar_output",),
        "_input_fits_in_drafter": ("common_attn_metadata",),
        "get_model": (),
        "get_draft_model": (),
    },
    state_fields=("scheduler_output", "spec_decode_common_attn_metadata", "hidden_states", "aux_hidden_states"),
    sample_method="_sample",
    read_batch=_read_v1,
    read_num_sampled=_v1_num_sampled,
)


# -- V2 (vllm/v1/worker/gpu/model_runner.py) ---------------------------------------------------------------------------


def _read_v2(runner: Any) -> Batch | None:
    state = runner.execute_model_state
    if state is None or state.aux_hidden_states is None:
        return None
    batch, count = state.input_batch, state.input_batch.num_reqs
    drafted = batch.num_draft_tokens_per_req
    return Batch(
        request_ids=list(batch.req_ids),
        row_starts=batch.query_start_loc_np[:count].tolist(),
        num_rows=batch.num_scheduled_tokens[:count].tolist(),
        num_drafted=[0] * count if drafted is None else drafted[:count].tolist(),
        is_unfinished=[False] * count,  # it samples 0 tokens for these
        drafts_next=state.num_spec_tokens_to_schedule > 0,
        token_ids_Q=batch.input_ids,
        position_Q=batch.positions,
        aux_QH=state.aux_hidden_states,
        last_QH=state.hidden_states,
    )


def _v2_num_sampled(result: Any) -> Tensor:
    num_sampled_B: Tensor = result[1]
    return num_sampled_B.clone()  # proposing may overwrite it


V2 = KnownRunner(
    module="vllm.v1.worker.gpu.model_runner",
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
    sample_method="sample",
    read_batch=_read_v2,
    read_num_sampled=_v2_num_sampled,
)


# -- which runner a vLLM has -------------------------------------------------------------------------------------------


def check_version(version: str) -> None:
    """Raise UnknownVersionError unless this version of vLLM is known."""
    if not any(version == known or version.startswith(f"{known}.") for known in KNOWN_VERSIONS):
        raise UnknownVersionError(f"vLLM {version} is not known (known: {', '.join(KNOWN_VERSIONS)})")


def reader_of(runner: Any, version: str) -> KnownRunner:
    """How this runner is read. Raises UnknownVersionError if it is not as written here."""
    check_version(version)
    modules = {kind.__module__ for kind in type(runner).__mro__}
    known = next((each for each in (V1, V2) if each.module in modules), None)
    if known is None:
        raise UnknownVersionError(f"vLLM {version} runs {type(runner).__name__}, which is not a known runner")
    differences = signature_differences(known, type(runner), sys.modules[known.module].__dict__["ExecuteModelState"])
    if differences:
        raise UnknownVersionError(f"vLLM {version} is not as expected: {'; '.join(differences)}")
    set_otherwise = [name for name in known.refused if getattr(runner, name, None) is not None]
    if set_otherwise:
        raise UnknownVersionError(f"traces cannot be made with {', '.join(set_otherwise)}")
    return known


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
