"""Bodies are read here, as far as they may be parsed: by their size, and by the number of their lists and objects.

JSON is parsed on the event loop, holding the interpreter's lock, in a time that follows these two. Leaves out how long
a body may take to arrive (connection.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aurora_lit.errors import RequestError
from aurora_lit.settings import AuroraConfig

MOST_BYTES = 16 << 20
"""Whatever the settings are."""
MOST_CONTAINERS = 1 << 16
"""Lists and objects of one body: a million would stop all streams for more than a second."""
_MOST_QUOTES = 16 * MOST_CONTAINERS
"""Of a body with more brackets than that, whose strings are told apart: to look at six million takes half a second."""
_BYTES_BESIDE = 2 << 20
"""For messages, schemas, and code around a hole that is cut."""
_BYTES_OF_TOKEN = 32
"""Of a prompt, written as text with escapes or as a token id."""
_SMALL_BYTES = 1 << 16
"""Such a body is read however many others are being read."""
_MOST_LARGE = 16
"""So many of the largest bodies may be read at once."""


def most_bytes(config: AuroraConfig) -> int:
    """Bytes of the largest body: that of as many prompts as may be asked for, each as long as the context."""
    tokens = config.engine.max_seq_len * config.server.max_queue
    return min(MOST_BYTES, _BYTES_BESIDE + _BYTES_OF_TOKEN * tokens)


class BodyLimits:
    """Middleware that reads a body before the routes do, and refuses one that is too large to be parsed.

    >>> app.add_middleware(BodyLimits, most=most_bytes(config), explain=error_response)
    """

    def __init__(
        self, app: ASGIApp, *, most: int, explain: Callable[[Request, Exception], Awaitable[Response]]
    ) -> None:
        """most: bytes of a body. explain: the response to a RequestError."""
        self._app, self._most, self._explain = app, most, explain
        self._num_reading = 0
        """Bytes of bodies that have not ended yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or leave it to the routes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            body = await self._read(request, receive)
        except RequestError as error:
            await (await self._explain(request, error))(scope, receive, send)
            return
        if body is None:
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, received, send)

    async def _read(self, request: Request, receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone. Raises RequestError."""
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._most:
            raise self._too_large()
        parts, size = list[bytes](), 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                self._num_reading += len(part)
                if size > self._most:
                    raise self._too_large()
                if size > _SMALL_BYTES and self._num_reading > _MOST_LARGE * self._most:
                    raise RequestError("too many large bodies arrive at once; try again", code="busy", status=429)
                if not message.get("more_body", False):
                    break
        finally:
            self._num_reading -= size
        body = b"".join(parts)
        check_containers(body)
        return body

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body is larger than the {self._most / 2**20:.3g} MiB that engine.max_seq_len and server.max_queue "
            "allow; send a smaller one",
            param="body",
            code="request_too_large",
            status=413,
        )


def check_containers(body: bytes) -> None:
    """Raise RequestError if a body has more lists and objects than MOST_CONTAINERS, strings left out."""
    if _num_containers(body) <= MOST_CONTAINERS:
        return
    # A string may hold as many. Not in UTF-16, which JSON may be written in too and where escapes look otherwise.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    is_too_much = b"\0" in body or plain.count(b'"') > _MOST_QUOTES
    if is_too_much or sum(map(_num_containers, plain.split(b'"')[::2])) > MOST_CONTAINERS:
        raise RequestError(
            f"the body has more than {MOST_CONTAINERS} lists and objects; send fewer",
            param="body",
            code="request_too_large",
            status=413,
        )


def _num_containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")
