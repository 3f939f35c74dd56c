"""Tracks the running calls: maps engine requests to client calls, and the engine's outputs to deltas.

Leaves out text and stop strings, which are the HTTP process's (serve/http/answer_stream.py), the queues and the
processes, and when a round runs (serve/worker/loop.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.ipc.messages import Call, Delta
from aurora_lit.modules.sampling.distribution import has_options
from aurora_lit.request import Output, Request
from aurora_lit.serve.worker.parts import EngineInterface

_HELD_S = 0.1
"""How long what rounds add to a call is held while nobody looks at it."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _ActiveCall:
    """A call that the HTTP process waits for."""

    call_id: str
    is_answered_whole: bool
    unfinished: dict[int, str] = field(default_factory=dict)
    """The requests that have not ended: position in Call.requests → request id."""
    held: list[Delta] = field(default_factory=list)
    """Deltas that were not passed on yet."""
    held_until_s: float = 0.0
    """The first round's are not held, so that the HTTP process knows when the answer began."""

    def take_held(self, now_s: float) -> tuple[Delta, ...]:
        """What is passed on now; empty if that can wait."""
        may_wait = self.is_answered_whole and now_s < self.held_until_s
        if may_wait and all(delta.finish_reason is None for delta in self.held):
            return ()
        deltas, self.held, self.held_until_s = tuple(self.held), [], now_s + _HELD_S
        return deltas


@dataclass(kw_only=True)
class _TrackedRequest:
    """One request that the engine works on."""

    call: _ActiveCall
    index: int
    request: Request
    kind: TrafficKind | None = None
    """From the first output on, which tells the domain."""


class Progress(NamedTuple):
    """What the outputs of some rounds mean for calls."""

    updates: tuple[tuple[str, tuple[Delta, ...]], ...]
    """(call id, deltas), one for each call that gets some now."""
    kinds: list[TrafficKind | None]
    """What each output's request is for the trial of a draft; None: its call was cancelled."""


class CallTracker:
    """All running calls.

    A call is added, its outputs arrive round by round, and it is removed when its last request ends, or by `cancel`.
    """

    def __init__(self, engine: EngineInterface, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without calls. `clock`: in seconds."""
        self._engine, self._clock = engine, clock
        self._calls: dict[str, _ActiveCall] = {}
        self._requests: dict[str, _TrackedRequest] = {}
        self.num_opted_out = 0
        """Requests with `store: false` since the start."""

    def add(self, call: Call) -> None:
        """Submit every request of a call. If the engine refuses one, the caller must `cancel` the call."""
        active = _ActiveCall(call_id=call.call_id, is_answered_whole=call.is_answered_whole)
        self._calls[call.call_id] = active
        for index, request in enumerate(call.requests):
            self._requests[request.request_id] = _TrackedRequest(call=active, index=index, request=request)
            active.unfinished[index] = request.request_id
            self.num_opted_out += not request.store
            self._engine.submit(request)

    def cancel(self, call_id: str) -> None:
        """Remove a call and free its slots; an unknown id is ignored, since the call may just have ended."""
        active = self._calls.get(call_id)
        for index in tuple(active.unfinished) if active is not None else ():
            self.cancel_request(call_id, index)

    def cancel_request(self, call_id: str, index: int) -> None:
        """Remove one request of a call and free its slot; ignored if it has just ended."""
        active = self._calls.get(call_id)
        request_id = active.unfinished.get(index) if active is not None else None
        if request_id is not None:
            self._engine.cancel(request_id)
            self._remove(self._requests[request_id])

    def active_calls(self) -> list[str]:
        """The id of every running call."""
        return list(self._calls)

    def advance(self, outputs: Sequence[Output]) -> Progress:
        """Turn the outputs of some rounds into one update per call; requests and calls that ended are removed.

        The deltas of a call that is answered as a whole are held for a while, but for its first ones and those that end
        a choice: a message wakes the HTTP process, which then computes on a core that rounds run on.
        """
        concerned: dict[str, _ActiveCall] = {}
        kinds: list[TrafficKind | None] = []
        for output in outputs:
            tracked = self._requests.get(output.request_id)
            if tracked is None:
                kinds.append(None)
                continue
            if tracked.kind is None:
                tracked.kind = _kind(tracked.request, output)
            kinds.append(tracked.kind)
            concerned[tracked.call.call_id] = tracked.call
            tracked.call.held.append(_delta(tracked.index, output))
            if output.finish_reason is not None:
                if output.finish_reason == "error":
                    _log.error("request %s failed: %s", tracked.call.call_id, output.error)
                self._remove(tracked)
        now_s = self._clock()
        taken = ((call_id, call.take_held(now_s)) for call_id, call in concerned.items())
        return Progress(tuple((call_id, deltas) for call_id, deltas in taken if deltas), kinds)

    def _remove(self, tracked: _TrackedRequest) -> None:
        active = tracked.call
        del self._requests[tracked.request.request_id]
        del active.unfinished[tracked.index]
        if not active.unfinished:
            del self._calls[active.call_id]


def _kind(request: Request, output: Output) -> TrafficKind:
    params = request.params
    return TrafficKind(
        domain=output.domain or request.domain,
        temperature=round(params.temperature, 1),
        has_grammar=params.structured_outputs is not None,
        has_options=has_options(params),
        client=request.client.source,
    )


def _delta(index: int, output: Output) -> Delta:
    return Delta(
        index=index,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        num_proposed=output.num_proposed,
        num_accepted=output.num_accepted,
        accepted_from=output.accepted_from,
        finish_reason=output.finish_reason,
        error=output.error,
        draft_versions=output.draft_versions,
        domain=output.domain,
        num_cached_tokens=output.num_cached_tokens,
    )
