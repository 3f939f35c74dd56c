"""Our LitAPI: the engine worker's setup, and the API key that routes ask for.

LitServe takes both from one object: `setup` runs in each worker process, `authorize` in the HTTP process. Leaves out
routes (serve/http/spec.py), the worker's loop (serve/worker/loop.py) and the processes (serve/server.py).
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litserve import LitAPI
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig, versions_folder
from aurora_lit.drafts.versions import DraftStore
from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage, WorkerState
from aurora_lit.ipc.process_lifetime import die_with_parent
from aurora_lit.serve.http.spec import AuroraSpec
from aurora_lit.serve.learner_child import learner_command
from aurora_lit.serve.ranks import Shard, run_rank
from aurora_lit.serve.worker.hot_reload import HotReloader
from aurora_lit.serve.worker.loop import EngineLoop
from aurora_lit.serve.worker.parts import WorkerParts

if TYPE_CHECKING:
    from aurora_lit.serve.worker.live_draft import LiveDraft

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a server runs on. Importable functions, since they are sent to spawned processes."""

    prepare: Callable[[AuroraConfig], object]
    """Runs first, in the main process: fetches what is missing, so that errors show before processes start."""
    build_worker: Callable[[AuroraConfig, Path], WorkerParts]
    """Runs in the engine worker, with the run folder."""
    load_tokenizer: Callable[[AuroraConfig], PreTrainedTokenizerBase]
    """Runs for the HTTP process."""
    load_shard: Callable[[AuroraConfig, Path, int], Shard] | None = None
    """Runs in the processes of ranks 1, 2, … of a sharded target, with the run folder and the rank."""
    learner_command: Callable[[Path], list[str]] = learner_command
    """The command line of the server's own learner, for a run folder."""


class AuroraAPI(LitAPI):  # type: ignore[misc]
    """Builds the engine in the worker process, where `EngineLoop` then runs it."""

    parts: WorkerParts
    live_draft: LiveDraft | None

    def __init__(self, config: AuroraConfig, backend: Backend, run_folder: Path, spec: AuroraSpec) -> None:
        """Holds plain data only: multiprocessing sends the object to the worker process."""
        super().__init__(loop=EngineLoop(run_folder / STATUS_NAME), spec=spec)
        self._config, self._backend, self._run_folder = config, backend, run_folder
        self._server_pid = os.getpid()

    def setup(self, device: str) -> None:
        """Build the engine; an error is also written to the status page, for the main process to show.

        In the processes of ranks 1, 2, … of a sharded target this does not return: they never take a request.
        """
        die_with_parent(self._server_pid)
        rank = int(os.environ["LITSERVE_WORKER_ID"])
        if rank:
            assert self._backend.load_shard is not None
            run_rank(rank, self._run_folder, partial(self._backend.load_shard, self._config, self._run_folder, rank))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process drains first
        page = EngineStatusPage.open(self._run_folder / STATUS_NAME, writable=True)
        page.beat()
        page.write(worker_pid=os.getpid())
        try:
            self.parts = self._backend.build_worker(self._config, self._run_folder)
            self.live_draft = self._build_live_draft()
        except Exception as error:
            page.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
            raise
        engine = self.parts.engine
        page.write(
            max_seq_len=engine.max_seq_len,
            vocab_size=engine.vocab_size,
            max_draft_tokens=self._config.engine.max_proposal_length,
        )

    def _build_live_draft(self) -> LiveDraft | None:
        """The engine's draft, beginning with the deployment's current version if there is one."""
        if self.parts.load_draft is None:
            return None
        # Imported here: drift detection (river) takes long to import, and only the worker needs it.
        from aurora_lit.serve.worker.live_draft import LiveDraft

        store = DraftStore(versions_folder(self._config), keep=self._config.checkpoint.keep)
        return LiveDraft(self.parts.engine, HotReloader(store, self.parts.load_draft))

    def authorize(self, credentials: Credentials) -> None:
        """Require `Authorization: Bearer KEY` if server.api_key is set. Raises RequestError."""
        key = self._config.server.api_key
        given = "" if credentials is None else credentials.credentials
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
