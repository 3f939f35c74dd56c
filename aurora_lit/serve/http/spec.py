"""The HTTP application: registers every route, answers the GET routes, and watches the engine worker.

Leaves out what a generation request does (serve/http/routes.py), who may call a route (serve/api.py) and the processes
(serve/server.py).

    POST /v1/chat/completions  /v1/completions  /v1/fim/completions  /infill  /tokenize  /detokenize
    GET /v1/models  /v1/models/NAME  /props  /v1/aurora/status  /metrics
    GET /v1/aurora/events                            with server.page (serve/http/live_page.py)
    GET /health  /ready                              open: these two need no API key, and neither do the page's files
    GET /docs  /redoc  /openapi.json                 open as well: FastAPI's, which describe the routes
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from litserve.specs.base import LitSpec

from aurora_lit.config import AuroraConfig, model_name, resolved_memory, shows_page, versions_folder
from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.machine import keep_giving_back_freed_memory
from aurora_lit.models.sampling_defaults import default_sampling
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.request import SamplingParams
from aurora_lit.serve.http.errors import install_error_handlers
from aurora_lit.serve.http.live_page import FILES, LivePage
from aurora_lit.serve.http.metrics import CONTENT_TYPE, ServerMetrics
from aurora_lit.serve.http.routes import ClientPseudonyms, GenerationRoutes
from aurora_lit.serve.http.savings import NAME as SAVINGS_NAME
from aurora_lit.serve.http.savings import Savings
from aurora_lit.serve.http.status import engine_json, learner_json, ranks_json, ring_counters, traffic_json
from aurora_lit.serve.http.stream_events import StreamShape
from aurora_lit.serve.http.token_routes import TokenRoutes
from aurora_lit.serve.http.worker_client import WorkerClient
from aurora_lit.serve.speculation.sources.kept_answers import client_key
from aurora_lit.settings import SAMPLING_RANGES

OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", *FILES})
"""Every other path needs the API key, one without a route too."""


class AuroraSpec(LitSpec):  # type: ignore[misc]
    """Our LitSpec: all routes and the objects that they share."""

    def __init__(self, config: AuroraConfig, tokenizer: Tokenizer, run_folder: Path) -> None:
        """Create the shared objects and register the routes that need the API key."""
        super().__init__()
        self.api_path = "/v1/chat/completions"
        self._model, self._max_queue = model_name(config), config.server.max_queue
        self._created, self._drain_s = int(time.time()), config.server.drain_s
        self._num_slots, self._source = config.engine.max_batch_size, config.target.source
        self._chat_template = str(tokenizer.chat_template or "")
        self._needs_key = config.server.api_key is not None
        self._status_page = EngineStatusPage.open(run_folder / STATUS_NAME)
        self._learner_page = LearnerStatusPage.open(run_folder / LEARNER_STATUS_NAME)
        self._ring_counters = partial(ring_counters, run_folder)
        self._ranks_json = partial(ranks_json, run_folder)
        self._metrics = ServerMetrics(
            model=self._model, status=self._status_page, learner=self._learner_page, ring=self._ring_counters
        )
        self._worker_client = WorkerClient(
            status=self._status_page, max_queue=config.server.max_queue, tokenizer=tokenizer
        )
        self._worker_client.connect(self)
        self._savings = Savings(
            versions_folder(config) / SAVINGS_NAME,
            saved_s=lambda: self._status_page.read().saved_s,
            price_per_hour=config.server.price_per_hour,
        )
        self._live_page = LivePage(self._report, self._metrics.latencies) if shows_page(config) else None
        defaults = default_sampling(config)
        params = SamplingParams(**defaults)
        self._default_sampling = {name: getattr(params, name) for name in SAMPLING_RANGES}
        generation = GenerationRoutes(
            model=self._model,
            tokenizer=tokenizer,
            worker_client=self._worker_client,
            metrics=self._metrics,
            status=self._status_page,
            stream_shape=StreamShape(
                interval_s=config.server.stream_interval_ms / 1000, padding_bytes=config.server.stream_padding
            ),
            default_sampling=defaults,
            pseudonyms=ClientPseudonyms(
                trust_user=config.server.trust_user, key=partial(client_key, resolved_memory(config))
            ),
        )
        self.add_endpoint("/v1/chat/completions", generation.chat, ["POST"])
        self.add_endpoint("/v1/completions", generation.complete, ["POST"])
        self.add_endpoint("/v1/fim/completions", generation.fill, ["POST"])
        self.add_endpoint("/infill", generation.infill, ["POST"])
        tokens = TokenRoutes(model=self._model, tokenizer=tokenizer, status=self._status_page)
        self.add_endpoint("/tokenize", tokens.tokenize, ["POST"])
        self.add_endpoint("/detokenize", tokens.detokenize, ["POST"])
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.one_model, ["GET"])
        self.add_endpoint("/props", self.props, ["GET"])
        self.add_endpoint("/v1/aurora/status", self.status, ["GET"])
        self.add_endpoint("/metrics", self.prometheus, ["GET"])

    @property
    def stream(self) -> bool:
        """True, so that LitServe keeps every message of a call and not only the last one."""
        return True

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Required by LitSpec and not called: routes and loop are our own."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Required by LitSpec and not called: routes and loop are our own."""
        return output

    def configure_app(self, app: FastAPI, *, authorize: Callable[..., None]) -> None:
        """Replace LitServe's open routes and error bodies with ours, and watch the worker while the app runs.

        authorize: checks the API key, for routes that are not the spec's endpoints.
        """
        replaced = {"/", "/health", "/info"}
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in replaced]
        app.title, app.version, app.description = "aurora-lit", "1", "Lossless speculative decoding, OpenAI's API."
        for path, answer in (("/health", self.health), ("/ready", self.ready)):
            app.add_api_route(path, answer, methods=["GET"])
            app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)  # some load balancers send it
        if self._live_page is not None:
            self._live_page.add_routes(app, authorize=authorize)
        install_error_handlers(app, on_error=self._metrics.refuse, needs_key=self._needs_key)
        litserve_lifespan = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            page, client = self._live_page, self._worker_client
            sampling = contextlib.nullcontext() if page is None else page.sampling()
            end_page = (lambda: None) if page is None else page.close
            keep_giving_back_freed_memory()
            async with litserve_lifespan(app), client.watch_worker(), self._savings.kept(), sampling:
                with client.drain_on_sigterm(self._drain_s, on_begin=end_page):
                    yield

        app.router.lifespan_context = lifespan

    async def health(self) -> JSONResponse:
        """Live: the engine worker runs and writes its heartbeat."""
        reason = self._worker_client.unavailable_reason()
        return JSONResponse({"status": reason or "ok"}, status_code=503 if reason else 200)

    async def ready(self) -> JSONResponse:
        """Ready: the model is loaded and requests are accepted."""
        reason = self._worker_client.unavailable_reason()
        return JSONResponse({"status": reason or "ready"}, status_code=503 if reason else 200)

    async def models(self) -> JSONResponse:
        """The list of models: the one that is served."""
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def one_model(self, name: str) -> JSONResponse:
        """One model by name."""
        if name != self._model:
            raise RequestError(
                f"model={name!r} does not exist; this server has {self._model}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return JSONResponse(self._model_card())

    async def props(self) -> JSONResponse:
        """What llama.cpp's clients ask of a server: its context, its slots and its chat template."""
        max_seq_len = self._status_page.read().max_seq_len
        settings = {"n_ctx": max_seq_len, "params": self._default_sampling}
        return JSONResponse(
            {
                "default_generation_settings": settings,
                "total_slots": self._num_slots,
                "model_alias": self._model,
                "model_path": self._source,
                "chat_template": self._chat_template,
                "modalities": {"vision": False, "audio": False},
                "build_info": "aurora-lit",
            }
        )

    async def status(self) -> JSONResponse:
        """The state of engine, ring, ranks and learner."""
        return JSONResponse(self._report())

    def _report(self) -> dict[str, Any]:
        report = engine_json(self._status_page.read(), self._ring_counters())
        report["queue"] |= {
            "in_flight": self._worker_client.num_sequences,
            "calls": self._worker_client.num_calls,
            "max_queue": self._max_queue,
        }
        return {
            "model": self._model,
            **report,
            "kinds": traffic_json(self._metrics.kinds),
            "savings": self._savings.report(),
            "ranks": self._ranks_json(),
            "learner": learner_json(self._learner_page.read()),
        }

    async def prometheus(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    def _model_card(self) -> dict[str, Any]:
        max_seq_len = self._status_page.read().max_seq_len
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "aurora-lit",
            "max_model_len": max_seq_len,
            "meta": {"n_ctx_train": max_seq_len},  # where llama.cpp's clients read how long a prompt may be
            "default_sampling_params": self._default_sampling,
        }
