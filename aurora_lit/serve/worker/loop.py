"""The engine worker's loop: takes calls from LitServe's queue, runs engine rounds, sends back text.

One thread owns the engine; a second one only blocks on the request queue, a third one only says that we live, and a
fourth one loads new drafts (serve/worker/hot_reload.py). Leaves out the HTTP side (serve/http/worker_client.py), the bookkeeping of
calls (serve/worker/call_tracker.py), a round (serve/engine/engine.py) and which draft serves (serve/worker/live_draft.py).

    every round:  inbox -> add, cancel     swap     engine.round()     one message a call     counters -> status page

A fault of one request ends its call. A fault of the engine ends all calls, turns the status red and the process ends.
A turn that hangs stops the heartbeat, which turns the status red and fails the calls until it goes on.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import StatusBlock, WorkerState
from aurora_lit.ipc.messages import CANCEL, EVERY_CALL, Content, Failure
from aurora_lit.serve.worker.call_tracker import CallTracker, WorkerParts
from aurora_lit.serve.worker.hot_reload import Refusal
from aurora_lit.serve.worker.round_times import RoundTimes

if TYPE_CHECKING:
    from aurora_lit.serve.worker.live_draft import LiveDraft

HEARTBEAT_S = 0.25
TURN_MAY_LAST_S = 120.0
"""A turn of the loop that lasts longer hangs. The longest that do not: a minute to compile a shape (engine.compile)."""
_log = logging.getLogger(__name__)


class EngineLoop(LitLoop):  # type: ignore[misc]
    """LitServe runs this in the worker process; `run` never returns."""

    def __init__(self, status_path: Path) -> None:
        """The status block must exist."""
        super().__init__()
        self._status_path, self._ending = status_path, False

    def run(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Serve until SIGTERM has come and nothing runs, or the engine fails (then: exception, exit code 1)."""
        parts: WorkerParts = lit_api.parts
        live: LiveDraft | None = lit_api.live
        engine = parts.engine
        status = StatusBlock.open(self._status_path, writable=True)
        calls = CallTracker(engine, parts.tokenizer)
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read_requests, args=(request_queue, inbox), daemon=True).start()
        pulse = _Pulse(status)
        threading.Thread(target=pulse.run, daemon=True).start()
        if live is not None:
            live.start(on_change=lambda: inbox.put(None))
        report = _Report(parts, calls, live, status)
        report.write(state=WorkerState.READY, started_ns=time.monotonic_ns())
        self._end_when_idle(lambda: engine.has_work)
        try:
            while not self._ending or engine.has_work:
                pulse.rest()
                self._take_in(inbox, calls, transport, wait=not engine.has_work)
                pulse.begin_turn()
                started, swaps = time.perf_counter(), 0 if live is None else live.num_swaps
                if live is not None:
                    live.before_round()
                parts.before_round()
                outputs = engine.round()
                report.times.note(time.perf_counter() - started, swapped=live is not None and live.num_swaps > swaps)
                if live is not None:
                    live.after_round(outputs, domain_of=calls.domain_of)
                self._send(transport, calls.advance(outputs))
                report.write()
        except Exception as error:
            _log.exception("the engine failed")
            status.write(state=WorkerState.FAILED, error=f"{type(error).__name__}: {error}")
            failure = Failure(message="the engine failed; the server must be restarted", code="engine_dead")
            self._send(transport, [(*whose, failure) for whose in calls.everyone()])
            raise
        finally:
            if live is not None:
                live.close()
            parts.close()
        sys.exit(0)

    def _end_when_idle(self, busy: Callable[[], bool]) -> None:
        """On SIGTERM finish what runs, then end: LitServe sends it last, a service manager to all at once."""

        def end(number: int, frame: FrameType | None) -> None:
            self._ending = True
            if not busy():
                sys.exit(0)

        signal.signal(signal.SIGTERM, end)

    def _read_requests(self, request_queue: Any, inbox: queue.SimpleQueue[Any]) -> None:
        while True:
            try:
                inbox.put(self.get_request(request_queue, block=True))
            except (EOFError, OSError):  # LitServe's manager is gone, so the server is too
                os._exit(1)

    def _take_in(self, inbox: queue.SimpleQueue[Any], calls: CallTracker, transport: Any, *, wait: bool) -> None:
        """Empty the inbox; with nothing to do, sleep until something comes."""
        while True:
            try:
                item = inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if item is None:
                continue
            response_queue_id, call_id, _, content = item
            if content == CANCEL:
                calls.drop(call_id)
                continue
            try:
                calls.add(content, response_queue_id)
            except RequestError as error:
                calls.drop(call_id)
                failure = Failure(message=error.message, param=error.param, code=error.code, status=error.status)
                self._send(transport, [(call_id, response_queue_id, failure)])
            except Exception as error:
                _log.exception("call %s was not accepted", call_id)
                calls.drop(call_id)
                failure = Failure(message=f"the request failed: {error}", code="engine_error")
                self._send(transport, [(call_id, response_queue_id, failure)])

    def _send(self, transport: Any, messages: Iterable[tuple[str, int, Content]]) -> None:
        """All that goes to one HTTP process at once: a message costs each of three processes more than its content."""
        letters: dict[int, list[tuple[str, Content]]] = {}
        for call_id, response_queue_id, content in messages:
            letters.setdefault(response_queue_id, []).append((call_id, content))
        for response_queue_id, together in letters.items():
            self.put_response(
                transport, response_queue_id, EVERY_CALL, tuple(together), LitAPIStatus.OK, LoopResponseType.STREAMING
            )


class _Pulse:
    """Says that the worker lives: while it waits, and while a turn of its loop may still come to an end."""

    def __init__(self, status: StatusBlock) -> None:
        self._status = status
        self._turn_began_s: float | None = None

    def rest(self) -> None:
        """The loop waits for work, as long as it takes."""
        self._turn_began_s = None

    def begin_turn(self) -> None:
        """The loop is at work, and back before long."""
        self._turn_began_s = time.monotonic()

    def run(self) -> None:
        """Beat; in a thread of its own."""
        while True:
            began_s = self._turn_began_s
            if began_s is None or time.monotonic() - began_s < TURN_MAY_LAST_S:
                self._status.beat()
            time.sleep(HEARTBEAT_S)


class _Report:
    """Writes the worker's counters to the status page, texts only when they have changed."""

    def __init__(self, parts: WorkerParts, calls: CallTracker, live: LiveDraft | None, status: StatusBlock) -> None:
        self._parts, self._calls, self._live, self._status = parts, calls, live, status
        self._shown: tuple[Refusal | None, Refusal | None, str] | None = None
        self.times = RoundTimes()

    def write(self, **more: int) -> None:
        """Everything as it is now; readers see it change at once."""
        engine, stats, live = self._parts.engine, self._parts.engine.stats, self._live
        self._status.write(
            running=engine.num_running,
            waiting=engine.num_waiting,
            rounds=stats.rounds,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            generated_tokens=stats.generated_tokens,
            drafts=stats.drafts,
            proposed=stats.proposed,
            accepted=stats.accepted,
            accepted_by_position=stats.accepted_by_position,
            opted_out=self._calls.num_opted_out,
            unrecorded=self._parts.unrecorded(),
            **self.times.fields(),
            **self._draft(live),
            **more,
        )

    def _draft(self, live: LiveDraft | None) -> dict[str, int | str]:
        version = self._parts.engine.draft_version
        refused, rolled_back = (None, None) if live is None else (live.refused, live.rolled_back)
        fields: dict[str, int | str] = {}
        if live is not None:
            fields = {"swaps": live.num_swaps, "refusals": live.num_refused, "rollbacks": live.num_rollbacks}
        if (refused, rolled_back, version) != self._shown:
            self._shown = (refused, rolled_back, version)
            fields["draft_version"] = version
            if refused is not None:
                fields.update(refused_version=refused.version, refused_reason=refused.reason)
            if rolled_back is not None:
                fields.update(rolled_back_version=rolled_back.version, rolled_back_reason=rolled_back.reason)
        return fields
