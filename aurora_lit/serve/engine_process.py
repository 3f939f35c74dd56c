"""What an engine process runs, from its first line on: it builds the engine, then serves until it is told to end.

The main process starts it before it imports anything that takes time, so that both start side by side. This file, which
the main process imports too, therefore imports nothing heavy itself. Leaves out what the loop does
(serve/worker/loop.py), what is built (serve/worker/build.py), and ranks 1, 2, … (ranks.py).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import aurora_lit.machine  # noqa: F401  # counts them before torch is loaded
from aurora_lit.config import AuroraConfig, draft_folder, load_config, max_proposal_length, versions_folder
from aurora_lit.errors import AuroraError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import WorkerChannel
from aurora_lit.ipc.process_lifetime import die_with_parent, imports_are_safe
from aurora_lit.logs import log_to_stderr
from aurora_lit.serve import backend as backends
from aurora_lit.serve.backend import Backend
from aurora_lit.serve.ranks import run_rank

if TYPE_CHECKING:
    from aurora_lit.serve.worker.live_draft import LiveDraft
    from aurora_lit.serve.worker.parts import WorkerParts

_log = logging.getLogger(__name__)


def start_engine_processes(
    config: AuroraConfig, backend: Backend, run_folder: Path, channel: WorkerChannel
) -> list[BaseProcess]:
    """Start the engine worker and, for a sharded target, the further ranks; returns them by rank."""
    context = multiprocessing.get_context(backends.START_METHOD)
    processes: list[BaseProcess] = []
    for rank in range(config.engine.devices):
        process = context.Process(  # type: ignore[attr-defined]
            target=run_engine_process,
            args=(rank, config, backend, run_folder, os.getpid(), None if rank else channel),
            name="engine-worker" if rank == 0 else f"engine-rank-{rank}",
        )
        with imports_are_safe():
            process.start()
        processes.append(process)
    return processes


def run_engine_process(
    rank: int, config: AuroraConfig, backend: Backend, run_folder: Path, server_pid: int, channel: WorkerChannel | None
) -> None:
    """Run rank 0, the engine worker, or one of the others; does not return.

    An error is also written to the status page, for the main process to show.
    """
    die_with_parent(server_pid)
    log_to_stderr()
    if rank:
        assert backend.load_shard is not None
        run_rank(rank, run_folder, partial(backend.load_shard, config, run_folder, rank))
    assert channel is not None
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to the whole group
        signal.signal(number, signal.SIG_IGN)  # the main process drains first
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    page = EngineStatusPage.open(run_folder / STATUS_NAME, writable=True)
    page.beat()
    page.write(worker_pid=os.getpid())
    try:
        parts = backend.build_worker(config, run_folder)
        live_draft = _live_draft(config, parts)
    except Exception as error:
        if not isinstance(error, AuroraError):
            _log.exception("the engine could not be built")
        page.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    engine = parts.engine
    page.write(
        max_seq_len=engine.max_seq_len,
        vocab_size=engine.vocab_size,
        max_draft_tokens=max_proposal_length(config),
        num_slots=config.engine.max_batch_size,
    )
    from aurora_lit.serve.worker.loop import EngineLoop

    EngineLoop(channel, page).run(parts, live_draft)


def _live_draft(config: AuroraConfig, parts: WorkerParts) -> LiveDraft | None:
    """The engine's draft and domains, beginning with what the deployment has published."""
    if parts.load_draft is None:
        return None
    from aurora_lit.drafts.centroid_file import CENTROIDS_NAME
    from aurora_lit.drafts.hot_reload import HotReloader
    from aurora_lit.drafts.store import DraftStore
    from aurora_lit.serve.worker.domain_watch import DomainWatch
    from aurora_lit.serve.worker.live_draft import LiveDraft

    store = DraftStore(versions_folder(config))
    starting, is_shipped = draft_folder(config), config.draft.checkpoint == load_config(None, []).draft.checkpoint
    if starting is not None and not is_shipped and not config.learn.from_scratch and store.predates(starting):
        _log.warning(
            "draft.checkpoint=%s is newer than the current version in %s, which is served all the same; to begin with "
            "the checkpoint, name another checkpoint.run",
            config.draft.checkpoint,
            store.folder,
        )
    if parts.load_domains is None:
        return LiveDraft(parts.engine, HotReloader(store, parts.load_draft))
    watch = DomainWatch(store.folder / CENTROIDS_NAME, parts.load_domains)
    return LiveDraft(parts.engine, HotReloader(store, parts.load_draft, also_check=watch.check), watch)
