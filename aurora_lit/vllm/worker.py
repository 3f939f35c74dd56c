"""The extension of vLLM's workers (`--worker-extension-cls aurora_lit.vllm.worker.WorkerExtension`).

vLLM adds these methods to its worker class; the follower (follower.py), in the API server's process, calls them on all
ranks, between two steps. Until it calls `aurora_lit_start` nothing is changed. No method raises: what went wrong is in
what it returns, {"error": reason} or {"error": None}.

vLLM's draft is on the last pipeline stage. There the first tensor-parallel rank, which has all hidden states, makes
traces and writes the status page, and every rank swaps drafts; ranks of earlier stages only check their vLLM's version.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_lit.drafts.versions import version_number
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.ring import RingCounters, RingWriter
from aurora_lit.traces.record import LAYOUT_DIGEST, to_pieces
from aurora_lit.vllm.capture import Capture
from aurora_lit.vllm.deployment import Deployment
from aurora_lit.vllm.hooks import RunnerHooks
from aurora_lit.vllm.live_status import LiveStatus
from aurora_lit.vllm.reload import check_weights_are_own, load_into
from aurora_lit.vllm.runners import reader_of

_MOST_QUEUED = 0.125
"""Part of the ring that unread traces may fill before requests are left unrecorded. Traces are read in order: a learner
that reads one in eight meets them as old as in a full ring that is overwritten; a larger part would make them older."""
_FEWEST_QUEUED = 8
"""Fewer unread traces are not too many, however large they are: of a model of 8B one may be an eighth of the ring."""
_log = logging.getLogger("vllm.aurora_lit")


@dataclass(kw_only=True)
class _Recorder:
    """What the rank that makes traces has."""

    hooks: RunnerHooks
    status: LiveStatus
    page: EngineStatusPage


class WorkerExtension:
    """See the file's docstring. `self` is a worker of vLLM."""

    model_runner: Any
    vllm_config: Any

    def aurora_lit_start(self, run_folder: str) -> dict[str, Any]:
        """Check this vLLM and its draft, and begin to make traces on the rank that has the hidden states."""

        def start() -> None:
            import vllm
            from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

            reader = reader_of(self.model_runner, vllm.__version__)
            if not get_pp_group().is_last_rank:
                return
            if self.model_runner.get_draft_model() is None:
                raise AuroraError("this server has no draft; give --speculative-config with method eagle3")
            check_weights_are_own(self.model_runner)
            started = getattr(self, "_aurora_lit_recorder", None) is not None
            if not started and get_tensor_model_parallel_rank() == 0:
                deployment = Deployment.read(Path(run_folder))
                self._aurora_lit_recorder = _recorder(self.model_runner, self.vllm_config, reader, deployment)

        return _result(start)

    def aurora_lit_swap(self, folder: str, version: str, trusted: bool, last_good: str) -> dict[str, Any]:
        """Load a validated version's weights, or if that fails again those of the folder `last_good`.

        A pipeline stage without the draft has nothing to load. trusted: it was served before, so there is no trial.
        """
        began = time.perf_counter()

        def swap() -> None:
            if self.model_runner.get_draft_model() is None:
                return
            load_into(self.model_runner, Path(folder), last_good=Path(last_good))
            recorder = getattr(self, "_aurora_lit_recorder", None)
            if recorder is not None:
                recorder.hooks.version = version_number(version)
                recorder.status.swapped(version, trusted=trusted)

        result = _result(swap)
        return {**result, "version": version, "seconds": time.perf_counter() - began}

    def aurora_lit_note(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Write fields of the status page that only the follower knows."""

        def note() -> None:
            recorder = getattr(self, "_aurora_lit_recorder", None)
            if recorder is not None:
                recorder.page.write(**fields)

        return _result(note)


def _result(action: Callable[[], None]) -> dict[str, Any]:
    try:
        action()
    except Exception as error:  # one that left this method would end the engine
        expected = isinstance(error, AuroraError)
        _log.log(logging.WARNING, "aurora-lit: %s", error, exc_info=not expected)
        return {"error": str(error) if expected else f"{type(error).__name__}: {error}"}
    return {"error": None}


def _recorder(runner: Any, config: Any, reader: Any, deployment: Deployment) -> _Recorder:
    engine = int(config.parallel_config.data_parallel_index)
    hidden_size = int(config.model_config.get_hidden_size())
    max_draft_tokens = int(config.speculative_config.num_speculative_tokens)
    page = _page(deployment.status_path(engine))
    ring = _ring(deployment.ring_path(engine), deployment.ring_bytes)
    capture = Capture(
        lambda trace: ring.push(*to_pieces(trace)),
        bytes_per_token=8 * hidden_size,  # four states in bf16
        limit_bytes=deployment.ring_bytes,
        is_behind=lambda: _is_behind(ring.counters),
    )
    status = LiveStatus(page, capture)
    hooks = RunnerHooks(runner, reader, capture, status.observe, status.write, status.failed)
    hooks.install()
    page.write(
        state=WorkerState.READY,
        worker_pid=os.getpid(),
        started_ns=time.monotonic_ns(),
        max_seq_len=int(config.model_config.max_model_len),
        vocab_size=int(config.model_config.get_vocab_size()),
        max_draft_tokens=max_draft_tokens,
        num_slots=int(config.scheduler_config.max_num_seqs),
        draft_version=deployment.starting_draft.name,
        error="",
        # The page may be that of an engine before.
        waiting=0,
        rollbacks=0,
        rolled_back_version="",
        rolled_back_reason="",
    )
    return _Recorder(hooks=hooks, status=status, page=page)


def _page(path: Path) -> EngineStatusPage:
    if not path.exists():
        EngineStatusPage.create(path)
    return EngineStatusPage.open(path, writable=True)


def _ring(path: Path, capacity_bytes: int) -> RingWriter:
    """The ring for traces, which is that of the engine before if that was killed. Raises RingError."""
    if path.exists():
        ring = RingWriter.open(path, layout=LAYOUT_DIGEST)
    else:
        ring = RingWriter.create(path, capacity_bytes, layout=LAYOUT_DIGEST)
    threading.Thread(target=ring.map_pages, name="aurora-lit-ring", daemon=True).start()
    return ring


def _is_behind(ring: RingCounters) -> bool:
    """True while the learner has so much to read that requests which begin are not recorded.

    Joining, checksumming and copying a trace delays the engine's next step, for nothing if it is overwritten unread.
    """
    is_much = ring.queued_bytes > _MOST_QUEUED * ring.capacity_bytes
    return is_much and ring.queued_records >= _FEWEST_QUEUED
