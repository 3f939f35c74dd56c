"""Our one LitAPI and our one LitSpec: every route, who may call it, and the engine worker's setup.

The spec lives in the HTTP process, the API's `setup` runs in the worker. Leaves out what a generation request does
(serve/http/routes.py) and the processes (serve/server.py).

    POST /v1/chat/completions  /v1/completions      GET /v1/models  /v1/models/NAME  /v1/aurora/status  /metrics
    GET /health  /ready                              open: no key is asked
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litserve import LitAPI
from litserve.specs.base import LitSpec
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig, model_name, versions_folder
from aurora_lit.drafts.versions import DraftStore
from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import STATUS_NAME, StatusBlock, WorkerState
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerBlock
from aurora_lit.ipc.process_lifetime import die_with_parent
from aurora_lit.serve.http.errors import install
from aurora_lit.serve.http.metrics import CONTENT_TYPE, ServerMetrics
from aurora_lit.serve.http.routes import Generation
from aurora_lit.serve.http.status import engine_json, learner_json, ranks_json, ring_counters
from aurora_lit.serve.http.worker_client import WorkerClient
from aurora_lit.serve.learner_child import learner_command
from aurora_lit.serve.ranks import Part, run_rank
from aurora_lit.serve.worker.call_tracker import WorkerParts
from aurora_lit.serve.worker.hot_reload import HotReloader
from aurora_lit.serve.worker.loop import EngineLoop

if TYPE_CHECKING:
    from aurora_lit.serve.worker.live_draft import LiveDraft

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What is behind the HTTP side; importable functions, since they travel to the spawned worker."""

    prepare: Callable[[AuroraConfig], object]
    """Runs first, in the main process: fetch what is missing, so that its errors show before workers start."""
    build_worker: Callable[[AuroraConfig, Path], WorkerParts]
    """Runs in the worker, with the run folder."""
    load_tokenizer: Callable[[AuroraConfig], PreTrainedTokenizerBase]
    """Runs for the HTTP process."""
    load_part: Callable[[AuroraConfig, Path, int], Part] | None = None
    """Runs in the workers beside it, ranks 1, 2, …, with the run folder and the rank."""
    learner_command: Callable[[Path], list[str]] = learner_command
    """The command line of the server's own learner, for this run folder."""


class AuroraAPI(LitAPI):  # type: ignore[misc]
    """The worker's side: builds the engine; the loop does the rest."""

    parts: WorkerParts
    live: LiveDraft | None

    def __init__(self, config: AuroraConfig, backend: Backend, run_folder: Path, spec: AuroraSpec) -> None:
        """Only plain data here: the object is pickled to the worker."""
        super().__init__(loop=EngineLoop(run_folder / STATUS_NAME), spec=spec)
        self._config, self._backend, self._run_folder = config, backend, run_folder
        self._server_pid = os.getpid()

    def setup(self, device: str) -> None:
        """Build the engine; a failure is left in the status block for the main process to show.

        The other workers of a sharded target do not return from here: they are never to take a request.
        """
        die_with_parent(self._server_pid)
        rank = int(os.environ["LITSERVE_WORKER_ID"])
        if rank:
            assert self._backend.load_part is not None
            run_rank(rank, self._run_folder, partial(self._backend.load_part, self._config, self._run_folder, rank))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process drains first
        status = StatusBlock.open(self._run_folder / STATUS_NAME, writable=True)
        status.beat()
        status.write(worker_pid=os.getpid())
        try:
            self.parts = self._backend.build_worker(self._config, self._run_folder)
            self.live = self._live_draft()
        except Exception as error:
            status.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
            raise
        engine = self.parts.engine
        status.write(
            max_seq_len=engine.max_seq_len,
            vocab_size=engine.vocab_size,
            max_draft_tokens=self._config.engine.most_proposed,
        )

    def _live_draft(self) -> LiveDraft | None:
        """The engine begins with the version that this deployment has come to, if it has published any."""
        if self.parts.load_draft is None:
            return None
        # Here, because drift detection brings much along that only the worker needs.
        from aurora_lit.serve.worker.live_draft import LiveDraft

        store = DraftStore(versions_folder(self._config), keep=self._config.checkpoint.keep)
        return LiveDraft(self.parts.engine, HotReloader(store, self.parts.load_draft))

    def authorize(self, credentials: Credentials) -> None:
        """Ask for `Authorization: Bearer KEY` when server.api_key is set."""
        key = self._config.server.api_key
        given = "" if credentials is None else credentials.credentials
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError(
                "the API key is missing or wrong; send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )


class AuroraSpec(LitSpec):  # type: ignore[misc]
    """The HTTP side: routes and what they share."""

    def __init__(self, config: AuroraConfig, backend: Backend, run_folder: Path) -> None:
        """Make the parts and register the routes that ask for a key."""
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self._model, self._max_queue = model_name(config), config.server.max_queue
        self._created, self._drain_s = int(time.time()), config.server.drain_s
        self._asks_key = config.server.api_key is not None
        self._status = StatusBlock.open(run_folder / STATUS_NAME)
        self._learner = LearnerBlock.open(run_folder / LEARNER_STATUS_NAME)
        self._ring = partial(ring_counters, run_folder)
        self._ranks = partial(ranks_json, run_folder)
        self._metrics = ServerMetrics(model=self._model, status=self._status, learner=self._learner, ring=self._ring)
        self._flights = WorkerClient(status=self._status, max_queue=config.server.max_queue)
        self._flights.connect(self)
        generation = Generation(
            model=self._model,
            tokenizer=backend.load_tokenizer(config),
            flights=self._flights,
            metrics=self._metrics,
            status=self._status,
        )
        self.add_endpoint("/v1/chat/completions", generation.chat, ["POST"])
        self.add_endpoint("/v1/completions", generation.complete, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.one_model, ["GET"])
        self.add_endpoint("/v1/aurora/status", self.status, ["GET"])
        self.add_endpoint("/metrics", self.prometheus, ["GET"])

    def __getstate__(self) -> dict[str, Any]:
        """The worker needs the path (it names the queue) and nothing of the HTTP side."""
        return {"api_path": self.api_path, "_max_batch_size": 1, "_server": None, "_endpoints": []}

    @property
    def stream(self) -> bool:
        """LitServe then keeps every message of a call, instead of the last one."""
        return True

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Not used: routes and loop are our own."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Not used: routes and loop are our own."""
        return output

    def adopt(self, app: FastAPI) -> None:
        """Put our open routes, error bodies and the watch over the worker in place of LitServe's own."""
        replaced = {"/", "/health", "/info"}
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in replaced]
        app.title, app.version, app.description = "aurora-lit", "1", "Lossless speculative decoding, OpenAI's API."
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/ready", self.ready, methods=["GET"])
        install(app, on_error=self._metrics.refuse, asks_key=self._asks_key)
        litserve_lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with litserve_lifespan(app), self._flights.watch_worker():
                with self._flights.drain_on_sigterm(self._drain_s):
                    yield

        app.router.lifespan_context = lifespan

    async def health(self) -> JSONResponse:
        """Live: the engine worker is there and gives signs of life."""
        trouble = self._flights.trouble()
        return JSONResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)

    async def ready(self) -> JSONResponse:
        """Ready: the model is loaded and requests are taken."""
        trouble = self._flights.trouble()
        return JSONResponse({"status": trouble or "ready"}, status_code=503 if trouble else 200)

    async def models(self) -> JSONResponse:
        """The one model served."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def one_model(self, name: str) -> JSONResponse:
        """The same, asked for by name."""
        if name != self._model:
            raise RequestError(
                f"model={name!r} does not exist; this server has {self._model}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return JSONResponse(self._model_card())

    async def status(self) -> JSONResponse:
        """Everything that engine, ring and learner say of themselves."""
        report = engine_json(self._status.read(), self._ring())
        report["queue"] |= {
            "in_flight": self._flights.num_sequences,
            "calls": self._flights.num_calls,
            "max_queue": self._max_queue,
        }
        return JSONResponse(
            {"model": self._model, **report, "ranks": self._ranks(), "learner": learner_json(self._learner.read())}
        )

    async def prometheus(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "aurora-lit",
            "max_model_len": self._status.read().max_seq_len,
        }
