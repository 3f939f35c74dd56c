"""The engine worker's loop: takes calls from the HTTP process, runs engine rounds, sends back tokens.

One thread owns the engine and waits for nothing but calls. Others wait for it: one for requests, one for an HTTP
process that does not read (serve/worker/outbox.py), one writes the heartbeat, and one loads new drafts
(drafts/hot_reload.py). Leaves out the HTTP side (serve/http/worker_client.py), tracking calls
(serve/worker/call_tracker.py), a round (serve/engine/engine.py) and which draft serves (serve/worker/live_draft.py).

    each iteration:  inbox → add, cancel   swap draft   engine.round()   one message to HTTP   counters → status page

Between two rounds a processor's caches hold weights and little else, so whatever runs there is read from memory first.
What rounds bring is therefore not told after every one, but every 10 ms at most, and at once where a request begins or
ends; drafts are swapped then, and counters are written ten times a second.

If one request fails, its call ends with an error. If the engine fails, all calls end with an error, the status page
says so, and the process ends. If an iteration hangs, the heartbeat stops: the server's health check fails and clients
get an error, until the iteration ends. If the HTTP process hangs, rounds go on; see the outbox. SIGTERM is ignored: a
service manager sends it to all processes at once, and the HTTP process may still send what it has accepted. The loop
ends when the other end of the channel is closed, which the main process does once the HTTP process has drained.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import (
    CANCEL,
    CallMessage,
    CancelRequest,
    Failure,
    RoundUpdates,
    UnreadableError,
    WorkerChannel,
)
from aurora_lit.request import Output
from aurora_lit.serve.worker.call_tracker import CallTracker
from aurora_lit.serve.worker.outbox import Outbox
from aurora_lit.serve.worker.parts import WorkerParts
from aurora_lit.serve.worker.status_report import StatusReport

if TYPE_CHECKING:
    from aurora_lit.serve.worker.live_draft import LiveDraft

    Inbox = queue.SimpleQueue[CallMessage | tuple[str, Failure] | str | None]

_TELL_EVERY_S = 0.01
"""How often clients are told of new tokens, at most; nobody reads a hundred messages a second."""
_REPORT_EVERY_S = 0.1
"""How often counters are written, beside whenever a request ends."""
HEARTBEAT_S = 0.25
HANG_TIMEOUT_S = 120.0
"""An iteration of the loop that takes longer counts as hanging. Compiling a shape (engine.compile) takes a minute."""
_log = logging.getLogger(__name__)


_END: Final = "the HTTP process has ended, so the server has too"
"""In the inbox: nobody is left to be answered, so only what is pending is written."""


class EngineLoop:
    """Runs in the worker process (serve/engine_process.py)."""

    def __init__(self, channel: WorkerChannel, page: EngineStatusPage) -> None:
        """page: the engine worker's status page, writable."""
        self._channel, self._page = channel, page

    def run(self, parts: WorkerParts, live: LiveDraft | None) -> None:
        """Serve until the channel is closed (exit code 0), or until the engine fails (exception, exit code 1).

        live: the draft that is swapped; None: the engine has no draft.
        """
        engine, page = parts.engine, self._page
        calls, outbox = CallTracker(engine), Outbox(self._channel)
        inbox: Inbox = queue.SimpleQueue()
        threading.Thread(target=self._read_calls, args=(inbox,), daemon=True).start()
        heartbeat = _Heartbeat(page)
        threading.Thread(target=heartbeat.run, daemon=True).start()
        if live is not None:
            live.start(on_change=lambda: inbox.put(None))
        report = StatusReport(parts, calls, live, page)
        report.write(state=WorkerState.READY, started_ns=time.monotonic_ns())
        untold, report_s = _Untold(), 0.0

        def tell(now_s: float) -> bool:
            """Tell clients and the draft's watch what rounds have brought; True if a request has ended."""
            outputs = untold.take(now_s)
            report.domains.add(outputs)
            updates, kinds = calls.advance(outputs)
            if live is not None:
                live.after_round(outputs, kinds)
            # A message costs both processes more than its content, so there is one for all calls.
            if updates:
                self._send(updates, calls, outbox)
            return any(output.finish_reason is not None for output in outputs)

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            while True:
                heartbeat.set_idle()
                while inbox.empty() and not engine.has_work and parts.idle_work():
                    pass
                was_idle = not engine.has_work
                self._process_inbox(inbox, calls, outbox, wait=was_idle)
                if not engine.has_work:  # what is left untold is of requests that were cancelled
                    tell(time.perf_counter())
                elif was_idle:  # told before the round, since a learner gives way
                    page.write(running=engine.num_waiting)
                heartbeat.set_busy()
                started, swaps = time.perf_counter(), 0 if live is None else live.num_swaps
                if live is not None and not untold.outputs:  # these are judged as the present draft's
                    live.before_round()
                parts.before_round()
                outputs = engine.round()
                has_computed = bool(outputs or engine.num_running)  # not where all wait for their grammars
                now = time.perf_counter()
                swapped = live is not None and live.num_swaps > swaps
                if has_computed or swapped:
                    report.round_times.add(now - started, swapped=swapped)
                has_ended = untold.add(outputs, now) and tell(now)
                if has_ended or swapped or not engine.has_work or now >= report_s:
                    report.write()
                    report_s = now + _REPORT_EVERY_S
        except Exception as error:
            _log.exception("the engine failed")
            page.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
            failure = Failure(message="the engine failed; the server must be restarted", code="engine_dead")
            with contextlib.suppress(OSError):  # the HTTP process has ended
                outbox.put(tuple((call_id, failure) for call_id in calls.active_calls()))
            raise
        finally:
            parts.close()  # first: it writes recorded traces, and a draft that is being loaded may take long
            if live is not None:
                live.close()
            outbox.close()

    def _send(self, updates: RoundUpdates, calls: CallTracker, outbox: Outbox) -> None:
        """Send updates; calls whose updates the outbox refuses are removed."""
        try:
            refused = outbox.put(updates)
        except OSError:  # the HTTP process has ended
            sys.exit(0)
        for call_id in refused:
            calls.cancel(call_id)

    def _read_calls(self, inbox: Inbox) -> None:
        while True:
            try:
                inbox.put(self._channel.receive())
            except UnreadableError as error:  # it was read to its end, so the next message can be
                _log.exception("a message of the HTTP process cannot be read")
                failure = Failure(message=f"the request cannot be read by the engine: {error}", code="engine_error")
                if error.call_id:  # whose client would otherwise wait for ever
                    inbox.put((error.call_id, failure))
            except (EOFError, OSError):
                inbox.put(_END)
                return

    def _process_inbox(self, inbox: Inbox, calls: CallTracker, outbox: Outbox, *, wait: bool) -> None:
        """Add and cancel calls until the inbox is empty. wait: block until the first message arrives."""
        while True:
            try:
                item = inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if item is None:  # wakes the loop for a new draft
                continue
            if item is _END:
                sys.exit(0)
            assert not isinstance(item, str)
            call_id, message = item
            if message == CANCEL:
                calls.cancel(call_id)
                continue
            if isinstance(message, Failure):
                calls.cancel(call_id)
                self._send(((call_id, message),), calls, outbox)
                continue
            if isinstance(message, CancelRequest):
                calls.cancel_request(call_id, message.request_index)
                continue
            try:
                calls.add(message)
                continue
            except RequestError as error:
                failure = Failure(message=error.message, param=error.param, code=error.code, status=error.status)
            except Exception as error:
                _log.exception("call %s was not accepted", call_id)
                failure = Failure(message=f"the request failed: {error}", code="engine_error")
            calls.cancel(call_id)
            self._send(((call_id, failure),), calls, outbox)


class _Untold:
    """Outputs of rounds that neither clients nor counters know of yet."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._until_s = 0.0
        self._num_running = 0
        """Requests that the last round gave something to and did not end."""

    def add(self, outputs: list[Output], now_s: float) -> bool:
        """Add a round's. True if they are to be told now: it is time, or a request has begun or ended."""
        self.outputs += outputs
        num_before, self._num_running = self._num_running, sum(output.finish_reason is None for output in outputs)
        return now_s >= self._until_s or len(outputs) != num_before or self._num_running != num_before

    def take(self, now_s: float) -> list[Output]:
        """All of them, in their order."""
        outputs, self.outputs, self._until_s = self.outputs, [], now_s + _TELL_EVERY_S
        return outputs


class _Heartbeat:
    """Writes the worker's heartbeat while the loop waits for work, or is in an iteration that may still end."""

    def __init__(self, page: EngineStatusPage) -> None:
        self._page = page
        self._busy_since_s: float | None = None

    def set_idle(self) -> None:
        """The loop waits for work; it may wait for any time."""
        self._busy_since_s = None

    def set_busy(self) -> None:
        """The loop begins an iteration, which counts as hanging after HANG_TIMEOUT_S."""
        self._busy_since_s = time.monotonic()

    def run(self) -> None:
        """Write heartbeats for ever; runs in a thread of its own."""
        while True:
            busy_since_s = self._busy_since_s
            if busy_since_s is None or time.monotonic() - busy_since_s < HANG_TIMEOUT_S:
                self._page.beat()
            time.sleep(HEARTBEAT_S)
