"""The HTTP process's side of a call: sends it to the engine worker, waits for its text, cancels it.

Updates become text when they arrive, not when the response wants them: a client that reads slowly must not delay the
end of a choice that has reached a stop string. Also notices when the worker dies: every waiting call then fails.

Leaves out how text is made (serve/http/answer_stream.py), how a response looks (serve/http/responses.py) and the routes
(serve/http/routes.py).

    with worker_client.places(num_prompts=1, num_choices=2):    # RequestError: 400 if there are too few, 429 if all are
        ...                                                     # taken; the call is prepared
    pending = worker_client.start(call, request, ...)   # RequestError: 429 if the queue is full, 503 if the worker died
    try:
        while not response.finished:
            response.add(await pending.next())          # RequestError if the call failed
    finally:
        pending.close()                                 # frees the slots of unfinished choices; may be called again

If a client disconnects, its call closes itself: a response may never have been started.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from fastapi import Request
from litserve.utils import ResponseBufferItem

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import HEARTBEAT_STALE_S, EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import CANCEL, Call, CallMessage, CallUpdate, CancelRequest, Failure
from aurora_lit.ipc.process_lifetime import call_when_process_ends
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.serve.http.answer_stream import DEFAULT_OPTIONS, AnswerOptions, AnswerStream, TextDelta
from aurora_lit.serve.http.channel import RESPONSES_UID

_CHECK_HEARTBEAT_S = 1.0
_WORKER_DEAD = Failure(message="the engine worker died; the server must be restarted", code="engine_dead", status=503)
_SHUTTING_DOWN = Failure(message="the server is shutting down", code="shutting_down", status=503)
_log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """Of requests with the same one, a newer replaces those whose answers have not begun."""

    address: str
    authorization: str
    id_slot: int
    first_line: str
    """Of what is before the hole: it stands for the file's name, which clients do not send."""


class ClientDisconnected(Exception):
    """The client closed its connection, so there is no one to respond to."""


class WorkerClient:
    """All calls that wait for the engine worker, and whether the worker can serve."""

    def __init__(self, *, status: EngineStatusPage, max_queue: int, tokenizer: Tokenizer) -> None:
        """`connect` must follow before the first call."""
        self._status, self._max_queue, self._tokenizer = status, max_queue, tokenizer
        self._spec: Any = None
        self._pending_calls: dict[str, PendingCall] = {}
        self._disconnect_watchers: set[asyncio.Task[None]] = set()
        self._worker_has_ended = False
        self._suspended_until_s = -HEARTBEAT_STALE_S
        self.num_sequences = 0
        """Unfinished choices of all pending calls, waiting or running; at most server.max_queue."""
        self._num_preparing = 0
        """Choices of calls that are being prepared."""

    def connect(self, spec: Any) -> None:
        """Use the response buffer and the request queue (an HTTPChannel) that the spec has once LitServe starts."""
        self._spec = spec

    @property
    def num_calls(self) -> int:
        """Calls that wait for updates."""
        return len(self._pending_calls)

    def unavailable_reason(self) -> str | None:
        """Why the worker cannot serve; None while it can."""
        status = self._status.read()
        if self._worker_has_ended and status.state is not WorkerState.FAILED:  # a failed one left its reason
            return "the engine worker has ended"
        if status.state is not WorkerState.READY:
            return f"the engine worker is {status.state.name.lower()}: {status.error}".rstrip(": ")
        # If this process was suspended (with the whole machine), so was the worker: count from when it resumed.
        awake_s = time.monotonic() - self._suspended_until_s
        if min(status.heartbeat_age_s, awake_s) > HEARTBEAT_STALE_S:
            return f"the engine worker gave no sign of life for {status.heartbeat_age_s:.0f} s"
        return None

    @contextlib.asynccontextmanager
    async def watch_worker(self) -> AsyncIterator[None]:
        """Inside the context, every pending call fails when the worker ends or its heartbeat stops."""

        def on_worker_end() -> None:
            self._worker_has_ended = True
            self._fail_all(_WORKER_DEAD)

        async def check_heartbeat() -> None:
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(_CHECK_HEARTBEAT_S)
                if time.monotonic() - before_s > _CHECK_HEARTBEAT_S + HEARTBEAT_STALE_S / 2:
                    self._suspended_until_s = time.monotonic()
                if (reason := self.unavailable_reason()) is not None:
                    self._fail_all(Failure(message=f"cannot serve: {reason}", code="engine_dead", status=503))

        stop_watching = call_when_process_ends(self._status.read().worker_pid, on_worker_end)
        heartbeat_check = asyncio.create_task(check_heartbeat())
        try:
            yield
        finally:
            heartbeat_check.cancel()
            stop_watching()

    @contextlib.contextmanager
    def places(self, *, num_prompts: int, num_choices: int, choices_field: str = "n") -> Iterator[None]:
        """Hold a call's places in the queue while it is prepared. RequestError if it does not fit in, now or ever.

        num_choices: of each prompt. choices_field: of the body. `start` takes the places itself: call it before
        anything else can.
        """
        total = num_prompts * num_choices
        if total > self._max_queue:
            field = "prompt" if num_prompts > 1 else choices_field
            raise RequestError(
                f"{field}: the request asks for {total} choices, of all prompts together, and server.max_queue is "
                f"{self._max_queue}; ask for fewer",
                param=field,
            )
        self._check_room(total)
        self._num_preparing += total
        try:
            yield
        finally:
            self._num_preparing -= total

    def _check_room(self, num_choices: int) -> None:
        taken = self.num_sequences + self._num_preparing
        if taken + num_choices > self._max_queue:
            raise RequestError(
                f"the queue is full: {taken} choices wait or run and server.max_queue is "
                f"{self._max_queue}; try again later",
                code="queue_full",
                status=429,
            )

    def start(
        self,
        call: Call,
        request: Request,
        options: AnswerOptions = DEFAULT_OPTIONS,
        *,
        on_close: Callable[[bool], None],
        slot: Slot | None = None,
    ) -> PendingCall:
        """Send a call to the worker. `on_close` runs once at its end, with True if the call failed.

        Raises RequestError if the worker is dead or the queue is full.
        """
        reason = self.unavailable_reason()
        if reason is not None:
            raise RequestError(f"cannot serve: {reason}", code="engine_dead", status=503)
        self._check_room(len(call.requests))
        answer = AnswerStream(self._tokenizer, call.requests, options)
        pending = PendingCall(self, self._spec, call, answer, on_close)
        pending.slot = slot
        pending.watcher = asyncio.create_task(pending.close_when_client_disconnects(request))
        self._disconnect_watchers.add(pending.watcher)
        pending.watcher.add_done_callback(self._disconnect_watchers.discard)
        return pending

    @contextlib.contextmanager
    def drain_on_sigterm(self, drain_s: float, *, on_begin: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Inside the context: on SIGTERM `on_begin` is called, and `drain_s` seconds after it, running calls fail.

        The rest of shutdown is uvicorn's.

        SIGINT is ignored: Ctrl-C also reaches the main process, which sends SIGTERM, and uvicorn would take both
        together as a request to end at once.
        """
        loop = asyncio.get_running_loop()
        uvicorn_handler = signal.getsignal(signal.SIGTERM)

        def begin_draining(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(on_begin)
            loop.call_soon_threadsafe(loop.call_later, drain_s, self._fail_all, _SHUTTING_DOWN)
            if callable(uvicorn_handler):
                uvicorn_handler(number, frame)

        signal.signal(signal.SIGTERM, begin_draining)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, uvicorn_handler)

    def add_pending(self, call_id: str, pending: PendingCall) -> None:
        """Deliver a call's updates to `pending` from now on."""
        # LitServe files all messages of the worker under one uid.
        if RESPONSES_UID not in self._spec.response_buffer:
            router = _ResponseRouter(self._pending_calls)
            self._spec.response_buffer[RESPONSES_UID] = ResponseBufferItem(event=asyncio.Event(), response_queue=router)
        self._pending_calls[call_id] = pending

    def remove_pending(self, call_id: str) -> None:
        """Drop further updates of a call."""
        self._pending_calls.pop(call_id, None)

    def replace(self, slot: Slot) -> None:
        """End the calls of a slot whose answers have not begun; what was read of their prompts stays known."""
        for pending in list(self._pending_calls.values()):
            if pending.slot == slot and not pending.has_begun:
                message = "a newer request with the same id_slot has taken this one's place"
                pending.end(RequestError(message, param="id_slot", code="replaced", status=409))

    def _fail_all(self, failure: Failure) -> None:
        for pending in self._pending_calls.values():
            pending.deliver(failure, from_worker=False)


class _ResponseRouter(deque[Any]):
    """The queue of LitServe's response buffer: delivers each update to its call in place of storing it."""

    def __init__(self, pending_calls: Mapping[str, PendingCall]) -> None:
        super().__init__()
        self._pending_calls = pending_calls

    def append(self, response: Any) -> None:
        """response: (updates, status); or a `Failure` in place of the updates, which is for every call."""
        updates, _ = response
        if isinstance(updates, Failure):
            for pending in self._pending_calls.values():
                pending.deliver(updates, from_worker=False)
            return
        for call_id, update in updates:
            pending_call = self._pending_calls.get(call_id)
            if pending_call is not None:  # None: the call has ended
                pending_call.deliver(update, from_worker=True)


class PendingCall:
    """One call that was sent; see the file's example."""

    def __init__(
        self,
        worker_client: WorkerClient,
        spec: Any,
        call: Call,
        answer: AnswerStream,
        on_close: Callable[[bool], None],
    ) -> None:
        """Use `WorkerClient.start`."""
        self._worker_client, self._spec, self._call, self._on_close = worker_client, spec, call, on_close
        self._answer, self._context = answer, contextvars.copy_context()
        self._num_unfinished = len(call.requests)
        """Requests that the worker still works on, as far as is known."""
        self._client_disconnected = self._has_failed = False
        self._updates: deque[tuple[float, tuple[TextDelta, ...] | RequestError]] = deque()
        """Each after time.monotonic() when it arrived."""
        self.arrived_s = 0.0
        """When what `next` returned last had arrived; a client that reads slowly takes it later."""
        self._has_news, self._closed = asyncio.Event(), asyncio.Event()
        self.slot: Slot | None = None
        self.has_begun = False
        """True after its first update."""
        self.watcher: asyncio.Task[None] | None = None
        """Closes the call when the client disconnects."""
        worker_client.add_pending(call.call_id, self)
        worker_client.num_sequences += self._num_unfinished
        try:
            self._spec.request_queue.put((call.call_id, call))
        except BaseException:
            self._end(self._num_unfinished)  # never sent, so there is nothing to cancel
            self._has_failed = True
            self.close()
            raise

    def deliver(self, update: CallUpdate, *, from_worker: bool) -> None:
        """Make text of an update and wake `next`; tell the worker of choices that have reached a stop string."""
        if isinstance(update, Failure):
            if from_worker:  # otherwise the worker may still work on the call, so it must be cancelled
                self._end(self._num_unfinished)
            self._add(RequestError(update.message, param=update.param, code=update.code, status=update.status))
            return
        try:
            deltas, stopped = self._answer.add(update)
        except RequestError as error:
            self._add(error)
            return
        except Exception as error:  # raised from here, it would make LitServe stop to deliver responses at all
            self._context.run(_log.exception, "call %s failed", self._call.call_id)
            self._add(RequestError(f"the request failed: {error}", code="engine_error", status=500))
            return
        for index in stopped:
            self._cancel((self._call.call_id, CancelRequest(index)))
        self._end(sum(delta.finish_reason is not None for delta in deltas))
        if deltas:
            self._add(deltas)

    def _end(self, num_choices: int) -> None:
        """Give up the places of choices in the queue when they end, and not when the client has read them."""
        self._num_unfinished -= num_choices
        self._worker_client.num_sequences -= num_choices

    def _add(self, update: tuple[TextDelta, ...] | RequestError) -> None:
        self.has_begun = True
        self._updates.append((time.monotonic(), update))
        self._has_news.set()

    def end(self, error: RequestError) -> None:
        """Give up the call: `next` raises the error, and the worker drops its requests."""
        self._worker_client.remove_pending(self._call.call_id)
        self._cancel((self._call.call_id, CANCEL))
        self._end(self._num_unfinished)
        self._add(error)

    async def arrives_within(self, seconds: float) -> bool:
        """Wait so long for the next update; True once `next` need not wait, for the client may have left too."""
        if not (self._updates or self._client_disconnected):
            self._has_news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_news.wait(), seconds)
        return bool(self._updates) or self._client_disconnected

    async def next(self) -> tuple[TextDelta, ...]:
        """The next round's deltas. Raises RequestError if the call failed, ClientDisconnected if the client left."""
        while not self._updates:
            if self._client_disconnected:
                raise ClientDisconnected
            self._has_news.clear()
            await self._has_news.wait()
        self.arrived_s, update = self._updates.popleft()
        if isinstance(update, RequestError):
            self._has_failed = True
            raise update
        return update

    async def wait(self, seconds: float) -> None:
        """Let updates arrive for some time; it ends at once if the client disconnects."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    def take_ready(self) -> tuple[TextDelta, ...]:
        """The deltas of all rounds that have arrived and were not taken; a failure after them is left to `next`."""
        ready: tuple[TextDelta, ...] = ()
        while self._updates and not isinstance(deltas := self._updates[0][1], RequestError):
            ready += deltas
            self._updates.popleft()
        return ready

    def close(self) -> None:
        """Free what the call holds: updates, and of unfinished choices places in the queue and slots in the engine."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._updates.clear()
        # It waits for the end of the connection, which a client that does not read may keep for ever.
        if self.watcher is not None and self.watcher is not asyncio.current_task():
            self.watcher.cancel()
        self._worker_client.remove_pending(self._call.call_id)
        self._worker_client.num_sequences -= self._num_unfinished
        if self._num_unfinished:
            self._cancel((self._call.call_id, CANCEL))
        self._on_close(self._has_failed)

    async def close_when_client_disconnects(self, request: Request) -> None:
        """Wait for the end of the connection or of the response, whichever comes first, and close."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._client_disconnected = True
        self._has_news.set()
        self.close()

    def _cancel(self, message: CallMessage) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the server is shutting down, and the engine with it
            self._spec.request_queue.put(message)
