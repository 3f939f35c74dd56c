"""Tracks the running calls: maps engine requests to client calls, and turns the engine's outputs into deltas.

Leaves out the queues and the processes, and when a round runs (serve/worker/loop.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aurora_lit.ipc.messages import Call, CallUpdate, Delta, Failure
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.request import Output, Request
from aurora_lit.serve.sequences.detokenizer import TextStream
from aurora_lit.serve.worker.parts import EngineInterface

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _TrackedRequest:
    """One request that the engine works on."""

    call: _ActiveCall
    index: int
    request: Request
    text: TextStream


@dataclass(kw_only=True)
class _ActiveCall:
    """A call that the HTTP process waits for."""

    call_id: str
    unfinished: set[str] = field(default_factory=set)
    """Ids of its requests that have not ended."""


class Progress(NamedTuple):
    """What a round's outputs mean for calls."""

    updates: list[tuple[str, CallUpdate]]
    """(call id, update), one for each call that the round concerns."""
    domains: list[str]
    """The domain label of each output's request; "" without one."""


class CallTracker:
    """All running calls.

    A call is added, its outputs arrive round by round, and it is removed when its last request ends, or by `cancel`.
    """

    def __init__(self, engine: EngineInterface, tokenizer: Tokenizer) -> None:
        """Start without calls."""
        self._engine, self._tokenizer = engine, tokenizer
        self._calls: dict[str, _ActiveCall] = {}
        self._requests: dict[str, _TrackedRequest] = {}
        self.num_opted_out = 0
        """Requests with `store: false` since the start."""

    def add(self, call: Call) -> None:
        """Submit every request of a call. If the engine refuses one, the caller must `cancel` the call."""
        active = _ActiveCall(call_id=call.call_id)
        self._calls[call.call_id] = active
        for index, request in enumerate(call.requests):
            text = TextStream(self._tokenizer, stop=request.params.stop)
            tracked = _TrackedRequest(call=active, index=index, request=request, text=text)
            self._requests[request.request_id] = tracked
            active.unfinished.add(request.request_id)
            self.num_opted_out += not request.store
            self._engine.submit(request)

    def cancel(self, call_id: str) -> None:
        """Remove a call and free its slots; an unknown id is ignored, since the call may just have ended."""
        active = self._calls.pop(call_id, None)
        for request_id in active.unfinished if active is not None else ():
            self._engine.cancel(request_id)
            del self._requests[request_id]

    def active_calls(self) -> list[str]:
        """The id of every running call."""
        return list(self._calls)

    def advance(self, outputs: Sequence[Output]) -> Progress:
        """Turn a round's outputs into one update per call; requests and calls that ended are removed."""
        deltas: dict[str, list[Delta]] = {}
        failures: dict[str, Failure] = {}
        # Before anything is removed: the request of an output may end with it.
        domains = [self._domain_of(output.request_id) for output in outputs]
        for output in outputs:
            tracked = self._requests.get(output.request_id)
            if tracked is None:
                continue
            call_id = tracked.call.call_id
            try:
                if output.finish_reason == "error":
                    raise RuntimeError(output.error or "the engine gave no reason")
                deltas.setdefault(call_id, []).append(self._delta(tracked, output))
            except Exception as error:
                _log.exception("request %s failed", output.request_id)
                failures[call_id] = Failure(message=f"the request failed: {error}", code="engine_error")
                self.cancel(call_id)
        updates: dict[str, CallUpdate] = {**{call_id: tuple(parts) for call_id, parts in deltas.items()}, **failures}
        return Progress(list(updates.items()), domains)

    def _domain_of(self, request_id: str) -> str:
        tracked = self._requests.get(request_id)
        return "" if tracked is None else tracked.request.domain

    def _delta(self, tracked: _TrackedRequest, output: Output) -> Delta:
        text, num_tokens, finish_reason = self._decode(tracked, output)
        if finish_reason is not None:
            self._remove(tracked, still_in_engine=output.finish_reason is None)
        return Delta(
            index=tracked.index,
            text=text,
            token_ids=output.token_ids[:num_tokens],
            logprobs=None if output.logprobs is None else output.logprobs[:num_tokens],
            prompt_logprobs=output.prompt_logprobs,
            num_proposed=output.num_proposed,
            num_accepted=output.num_accepted,
            finish_reason=finish_reason,
            draft_versions=output.draft_versions,
        )

    def _decode(self, tracked: _TrackedRequest, output: Output) -> tuple[str, int, str | None]:
        """New text, number of tokens that count, and finish reason: the engine's, or "stop" at a stop string."""
        stream, token_ids = tracked.text, output.token_ids
        # The token that ended the answer counts as a token, but is not part of the text.
        visible = token_ids[:-1] if output.finish_reason == "stop" else token_ids
        if not tracked.request.params.stop:
            text = stream.push(visible)
        else:
            text = ""
            for position, token_id in enumerate(visible):  # one at a time, to find the one that completes a stop string
                text += stream.push((token_id,))
                if stream.stopped:
                    return text, position + 1, "stop"
        if output.finish_reason is not None:
            text += stream.finish()
        return text, len(token_ids), output.finish_reason

    def _remove(self, tracked: _TrackedRequest, *, still_in_engine: bool) -> None:
        request_id, active = tracked.request.request_id, tracked.call
        if still_in_engine:
            self._engine.cancel(request_id)
        del self._requests[request_id]
        active.unfinished.discard(request_id)
        if not active.unfinished:
            del self._calls[active.call_id]
