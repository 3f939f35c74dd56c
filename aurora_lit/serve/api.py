"""Our LitServer and LitAPI: the HTTP process as LitServe runs it, on an engine that already starts; who may call it.

LitServe would start the engine's processes itself, one after its own start, and connect them by queues in a manager
process. Ours are started before LitServe is imported (engine_process.py) and have sockets, so the methods that do this
are replaced. Leaves out routes (serve/http/spec.py), and watching and ending the processes (server.py).
"""

from __future__ import annotations

import gc
import logging
import re
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litserve import LitAPI, LitServer
from litserve.loops import LitLoop
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from aurora_lit.config import AuroraConfig
from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.serve.http.bodies import BodyLimits, most_bytes
from aurora_lit.serve.http.body import shorten
from aurora_lit.serve.http.channel import HTTPChannel
from aurora_lit.serve.http.request_ids import RequestIds, name_request
from aurora_lit.serve.http.spec import OPEN_PATHS, AuroraSpec

_AFTER_DRAIN_S = 2.0  # for sending the error events to requests that drain_s has cut off
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]", "")
"""What the header Host may say, beside a port; "" if there is none."""
_bearer = HTTPBearer(auto_error=False)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


class AuroraAPI(LitAPI):  # type: ignore[misc]
    """The routes of `AuroraSpec`, guarded by server.api_key."""

    def __init__(self, config: AuroraConfig, spec: AuroraSpec) -> None:
        """spec: registers the routes."""
        super().__init__(spec=spec, loop=LitLoop())
        key = config.server.api_key
        self._key = None if key is None else _comparable(key.encode())
        self._only_local_names = key is None and config.server.host == "127.0.0.1"

    def setup(self, device: str) -> None:
        """Required by LitServe and not called; see serve/engine_process.py."""

    def authorize(self, credentials: Credentials) -> None:
        """Require `Authorization: Bearer KEY` if server.api_key is set. Raises RequestError."""
        given = "" if credentials is None else credentials.credentials
        # Headers arrive as Latin-1, whatever the client has written them in.
        if self._key is not None and not secrets.compare_digest(_comparable(given.encode("latin-1")), self._key):
            raise RequestError(
                "the API key is missing or wrong; send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )

    async def check(self, request: Request) -> None:
        """Check a request of any route by its path and headers. Raises RequestError.

        Without a key, a server on loopback answers under its local names only. A web page whose own name leads to
        127.0.0.1 could otherwise read what it answers (DNS rebinding).
        """
        host = request.headers.get("host", "")
        if self._only_local_names and re.sub(r":\d*$", "", host).lower() not in _LOCAL_NAMES:
            raise RequestError(
                f"the Host header is {shorten(host)}; send 127.0.0.1 or localhost, or set server.api_key",
                status=403,
                code="host_not_allowed",
            )
        if request.scope["path"] not in OPEN_PATHS:
            self.authorize(await _bearer(request))


class Guard:
    """Middleware that refuses requests by their headers: FastAPI calls `authorize` after it has read the body.

    >>> app.add_middleware(Guard, check=api.check, explain=error_response)
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        check: Callable[[Request], Awaitable[None]],
        explain: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        """check: raises RequestError. explain: the response to that error."""
        self._app, self._check, self._explain = app, check, explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or leave it to the routes."""
        if scope["type"] == "http":
            request = Request(scope)  # without `receive`, so that nothing reads the body
            try:
                await self._check(request)
            except RequestError as error:
                response = await self._explain(request, error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class AuroraServer(LitServer):  # type: ignore[misc]
    """LitServe's server over engine processes that were started before it."""

    def __init__(
        self,
        config: AuroraConfig,
        tokenizer: Tokenizer,
        run_folder: Path,
        *,
        workers: Sequence[BaseProcess],
        channel: HTTPChannel,
        status: EngineStatusPage,
    ) -> None:
        """workers: by rank. channel: to the first of them. status: its page."""
        spec = AuroraSpec(config, tokenizer, run_folder)
        # "cpu", so that LitServe looks for no GPU; each worker chooses its device itself.
        api = AuroraAPI(config, spec)
        super().__init__(api, accelerator="cpu", timeout=False)
        self.uvicorn_graceful_timeout = config.server.drain_s + _AFTER_DRAIN_S
        # LitServe would end the server at once when the worker dies; first /health and the clients must report it.
        self._monitor_workers = False
        self._channel, self._status = channel, status
        self.inference_workers = list(workers)
        self.http_processes: tuple[BaseProcess, ...] = ()
        """Empty until the engine is ready."""
        spec.configure_app(self.app, authorize=api.authorize)
        explain: Any = self.app.exception_handlers[RequestError]
        self.app.add_middleware(BodyLimits, most=most_bytes(config), explain=explain)
        self.app.add_middleware(Guard, check=api.check, explain=explain)
        self.app.add_middleware(RequestIds)  # around the guard, whose errors have one too
        for handler in logging.getLogger().handlers:
            handler.addFilter(name_request)

    def _init_manager(self, num_api_servers: int) -> Any:
        """In place of a process that holds queues: the sockets, and nothing to shut down."""
        assert num_api_servers == 1
        self.workers_setup_status: dict[str, Any] = {}
        self._shutdown_event = threading.Event()
        self._transport = self._channel
        for api in self.litapi_connector:
            self.litapi_request_queues[api.api_path] = self._channel
        return _NoManager()

    def launch_inference_worker(self, lit_api: LitAPI) -> list[BaseProcess]:
        """Connect the routes to the engine worker, which has been started."""
        lit_api.spec.setup(self)
        return self.inference_workers

    def verify_worker_status(self) -> None:
        """Wait until the engine is ready. Raises RuntimeError if it cannot be built."""
        gc.freeze()  # so that collections in the HTTP process do not copy the pages that it shares with this one
        while (state := self._status.read().state) is not WorkerState.READY:
            if state is WorkerState.FAILED:
                raise RuntimeError("the engine could not be built")
            if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
                raise KeyboardInterrupt  # the handler has raised it where Python drops it, as in a finalizer
            time.sleep(0.01)

    def _perform_graceful_shutdown(self, *args: Any, **options: Any) -> None:
        """End the HTTP process, not the engine's: those end when the channel is closed (serve/server.py)."""
        self.inference_workers = []
        super()._perform_graceful_shutdown(*args, **options)

    def _start_server(self, *args: Any, **options: Any) -> Any:
        """Remember the HTTP processes, to be watched: LitServe would wait for ever for one that was killed."""
        processes = super()._start_server(*args, **options)
        self.http_processes = tuple(processes.values())
        return processes


class _NoManager:
    """What LitServe shuts down at its end, as it would its manager."""

    def shutdown(self) -> None:
        """Nothing to do."""


def _comparable(key: bytes) -> bytes:
    """Without what is white space in Latin-1, as the last byte of a letter in UTF-8 may be: some FastAPIs strip it."""
    return key.rstrip(b"\x85\xa0")
