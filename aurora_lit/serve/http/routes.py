"""The two POST routes: one call from checked body to response, streamed as server-sent events or whole.

Leaves out registration, authorisation and the GET routes (serve/api.py).
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import StatusBlock
from aurora_lit.ipc.messages import Delta
from aurora_lit.serve.http.client_names import ClientNames
from aurora_lit.serve.http.errors import error_event
from aurora_lit.serve.http.metrics import ServerMetrics
from aurora_lit.serve.http.responses import Answer
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, StreamOptions, shorten
from aurora_lit.serve.http.tokenize import Limits, Prepared, longest_token, prepare_chat, prepare_completion
from aurora_lit.serve.http.worker_client import ClientGone, PendingCall, WorkerClient
from aurora_lit.serve.sequences.detokenizer import TokenSpeller

_CLIENT_CLOSED = 499  # what proxies log for it; nobody receives it


class Generation:
    """Answers generation requests in the HTTP process."""

    def __init__(
        self,
        *,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        flights: WorkerClient,
        metrics: ServerMetrics,
        status: StatusBlock,
    ) -> None:
        """`model` is the only name that requests may ask for."""
        self._model, self._flights, self._metrics, self._status = model, flights, metrics, status
        self._tokenizer, self._speller = tokenizer, TokenSpeller(tokenizer)
        self._longest_token = longest_token(tokenizer)
        self._clients = ClientNames()

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check_model(body.model)
        prepared = await asyncio.to_thread(
            prepare_chat,
            body,
            call_id=f"chatcmpl-{uuid.uuid4().hex}",
            tokenizer=self._tokenizer,
            limits=self._limits(),
            client=self._client(body, request),
        )
        return await self._respond(body, prepared, request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._check_model(body.model)
        prepared = await asyncio.to_thread(
            prepare_completion,
            body,
            call_id=f"cmpl-{uuid.uuid4().hex}",
            tokenizer=self._tokenizer,
            limits=self._limits(),
            client=self._client(body, request),
        )
        return await self._respond(body, prepared, request)

    def _client(self, body: ChatRequest | CompletionRequest, request: Request) -> str:
        return self._clients.of(user=body.user, address=request.client.host if request.client else None)

    def _check_model(self, name: str | None) -> None:
        """Only the served model can be asked for; whoever names none means it."""
        if name not in (None, self._model):
            raise RequestError(
                f"model={shorten(name)} does not exist; this server has {self._model}",
                param="model",
                code="model_not_found",
                status=404,
            )

    def _limits(self) -> Limits:
        now = self._status.read()
        return Limits(max_seq_len=now.max_seq_len, vocab_size=now.vocab_size, longest_token=self._longest_token)

    async def _respond(self, body: ChatRequest | CompletionRequest, prepared: Prepared, request: Request) -> Response:
        options = body.stream_options or StreamOptions()
        answer = Answer(
            prepared,
            kind="chat" if isinstance(body, ChatRequest) else "text",
            created=int(time.time()),
            model=self._model,
            speller=self._speller,
            max_draft_tokens=self._status.read().max_draft_tokens,
            usage_in_every_chunk=options.continuous_usage_stats,
        )
        clock = _Clock(self._metrics)

        def count(failed: bool) -> None:
            clock.stop()
            for reason in answer.finish_reasons:
                self._metrics.finish(reason or ("error" if failed else "abort"))

        flight = self._flights.start(prepared.call, request, on_close=count)
        streaming = False
        try:
            # A call that fails before its first token still gets a proper HTTP status, streamed or not.
            first = clock.tick(await flight.next())
            if body.stream:
                streaming = True
                events = self._events(answer, flight, clock, first, include_usage=options.include_usage)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            answer.take(first)
            while not answer.finished:
                answer.take(clock.tick(await flight.next()))
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED)
        finally:
            if not streaming:
                flight.close()
        return JSONResponse(answer.whole())

    async def _events(
        self, answer: Answer, flight: PendingCall, clock: _Clock, deltas: tuple[Delta, ...], *, include_usage: bool
    ) -> AsyncIterator[str]:
        """The stream: a chunk for each delta with text, perhaps usage, [DONE]; or an error event."""
        try:
            while True:
                for chunk in answer.chunks(deltas):
                    yield _event(chunk)
                if answer.finished:
                    break
                deltas = clock.tick(await flight.next())
            if include_usage:
                yield _event(answer.last_chunk())
            yield "data: [DONE]\n\n"
        except RequestError as error:
            self._metrics.refuse(error.status)
            yield error_event(error.message, status=error.status, param=error.param, code=error.code)
        except ClientGone:
            return
        finally:
            flight.close()


class _Clock:
    """Observes the latencies of one call."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._started = time.monotonic()
        self._last: dict[int, float] = {}  # choice -> when its last token came

    def tick(self, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
        """A round has come; it is handed on."""
        now = time.monotonic()
        for delta in deltas:
            num_tokens = len(delta.token_ids)
            if num_tokens == 0:
                continue
            before = self._last.get(delta.index)
            if before is None:
                self._metrics.first_token.observe(now - self._started)
            else:
                for _ in range(num_tokens):
                    self._metrics.between_tokens.observe((now - before) / num_tokens)
            self._last[delta.index] = now
        return deltas

    def stop(self) -> None:
        """The call has ended, one way or another."""
        self._metrics.whole_request.observe(time.monotonic() - self._started)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
