"""What a connection may send, and how long it may take, before anything knows its key."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from aurora_lit.serve.http import connection
from aurora_lit.serve.http.connection import MOST_HEAD_BYTES, LimitedConnection

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def _answer_after_the_body(scope: Any, receive: Any, send: Any) -> None:
    """Waits for the body, and then longer than for a head or a body."""
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    if message["type"] == "http.request":
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Connects a client to a server of this process that waits a fifth of a second for heads and bodies."""
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    monkeypatch.setattr(connection, "BODY_S", 0.2)

    async def serve(client: Client, app: Any) -> None:
        config, state = Config(app, log_config=None, lifespan="off"), ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: LimitedConnection(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            async with asyncio.timeout(10):
                await client(reader, writer)
        finally:
            writer.close()
            server.close()
            await asyncio.sleep(0.05)  # until both ends have closed
        assert not state.connections

    return lambda client, app=_answer_after_the_body: asyncio.run(serve(client, app))


async def _refused(reader: asyncio.StreamReader, status: int, code: str) -> None:
    """The rest of the connection must be this error."""
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert json.loads(body)["error"]["code"] == code


@pytest.mark.parametrize("begin", [b"GET /", GET[:-2] + b"X: ", POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: "])
def test_a_head_or_trailer_without_end_is_refused_at_64_kib(begin: bytes, speak: Callable[[Client], None]) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        num_sent = 0
        writer.write(begin)
        while not reader.at_eof() and not reader._buffer and num_sent < 100 * MOST_HEAD_BYTES:  # type: ignore[attr-defined]
            writer.write(b"a" * 4096)
            num_sent += 4096
            await asyncio.sleep(0.0005)
        assert num_sent < 3 * MOST_HEAD_BYTES
        await _refused(reader, 431, "request_too_large")

    speak(client)


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GE", POST + b"Content-Length: 5\r\n\r\nhal"])
def test_what_is_not_completed_in_time_is_refused(sent: bytes, speak: Callable[[Client], None]) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await _refused(reader, 408, "request_timeout")

    speak(client)


def test_a_drop_now_and_then_does_not_help(speak: Callable[[Client], None]) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(POST)
        for _ in range(100):
            if reader._buffer:  # type: ignore[attr-defined]
                break
            writer.write(b"X: 1\r\n")
            await asyncio.sleep(0.05)
        await _refused(reader, 408, "request_timeout")

    speak(client)


def test_only_the_request_is_waited_for_and_not_its_answer(speak: Callable[[Client], None]) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for request in (GET, POST + b"Content-Length: 5\r\n\r\nwhole", GET + GET[:5]):
            writer.write(request)
            assert b"200 OK" in await reader.readuntil(b"ok")
        await _refused(reader, 408, "request_timeout")

    speak(client)


LARGE = 20_000_000


async def _answer_at_length(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a" * LARGE})


@pytest.mark.parametrize("reads", [False, True])
def test_an_answer_is_kept_as_long_as_its_client_reads(
    reads: bool, speak: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 0.2)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GET)
        num_read = 0
        await asyncio.sleep(0 if reads else 0.6)
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1_000_000):
                num_read += len(piece)
                await asyncio.sleep(0.01)
                if num_read > LARGE:
                    break
        assert (num_read > LARGE) == reads

    speak(client, _answer_at_length)


def test_what_is_no_http_gets_an_error_body(speak: Callable[[Client], None]) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x16\x03\x01hello\r\n\r\n")
        await _refused(reader, 400, "invalid_http")

    speak(client)
