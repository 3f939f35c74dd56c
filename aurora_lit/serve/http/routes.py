"""The routes that generate: one call from checked body to response, as a stream of server-sent events or in one piece.

Leaves out the GET routes, registration of routes (serve/http/spec.py) and authorisation (serve/api.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.models.fim import fim_marks
from aurora_lit.models.tokenizer import Tokenizer
from aurora_lit.request import Client, RequestKind
from aurora_lit.serve.http.answer_stream import TextDelta, by_token
from aurora_lit.serve.http.detokenizer import TokenDecoder
from aurora_lit.serve.http.errors import error_event
from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.infill_response import InfillResponse
from aurora_lit.serve.http.metrics import ServerMetrics
from aurora_lit.serve.http.responses import ChatResponse, ResponseBuilder, TextResponse
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, Sampling, StreamOptions
from aurora_lit.serve.http.stream_events import COMMENT, COMMENT_EVERY_S, EventStream, SendClock, StreamShape, event
from aurora_lit.serve.http.tokenize import (
    Limits,
    Prepared,
    check_logprobs,
    check_model,
    longest_token,
    prepare_chat,
    prepare_completion,
)
from aurora_lit.serve.http.worker_client import ClientDisconnected, PendingCall, Slot, WorkerClient

_CLIENT_CLOSED_REQUEST = 499  # the status that proxies log for it; the client does not receive it


class ClientPseudonyms:
    """Names of clients, which tell clients apart and say nothing else about them.

    A client is the request's `user`, which in OpenAI's API is the end user as named by the front end; without one, the
    address that the request came from. If users are not trusted, whoever sends a new one with each request is still one
    source, and none passes for a user of another address. The API key is the same for all clients. Names are hashed
    with a random key that lives as long as the server, so recorded traces cannot be traced back to users; where what
    clients were answered is kept (memory.keep), as long as that.

    >>> pseudonyms = ClientPseudonyms(trust_user=True)
    >>> pseudonyms.of(user="ann", address="10.0.0.7") == pseudonyms.of(user="ann", address="10.0.0.8")
    True
    """

    def __init__(self, *, trust_user: bool, key: Callable[[], bytes] = lambda: secrets.token_bytes(16)) -> None:
        """trust_user: a front end that is trusted names the users (`server.trust_user`).

        key: of the hash; called with the first request, when the engine runs.
        """
        self._make_key, self._trust_user = key, trust_user

    @cached_property
    def _key(self) -> bytes:
        return self._make_key()

    def of(self, *, user: str | None, address: str | None) -> Client:
        """Pseudonyms of 16 hexadecimal digits; "" if nothing is known about the client."""
        source = self._hashed("", address or "")
        if not user:
            return Client(source, source)
        name = self._hashed(user, "" if self._trust_user else address or "")
        return Client(name, name if self._trust_user else source)

    def _hashed(self, user: str, address: str) -> str:
        if not user and not address:
            return ""
        # A lone surrogate is no character, but JSON can carry it.
        text = f"{address} {user}".encode(errors="surrogatepass")  # no address has a space
        return hashlib.blake2b(text, key=self._key, digest_size=8).hexdigest()


class GenerationRoutes:
    """Responds to generation requests in the HTTP process."""

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer,
        worker_client: WorkerClient,
        metrics: ServerMetrics,
        status: EngineStatusPage,
        stream_shape: StreamShape,
        default_sampling: Mapping[str, Any] = MappingProxyType({}),
        pseudonyms: ClientPseudonyms | None = None,
    ) -> None:
        """model: the only name that requests may ask for. default_sampling: values of what requests leave out.

        pseudonyms: None: those that trust no user, with a key of their own.
        """
        self._model, self._worker_client, self._metrics, self._status = model, worker_client, metrics, status
        self._tokenizer, self._token_decoder = tokenizer, TokenDecoder(tokenizer)
        self._stream_shape, self._default_sampling = stream_shape, default_sampling
        self._longest_token, self._fim_marks = longest_token(tokenizer), fim_marks(tokenizer)
        self._pseudonyms = pseudonyms or ClientPseudonyms(trust_user=False)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(body, request, prepare_chat, ChatResponse, id_prefix="chatcmpl")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        prepare = partial(prepare_completion, marks=self._fim_marks)
        return await self._answer(body, request, prepare, TextResponse, num_prompts=len(body.prompts), id_prefix="cmpl")

    async def fill(self, body: FimRequest, request: Request) -> Response:
        """POST /v1/fim/completions; the answer has the form of a chat's."""
        prepare = partial(prepare_completion, marks=self._fim_marks, default_tokens=None)
        return await self._answer(body, request, prepare, ChatResponse, id_prefix="fim")

    async def infill(self, body: InfillRequest, request: Request) -> Response:
        """POST /infill."""
        slot = self._slot(body, request)
        if slot is not None and body.n_predict != 0:  # which is a warm-up, and no keystroke
            self._worker_client.replace(slot)
        prepare = partial(prepare_completion, marks=self._fim_marks, default_tokens=None)
        response = partial(InfillResponse, body=body)
        return await self._answer(body, request, prepare, response, id_prefix="infill")

    async def _answer(
        self,
        body: Sampling,
        request: Request,
        prepare: Callable[..., Prepared],
        builder: Callable[..., ResponseBuilder],
        *,
        num_prompts: int = 1,
        id_prefix: str,
    ) -> Response:
        check_model(body.model, served=self._model)
        body = body.with_defaults(self._default_sampling)
        started_s = time.monotonic()
        field, number = body.choices
        places = self._worker_client.places(num_prompts=num_prompts, num_choices=number, choices_field=field)
        with places:
            prepared = await asyncio.to_thread(
                prepare,
                body,
                call_id=f"{id_prefix}-{uuid.uuid4().hex}",
                tokenizer=self._tokenizer,
                limits=self._limits(),
                client=self._pseudonym(body, request),
            )
        return await self._respond(body, prepared, builder, request, started_s)

    def _pseudonym(self, body: Sampling, request: Request) -> Client:
        return self._pseudonyms.of(user=body.user, address=request.client.host if request.client else None)

    def _limits(self) -> Limits:
        status = self._status.read()
        return Limits(max_seq_len=status.max_seq_len, vocab_size=status.vocab_size, longest_token=self._longest_token)

    async def _respond(
        self,
        body: Sampling,
        prepared: Prepared,
        builder: Callable[..., ResponseBuilder],
        request: Request,
        started_s: float,
    ) -> Response:
        check_logprobs(body, prepared)
        recorder = _CallRecorder(self._metrics, prepared.kind, started_s=started_s)
        options = body.stream_options or StreamOptions()
        response = builder(
            prepared,
            created=int(time.time()),
            model=self._model,
            token_decoder=self._token_decoder,
            max_draft_tokens=self._status.read().max_draft_tokens,
            started_s=started_s,
            usage_in_every_chunk=bool(options.continuous_usage_stats),
        )
        clock = SendClock(self._stream_shape.interval_s if body.stream else 0.0)

        def on_close(failed: bool) -> None:
            if not failed and all(response.finish_reasons):  # else it had no last token
                recorder.end()
            for reason in response.finish_reasons:
                self._metrics.finish(reason or ("error" if failed else "abort"))

        splits = self._sends_by_token(body, options)
        pending = self._worker_client.start(
            prepared.call,
            request,
            prepared.options._replace(by_token=prepared.options.by_token or splits),
            on_close=on_close,
            slot=self._slot(body, request),
        )
        is_streaming = False
        try:
            # Wait for the first deltas even for a stream: a call that fails soon gets a proper HTTP status.
            is_soon = not body.stream or await pending.arrives_within(COMMENT_EVERY_S)
            first = await _next_deltas(pending, clock, recorder) if is_soon else ()
            if body.stream:
                is_streaming = True
                events = self._events(response, pending, recorder, clock, first, options, splits=splits)
                return EventStream(events, on_end=pending.close)
            response.add(first)
            while not response.finished:
                response.add(await _next_deltas(pending, clock, recorder))
        except ClientDisconnected:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            if not is_streaming:
                pending.close()
        text = await asyncio.to_thread(response.full_json) if response.has_logprobs else response.full_json()
        return Response(text, media_type="application/json")

    def _sends_by_token(self, body: Sampling, options: StreamOptions) -> bool:
        """True if a stream has an event for each token: editors count a completion's events and stop between them.

        Not where tokens are hidden by a clock or by padding: the events of a round would tell their number.
        """
        shape = self._stream_shape
        is_open = not shape.interval_s and not shape.padding_for(options)
        return bool(body.stream) and not isinstance(body, ChatRequest) and is_open

    def _slot(self, body: Sampling, request: Request) -> Slot | None:
        """What `POST /infill` requests that replace each other have in common; None: nothing replaces this one."""
        if not isinstance(body, InfillRequest) or body.id_slot is None or body.id_slot < 0:
            return None
        address = request.client.host if request.client else ""
        first_line = body.input_prefix.partition("\n")[0]
        return Slot(address, request.headers.get("authorization", ""), body.id_slot, first_line)

    async def _events(
        self,
        response: ResponseBuilder,
        pending: PendingCall,
        recorder: _CallRecorder,
        clock: SendClock,
        deltas: tuple[TextDelta, ...],
        options: StreamOptions,
        *,
        splits: bool,
    ) -> AsyncGenerator[str]:
        """The stream, a message at a time: chunks; with the last ones usage, if asked for, and [DONE].

        A call that fails gets an error event in place of those. splits: a chunk has one token.
        """
        padding_bytes = self._stream_shape.padding_for(options)

        def message_of(deltas: tuple[TextDelta, ...]) -> str:
            parts = [[each] for each in by_token(deltas)] if splits else [deltas]
            chunks = [chunk for part in parts for chunk in response.chunks(part)]
            if response.finished and options.include_usage:
                chunks.append(response.usage_chunk())
            return "".join(event(chunk, padding_bytes=padding_bytes) for chunk in chunks)

        try:
            while True:
                if any(delta.prompt_logprobs is not None for delta in deltas):  # a whole prompt's, which take long
                    message = await asyncio.to_thread(message_of, deltas)
                else:
                    message = message_of(deltas)
                if response.finished:
                    yield message + response.END
                    return
                if message:
                    yield message
                while not await pending.arrives_within(COMMENT_EVERY_S):
                    yield COMMENT
                deltas = await _next_deltas(pending, clock, recorder)
        except RequestError as error:
            self._metrics.refuse(error.status)
            yield error_event(error)
        except ClientDisconnected:
            return
        finally:
            pending.close()


async def _next_deltas(pending: PendingCall, clock: SendClock, recorder: _CallRecorder) -> tuple[TextDelta, ...]:
    """The next round's deltas; on a clock those of all rounds until it lets send. Raises as `PendingCall.next`."""
    deltas = await pending.next()
    if not clock.is_on:
        return recorder.record(deltas, at_s=pending.arrived_s)
    await pending.wait(clock.wait_s())
    return recorder.record(deltas + pending.take_ready(), at_s=time.monotonic())


class _CallRecorder:
    """Records the latencies of one call that was accepted at `started_s`, and counts it by its kind."""

    def __init__(self, metrics: ServerMetrics, kind: RequestKind, *, started_s: float) -> None:
        self._metrics, self._kind, self._started_s = metrics, kind, started_s
        self._last_token_s: dict[int, float] = {}
        """By choice: when its last token arrived."""

    def record(self, deltas: tuple[TextDelta, ...], *, at_s: float) -> tuple[TextDelta, ...]:
        """Record the deltas of a round that arrived at `at_s`, or of several that are sent then. Returns them."""
        num_tokens_of, num_begun = Counter[int](), len(self._last_token_s)
        for delta in deltas:
            num_tokens_of[delta.index] += len(delta.token_ids)
        for index, num_tokens in num_tokens_of.items():
            if num_tokens == 0:
                continue
            before = self._last_token_s.get(index)
            if before is None:
                self._metrics.first_token.observe(at_s - self._started_s)
            else:
                for _ in range(num_tokens):
                    self._metrics.between_tokens.observe((at_s - before) / num_tokens)
            self._last_token_s[index] = at_s
        self._metrics.count(self._kind, deltas, begun=len(self._last_token_s) - num_begun)
        return deltas

    def end(self) -> None:
        """Record the time up to the call's last token."""
        last_s = max(self._last_token_s.values(), default=time.monotonic())
        self._metrics.whole_request.observe(last_s - self._started_s)
