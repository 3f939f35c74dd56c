"""Our one LitAPI and our one LitSpec: every route, who may call it, and the engine worker's setup.

The spec lives in the HTTP process, the API's `setup` runs in the worker. Leaves out what a generation request does
(serve/routes.py) and the processes (serve/server.py).

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
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litserve import LitAPI
from litserve.specs.base import LitSpec
from transformers import PreTrainedTokenizerBase

from aurora_lit.config import AuroraConfig, model_name
from aurora_lit.errors import RequestError
from aurora_lit.ipc.lifetime import die_with_parent
from aurora_lit.ipc.status import StatusBlock, WorkerState
from aurora_lit.metrics import CONTENT_TYPE, ServerMetrics
from aurora_lit.serve.calls import EngineInterface
from aurora_lit.serve.errors_http import install
from aurora_lit.serve.in_flight import Flights
from aurora_lit.serve.loop import EngineLoop
from aurora_lit.serve.routes import Generation

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What is behind the HTTP side; importable functions, since they travel to the spawned worker."""

    prepare: Callable[[AuroraConfig], object]
    """Runs first, in the main process: fetch what is missing, so that its errors show before workers start."""
    build_engine: Callable[[AuroraConfig], tuple[Any, PreTrainedTokenizerBase]]
    """Runs in the worker: an EngineInterface and its tokenizer."""
    load_tokenizer: Callable[[AuroraConfig], PreTrainedTokenizerBase]
    """Runs for the HTTP process."""


class AuroraAPI(LitAPI):  # type: ignore[misc]
    """The worker's side: builds the engine; the loop does the rest."""

    engine: EngineInterface
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, config: AuroraConfig, backend: Backend, status_path: Path, spec: AuroraSpec) -> None:
        """Only plain data here: the object is pickled to the worker."""
        super().__init__(loop=EngineLoop(status_path), spec=spec)
        self._config, self._backend, self._status_path = config, backend, status_path
        self._server_pid = os.getpid()

    def setup(self, device: str) -> None:
        """Build the engine; a failure is left in the status block for the main process to show."""
        die_with_parent(self._server_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process drains first
        status = StatusBlock.open(self._status_path, writable=True)
        status.beat()
        status.write(worker_pid=os.getpid())
        try:
            self.engine, self.tokenizer = self._backend.build_engine(self._config)
        except Exception as error:
            status.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
            raise
        status.write(
            max_seq_len=self.engine.max_seq_len, vocab_size=self.engine.vocab_size,
            max_draft_tokens=self._config.engine.max_draft_tokens, draft_version=self.engine.draft_version,
        )  # fmt: skip

    def authorize(self, credentials: Credentials) -> None:
        """Ask for `Authorization: Bearer KEY` when server.api_key is set."""
        key = self._config.server.api_key
        given = "" if credentials is None else credentials.credentials
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise RequestError("the API key is missing or wrong; send Authorization: Bearer KEY", status=401,
                               code="invalid_api_key")  # fmt: skip


class AuroraSpec(LitSpec):  # type: ignore[misc]
    """The HTTP side: routes and what they share."""

    def __init__(self, config: AuroraConfig, backend: Backend, status_path: Path) -> None:
        """Make the parts and register the routes that ask for a key."""
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self._model, self._max_queue = model_name(config), config.server.max_queue
        self._created, self._drain_s = int(time.time()), config.server.drain_s
        self._status = StatusBlock.open(status_path)
        self._metrics = ServerMetrics(model=self._model, status=self._status)
        self._flights = Flights(status=self._status, max_queue=config.server.max_queue)
        self._flights.connect(self)
        generation = Generation(
            model=self._model, tokenizer=backend.load_tokenizer(config), flights=self._flights, metrics=self._metrics,
            status=self._status,
        )  # fmt: skip
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
        install(app, on_error=self._metrics.refuse)
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
            raise RequestError(f"model={name!r} does not exist; this server has {self._model}", param="model",
                               code="model_not_found", status=404)  # fmt: skip
        return JSONResponse(self._model_card())

    async def status(self) -> JSONResponse:
        """Everything that the status block knows."""
        now = self._status.read()
        return JSONResponse({
            "model": self._model,
            "worker": {
                "state": now.state.name.lower(), "pid": now.worker_pid, "error": now.error or None,
                "heartbeat_age_s": round(now.heartbeat_age_s, 3),
                "uptime_s": round((time.monotonic_ns() - now.started_ns) / 1e9, 3) if now.started_ns else None,
            },
            "queue": {
                "running": now.running, "waiting": now.waiting, "in_flight": self._flights.num_sequences,
                "calls": self._flights.num_calls, "max_queue": self._max_queue,
            },
            "limits": {"max_seq_len": now.max_seq_len, "vocab_size": now.vocab_size},
            "tokens": {"prompt": now.prompt_tokens, "generated": now.generated_tokens},
            "speculation": {
                "draft_version": now.draft_version or None, "max_draft_tokens": now.max_draft_tokens,
                "rounds": now.rounds, "drafts": now.drafts, "proposed": now.proposed, "accepted": now.accepted,
                "accepted_by_position": now.accepted_by_position, "acceptance_rate": now.acceptance_rate,
                "mean_accepted_length": now.mean_accepted_length,
            },
        })  # fmt: skip

    async def prometheus(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    def _model_card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "aurora-lit",
                "max_model_len": self._status.read().max_seq_len}  # fmt: skip
