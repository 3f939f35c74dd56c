"""Builds from a configuration the engine, and all parts of an engine worker.

Only connects parts; what they do is in their own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aurora_lit.config import AuroraConfig, resolved_memory
from aurora_lit.drafts.centroid_file import read_centroids
from aurora_lit.drafts.checkpoint import load_draft
from aurora_lit.errors import ConfigError, RingError
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerCores, LearnerStatusPage
from aurora_lit.ipc.ring import RingWriter
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.kernels import native
from aurora_lit.kernels.build import processor_name
from aurora_lit.machine import available_bytes, give_back_freed_memory, keep_giving_back_freed_memory, use_threads
from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import cache_bytes
from aurora_lit.models.source import cache_root, find_target
from aurora_lit.models.tokenizer import Tokenizer, tokenizer_json
from aurora_lit.models.tokenizer import load_tokenizer as load_kept_tokenizer
from aurora_lit.models.torch_target import TorchTarget
from aurora_lit.modules.domains.centroids import DomainAssigner
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.placement import describe
from aurora_lit.serve.engine.engine import Engine
from aurora_lit.serve.engine.prefill import MAX_ROUND_S
from aurora_lit.serve.engine.slot_allocator import slot_capacity
from aurora_lit.serve.engine.thread_budget import ThreadBudget, thread_budget
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.serve.speculation.sources.kept_answers import KeptAnswers, model_digest
from aurora_lit.serve.speculation.sources.runtime_draft import RuntimeDraft, prepare_draft
from aurora_lit.serve.worker.load_models import (
    check_one_process,
    eos_token_ids,
    load_serving_target,
    load_shard,
    load_tokenizer,
    starting_draft,
    uses_draft,
)
from aurora_lit.serve.worker.parts import WorkerParts
from aurora_lit.serve.worker.trace_sinks import TraceRecording, TraceSinks
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_GIB = 1 << 30
_log = logging.getLogger(__name__)


def build_engine(
    config: AuroraConfig,
    *,
    sink: Callable[[Trace], None] | None = None,
    target: Target | None = None,
    max_round_s: float = MAX_ROUND_S,
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Load target and draft, and build an engine on them. Raises SourceError, CheckpointError or ConfigError.

    Nothing trains its draft: a named one is used as it is, learn.from_scratch or not.

    sink: receives a trace of every request; None: no traces are recorded. target: the configuration's, if it has been
    loaded already; engines may share it. max_round_s: longest round beside sequences that decode.
    """
    check_one_process(config)
    if config.draft.checkpoint is not None:
        config = dataclasses.replace(config, learn=dataclasses.replace(config.learn, from_scratch=False))
    use_threads(config.engine.threads)
    tokenizer = load_tokenizer(config)
    if target is None:
        target = load_serving_target(config)
    observer = None if sink is None else _recorder(config, target, sink)
    engine = _engine(
        config,
        target,
        tokenizer,
        observer=observer,
        threads=thread_budget(target.device),
        max_round_s=max_round_s,
    )
    return engine, tokenizer


def build_worker(config: AuroraConfig, run_folder: Path) -> WorkerParts:
    """An engine for a server: its traces go into the run folder's ring, and its draft can be swapped."""
    shard = load_shard(config, run_folder, 0) if config.engine.strategy != "single" else None
    if shard is None:
        use_threads(config.engine.threads)
    target = load_serving_target(config) if shard is None else shard
    tokenizer = load_kept_tokenizer(find_target(config), cache_dir=cache_root())
    sinks = _sinks(config, run_folder)
    observer = _recorder(config, target, sinks)
    records_traces = sinks.ring is not None or sinks.recording is not None
    page = LearnerStatusPage.open(run_folder / LEARNER_STATUS_NAME)
    engine = _engine(
        config,
        target,
        tokenizer,
        observer=observer if records_traces else None,
        threads=None if shard is not None else thread_budget(target.device, busy_cores=LearnerCores(page)),
    )
    kept = _kept_answers(config, engine)
    give_back_freed_memory()  # packing a target needs more for a moment
    keep_giving_back_freed_memory()

    def load(folder: Path | None) -> RuntimeDraft:
        draft = starting_draft(config, target)[0] if folder is None else load_draft(folder, target)
        assert draft is not None
        return prepare_draft(draft, target, capacity=engine.slot_capacity)

    def load_domains(path: Path) -> DomainAssigner:
        centroids, version = read_centroids(path, target)
        return DomainAssigner(centroids, version=version)

    def before_round() -> None:
        if shard is not None:
            shard.ranks.announce(engine.draft_version)

    def close() -> None:
        sinks.close()
        if kept is not None:
            kept.close()
        if shard is not None:
            shard.ranks.stop()

    return WorkerParts(
        engine=engine,
        load_draft=load if uses_draft(config) else None,
        load_domains=load_domains if uses_draft(config) and config.domain.detect else None,
        before_round=before_round,
        idle_work=engine.refine_costs,
        unrecorded=lambda: 0 if sinks.recording is None else sinks.recording.dropped,
        close=close,
    )


def _kept_answers(config: AuroraConfig, engine: Engine) -> KeptAnswers | None:
    """What the engine's memory remembers on disk, if memory.keep names a folder; reading it begins."""
    keep = config.memory.keep
    if keep is None or engine.memory is None:
        return None
    max_bytes = config.memory.capacity_mb << 17  # an eighth: the index takes about nine times as much
    with _usable_folder("memory.keep", keep) as folder:
        kept = KeptAnswers(folder, target=model_digest(find_target(config)), max_bytes=max_bytes)
    engine.memory.keep(kept)
    return kept


def _recorder(config: AuroraConfig, target: Target, sink: Callable[[Trace], None]) -> TraceRecorder:
    return TraceRecorder(sink, hidden_size=target.hidden_size)


def _engine(
    config: AuroraConfig,
    target: Target,
    tokenizer: Tokenizer | PreTrainedTokenizerBase,
    *,
    observer: TraceRecorder | None,
    threads: ThreadBudget | None = None,
    max_round_s: float = MAX_ROUND_S,
) -> Engine:
    if target.device.type == "cpu":
        native.warn_if_absent()
        if isinstance(target, TorchTarget) and target.why_not_native is not None:
            _log.warning(
                "The target's layers run in torch, which is slower than native layers: %s",
                target.why_not_native,
            )
    else:
        _log.warning("%s; engine.device=cpu computes on the CPU", describe(config))
    draft, version = starting_draft(config, target)
    end_tokens = eos_token_ids(target, tokenizer)
    grammars = None
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        state = partial(tokenizer_json, backend, vocab_size=target.vocab_size)
        grammars = GrammarCompiler(state, vocab_size=target.vocab_size, eos_token_ids=end_tokens)
        if config.engine.devices > 1:  # a rank that is silent for two seconds ends the server; others start sooner
            grammars.prepare()
    _check_memory(config, target, draft, is_observed=observer is not None)
    try:
        return Engine(
            target,
            draft,
            config.engine,
            eos_token_ids=end_tokens,
            memory=resolved_memory(config),
            max_round_s=max_round_s,
            draft_version=version,
            observer=observer,
            grammars=grammars,
            threads=threads,
        )
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) != errno.ENOMEM and "allocate memory" not in str(error):  # torch's words
            raise
        # It promises no more than there is (vm.overcommit_memory=2), or no more to this process (ulimit -v).
        raise ConfigError(f"{_slots(config)}: the system gives no memory for them; lower one of the two") from error


def _check_memory(config: AuroraConfig, target: Target, draft: Eagle3Draft | None, *, is_observed: bool) -> None:
    """Raise ConfigError if keys, values and states of the slots cannot fit into main memory.

    The system promises more than there is, and ends a process, this one or another, when slots are written.
    is_observed: the target's last hidden states are kept for traces, and without a draft its features too.
    """
    if target.device.type != "cpu":
        return
    engine, capacity = config.engine, slot_capacity(config.engine, config.memory)
    element_bytes = target.kv_dtype.itemsize
    slots = partial(cache_bytes, num_slots=engine.max_batch_size, capacity=capacity, element_bytes=element_bytes)
    # All ranks of a sharded target are on this machine.
    needed = slots(num_layers=target.num_layers, num_kv_heads=target.all_kv_heads, head_dim=target.head_dim)
    states = engine.max_batch_size * capacity * target.hidden_size
    if draft is not None:
        shape = draft.config
        needed += slots(num_layers=1, num_kv_heads=shape.num_key_value_heads, head_dim=shape.head_dim)
        needed += 3 * states * element_bytes
    elif is_observed:
        needed += 3 * states * torch.bfloat16.itemsize
    needed += states * torch.bfloat16.itemsize if is_observed else 0
    if needed > (free := available_bytes()):
        raise ConfigError(
            f"{_slots(config)}: their keys, values and states take {needed / _GIB:.1f} GiB of main memory, of which "
            f"{free / _GIB:.1f} GiB are free; lower one of the two"
        )


def _slots(config: AuroraConfig) -> str:
    return f"engine.max_batch_size={config.engine.max_batch_size}, engine.max_seq_len={config.engine.max_seq_len}"


def _processor_of(device: torch.device) -> str:
    """Its name, not the machine's: a container has another one at each start."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@contextlib.contextmanager
def _usable_folder(key: str, value: str) -> Iterator[Path]:
    """The folder that a setting names. Raises ConfigError if it cannot be written to, or another process does so."""
    try:
        yield Path(value).expanduser()
    except BlockingIOError as error:
        raise ConfigError(f"{key}={value}: another process writes there; name another folder, or end it") from error
    except OSError as error:
        raise ConfigError(f"{key}={value} cannot be used ({error.strerror}); name a folder that can be made") from error


def _sinks(config: AuroraConfig, run_folder: Path) -> TraceSinks:
    """The ring, if there is a draft to learn, and the recording, if trace.record is set.

    Without learn.enabled the ring takes no memory until a learner is attached. If no file can be made for it, serving
    continues without.
    """
    ring = recording = None
    if uses_draft(config):
        try:
            path, capacity = run_folder / RING_NAME, config.trace.capacity_mb << 20
            ring = RingWriter.create(path, capacity, layout=LAYOUT_DIGEST, reserve=config.learn.enabled)
        except RingError as error:
            if config.learn.enabled:
                raise
            _log.warning("no learner can be attached to this server: %s", error)
    if config.trace.record is not None:
        with _usable_folder("trace.record", config.trace.record) as folder:
            recording = TraceRecording(folder, max_bytes=config.trace.record_mb << 20)
    return TraceSinks(ring=ring, recording=recording)
