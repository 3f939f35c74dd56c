"""The HTTP process's side of a call: send it, wait for its rounds, cancel it, and notice that the worker died.

Leaves out what the answer looks like (serve/http/responses.py) and the routes (serve/http/routes.py).

    flight = flights.start(call, request, ...)    # RequestError 429 when the queue is full, 503 when the worker is dead
    try:
        while not answer.finished:
            answer.take(await flight.next())      # RequestError when the call failed
    finally:
        flight.close()                            # frees the slot if the call has not ended; may be called again

A client that goes away closes its flight from within: the response may never have been started.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from fastapi import Request
from litserve.utils import ResponseBufferItem

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import StatusBlock, WorkerState
from aurora_lit.ipc.messages import CANCEL, EVERY_CALL, Call, Content, Delta, Failure
from aurora_lit.ipc.process_lifetime import call_when_process_ends

HEARTBEAT_STALE_S = 10.0
_CHECK_HEARTBEAT_S = 1.0
_DEAD = Failure(message="the engine worker died; the server must be restarted", code="engine_dead", status=503)
_DRAINED = Failure(message="the server is shutting down", code="shutting_down", status=503)


class ClientGone(Exception):
    """The client closed its connection: nobody is left to answer."""


class WorkerClient:
    """All calls that the HTTP process waits for, and whether the worker lives."""

    def __init__(self, *, status: StatusBlock, max_queue: int) -> None:
        """`connect` must follow, once LitServe has made its queues."""
        self._status, self._max_queue = status, max_queue
        self._spec: Any = None
        self._boxes: dict[str, _Box] = {}  # of the calls in flight
        self._watchers: set[asyncio.Task[None]] = set()
        self._process_ended = False
        self._held_up_until_s = -HEARTBEAT_STALE_S
        self.num_sequences = 0
        """Choices in flight, waiting and running; at most server.max_queue."""

    def connect(self, spec: Any) -> None:
        """Use the response buffer and the request queue that LitServe gave to the spec."""
        self._spec = spec

    @property
    def num_calls(self) -> int:
        """Calls that wait for messages."""
        return len(self._boxes)

    def trouble(self) -> str | None:
        """Why the worker cannot serve; None while it can."""
        now = self._status.read()
        if self._process_ended:
            return "the engine worker has ended"
        if now.state is not WorkerState.READY:
            return f"the engine worker is {now.state.name.lower()}: {now.error}".rstrip(": ")
        # Where we were held up ourselves (a suspended machine), so was the worker: it gets as long again.
        awake_s = time.monotonic() - self._held_up_until_s
        if min(now.heartbeat_age_s, awake_s) > HEARTBEAT_STALE_S:
            return f"the engine worker gave no sign of life for {now.heartbeat_age_s:.0f} s"
        return None

    @contextlib.asynccontextmanager
    async def watch_worker(self) -> AsyncIterator[None]:
        """While inside: when the worker ends or falls silent, every waiting call gets an error."""

        def ended() -> None:
            self._process_ended = True
            self._fail_all(_DEAD)

        async def check_heartbeat() -> None:
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(_CHECK_HEARTBEAT_S)
                if time.monotonic() - before_s > _CHECK_HEARTBEAT_S + HEARTBEAT_STALE_S / 2:
                    self._held_up_until_s = time.monotonic()
                if self.trouble() is not None:
                    self._fail_all(_DEAD)

        stop = call_when_process_ends(self._status.read().worker_pid, ended)
        checking = asyncio.create_task(check_heartbeat())
        try:
            yield
        finally:
            checking.cancel()
            stop()

    def start(self, call: Call, request: Request, *, on_close: Callable[[bool], None]) -> PendingCall:
        """Send a call to the worker; `on_close` runs once at its end and is told whether the call failed."""
        trouble = self.trouble()
        if trouble is not None:
            raise RequestError(f"cannot serve: {trouble}", code="engine_dead", status=503)
        wanted = len(call.requests)
        if wanted > self._max_queue:
            raise RequestError(
                f"n: the request asks for {wanted} choices and server.max_queue is {self._max_queue}; ask for fewer",
                param="n",
            )
        if self.num_sequences + wanted > self._max_queue:
            raise RequestError(
                f"the queue is full: {self.num_sequences} choices wait or run and server.max_queue is "
                f"{self._max_queue}; try again later",
                code="queue_full",
                status=429,
            )
        flight = PendingCall(self, self._spec, call, on_close)
        watcher = asyncio.create_task(flight.close_when_client_leaves(request))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return flight

    @contextlib.contextmanager
    def drain_on_sigterm(self, drain_s: float) -> Iterator[None]:
        """While inside: drain_s after SIGTERM, calls that still run get an error; uvicorn does the rest.

        SIGINT is ignored: Ctrl-C reaches the main process too, which sends SIGTERM; uvicorn takes both for impatience.
        """
        loop = asyncio.get_running_loop()
        uvicorn_handler = signal.getsignal(signal.SIGTERM)

        def begin(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(loop.call_later, drain_s, self._fail_all, _DRAINED)
            if callable(uvicorn_handler):
                uvicorn_handler(number, frame)

        signal.signal(signal.SIGTERM, begin)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, uvicorn_handler)

    def open_box(self, call_id: str) -> _Box:
        """Where a call's messages will lie. LitServe puts all that the worker sends into one entry of its buffer."""
        if EVERY_CALL not in self._spec.response_buffer:
            entry = ResponseBufferItem(event=asyncio.Event(), response_queue=_ResponseRouter(self._boxes))
            self._spec.response_buffer[EVERY_CALL] = entry
        self._boxes[call_id] = box = _Box()
        return box

    def close_box(self, call_id: str) -> None:
        """Nobody reads it any more."""
        self._boxes.pop(call_id, None)

    def _fail_all(self, why: Failure) -> None:
        for box in self._boxes.values():
            box.put(why, from_worker=False)


class _Box:
    """One call's messages that nobody has read yet."""

    def __init__(self) -> None:
        self.messages: deque[tuple[Content, bool]] = deque()
        self.event = asyncio.Event()

    def put(self, content: Content, *, from_worker: bool) -> None:
        """Wake the reader."""
        self.messages.append((content, from_worker))
        self.event.set()


class _ResponseRouter(deque[Any]):
    """Stands where LitServe appends (content, status): hands on to each call what is its own."""

    def __init__(self, boxes: Mapping[str, _Box]) -> None:
        super().__init__()
        self._boxes = boxes

    def append(self, response: Any) -> None:
        """For calls that have ended there is no box."""
        for call_id, content in response[0]:
            if (box := self._boxes.get(call_id)) is not None:
                box.put(content, from_worker=True)


class PendingCall:
    """One call on its way; see the file's example."""

    def __init__(self, flights: WorkerClient, spec: Any, call: Call, on_close: Callable[[bool], None]) -> None:
        """Use `WorkerClient.start`."""
        self._flights, self._spec, self._call, self._on_close = flights, spec, call, on_close
        self._unfinished = len(call.requests)
        self._closed = self._client_left = self._failed = False
        self._box = flights.open_box(call.call_id)
        flights.num_sequences += self._unfinished
        try:
            self._put(call)
        except BaseException:
            self._unfinished, self._failed = 0, True  # nothing to cancel: it never left
            self.close()
            raise

    async def next(self) -> tuple[Delta, ...]:
        """The next round's deltas; RequestError when the call failed, ClientGone when nobody listens."""
        while not self._box.messages:
            if self._client_left:
                raise ClientGone
            self._box.event.clear()
            await self._box.event.wait()
        content, from_worker = self._box.messages.popleft()
        if isinstance(content, Failure):
            self._failed = True
            if from_worker:  # where it is our own word, the worker may still be at work
                self._unfinished = 0
            raise RequestError(content.message, param=content.param, code=content.code, status=content.status)
        self._unfinished -= sum(delta.finish_reason is not None for delta in content)
        return content

    def close(self) -> None:
        """Leave nothing behind: no buffer entry, no place in the queue, no slot in the engine."""
        if self._closed:
            return
        self._closed = True
        self._flights.close_box(self._call.call_id)
        self._flights.num_sequences -= len(self._call.requests)
        if self._unfinished:
            with contextlib.suppress(EOFError, OSError):  # the server is going down: so is the engine
                self._put(CANCEL)
        self._on_close(self._failed)

    async def close_when_client_leaves(self, request: Request) -> None:
        """Wait for the end of the connection or of the response, whichever comes first."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._client_left = True
        self._box.event.set()
        self.close()

    def _put(self, content: Any) -> None:
        self._spec.request_queue.put((self._spec.response_queue_id, self._call.call_id, time.monotonic(), content))
