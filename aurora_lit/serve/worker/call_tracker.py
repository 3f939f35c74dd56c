"""Calls in work: which request of the engine belongs to which client call, and outputs turned into deltas.

Knows the engine, but no queue and no process. Leaves out when a round runs (serve/worker/loop.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from aurora_lit.ipc.messages import Call, Delta, Failure
from aurora_lit.request import Output, Request
from aurora_lit.serve.sequences.detokenizer import TextStream

_log = logging.getLogger(__name__)


class EngineStats(Protocol):
    """Counters since the engine was built."""

    rounds: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafts: int
    proposed: int
    accepted: int
    accepted_by_position: list[int]


class EngineInterface(Protocol):
    """What the loop needs of an engine; tests bring their own."""

    eos_token_ids: frozenset[int]
    max_seq_len: int
    vocab_size: int
    draft_version: str

    @property
    def has_work(self) -> bool: ...  # noqa: D102
    @property
    def num_running(self) -> int: ...  # noqa: D102
    @property
    def num_waiting(self) -> int: ...  # noqa: D102
    @property
    def stats(self) -> EngineStats: ...  # noqa: D102
    def submit(self, request: Request) -> None: ...  # noqa: D102
    def cancel(self, request_id: str) -> None: ...  # noqa: D102
    def round(self) -> list[Output]: ...  # noqa: D102
    def swap_draft(self, draft: Any, *, version: str, recompute: bool = False) -> None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What an engine worker is made of; serve/worker/build.py makes the real ones."""

    engine: EngineInterface
    tokenizer: PreTrainedTokenizerBase
    load_draft: Callable[[Path | None], Any] | None = None
    """Reads a draft for `swap_draft`, from a folder or (None) the starting one; None: this engine has no draft."""
    unrecorded: Callable[[], int] = lambda: 0
    """Traces that could not be written to the disk so far."""
    before_round: Callable[[], None] = lambda: None
    """Takes in what the learner asks for."""
    close: Callable[[], None] = lambda: None
    """Writes out what is pending; at the worker's end."""


@dataclass(kw_only=True)
class _Sequence:
    """One request that the engine works on."""

    call: _ActiveCall
    index: int
    request: Request
    text: TextStream


@dataclass(kw_only=True)
class _ActiveCall:
    """A call and where its answer goes."""

    call_id: str
    response_queue_id: int
    running: set[str] = field(default_factory=set)
    """Ids of its requests that have not ended."""


class CallTracker:
    """All calls in work: request ids to calls, outputs to deltas. Knows the engine, but no queue.

    A call is added, its outputs come round by round, and it leaves when its last request ends, or by `drop`.
    """

    def __init__(self, engine: EngineInterface, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start empty."""
        self._engine, self._tokenizer = engine, tokenizer
        self._calls: dict[str, _ActiveCall] = {}
        self._sequences: dict[str, _Sequence] = {}
        self.num_opted_out = 0
        """Requests so far that nothing may be stored of."""

    def add(self, call: Call, response_queue_id: int) -> None:
        """Submit every request of a call; when one is refused, none stays."""
        active = _ActiveCall(call_id=call.call_id, response_queue_id=response_queue_id)
        self._calls[call.call_id] = active
        for index, request in enumerate(call.requests):
            text = TextStream(self._tokenizer, stop=request.params.stop)
            self._sequences[request.request_id] = _Sequence(call=active, index=index, request=request, text=text)
            active.running.add(request.request_id)
            self.num_opted_out += not request.store
            self._engine.submit(request)

    def drop(self, call_id: str) -> None:
        """Free the slots of a call; an unknown id is ignored (it has just ended)."""
        active = self._calls.pop(call_id, None)
        for request_id in active.running if active is not None else ():
            self._engine.cancel(request_id)
            del self._sequences[request_id]

    def domain_of(self, request_id: str) -> str:
        """The label that a running request came with; "" when it is none of ours."""
        sequence = self._sequences.get(request_id)
        return "" if sequence is None else sequence.request.domain

    def everyone(self) -> list[tuple[str, int]]:
        """(call id, response queue) of all calls in work."""
        return [(active.call_id, active.response_queue_id) for active in self._calls.values()]

    def advance(self, outputs: Iterable[Output]) -> list[tuple[str, int, tuple[Delta, ...] | Failure]]:
        """Turn a round's outputs into one message a call: (call id, response queue, content)."""
        deltas: dict[str, list[Delta]] = {}
        failures: dict[str, Failure] = {}
        queues = {active.call_id: active.response_queue_id for active in self._calls.values()}
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            call_id = sequence.call.call_id
            try:
                if output.finish_reason == "error":
                    raise RuntimeError(output.error or "the engine gave no reason")
                deltas.setdefault(call_id, []).append(self._delta(sequence, output))
            except Exception as error:
                _log.exception("request %s failed", output.request_id)
                failures[call_id] = Failure(message=f"the request failed: {error}", code="engine_error")
                self.drop(call_id)
        return [
            (call_id, queues[call_id], failures.get(call_id) or tuple(parts))
            for call_id, parts in {**{call_id: [] for call_id in failures}, **deltas}.items()
        ]

    def _delta(self, sequence: _Sequence, output: Output) -> Delta:
        text, num_tokens, finish_reason = self._read(sequence, output)
        if finish_reason is not None:
            self._end(sequence, still_in_engine=output.finish_reason is None)
        return Delta(
            index=sequence.index,
            text=text,
            token_ids=output.token_ids[:num_tokens],
            logprobs=None if output.logprobs is None else output.logprobs[:num_tokens],
            prompt_logprobs=output.prompt_logprobs,
            num_proposed=output.num_proposed,
            num_accepted=output.num_accepted,
            finish_reason=finish_reason,
            draft_versions=output.draft_versions,
        )

    def _read(self, sequence: _Sequence, output: Output) -> tuple[str, int, str | None]:
        """Text, number of tokens that count, finish reason: the engine's, or "stop" at a stop string."""
        stream, token_ids = sequence.text, output.token_ids
        # The token that ended the answer is counted, but it is not part of the text.
        shown = token_ids[:-1] if output.finish_reason == "stop" else token_ids
        if not sequence.request.params.stop:
            text = stream.push(shown)
        else:
            text = ""
            for position, token_id in enumerate(shown):  # one by one: which token completes a stop string?
                text += stream.push((token_id,))
                if stream.stopped:
                    return text, position + 1, "stop"
        if output.finish_reason is not None:
            text += stream.finish()
        return text, len(token_ids), output.finish_reason

    def _end(self, sequence: _Sequence, *, still_in_engine: bool) -> None:
        request_id, active = sequence.request.request_id, sequence.call
        if still_in_engine:
            self._engine.cancel(request_id)
        del self._sequences[request_id]
        active.running.discard(request_id)
        if not active.running:
            del self._calls[active.call_id]
