"""A connection of uvicorn's that may send so many bytes, and take so many seconds, before its request is complete.

Nothing here has seen a key yet. What is not read of an answer is not kept for ever either. Leaves out how large a body
may be, which depends on settings (bodies.py).

    server.run(http=LimitedConnection)
"""

from __future__ import annotations

import json
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.errors import error_body

MOST_HEAD_BYTES = 1 << 16
"""Of a request's head, or of what follows its body; the bytes of one read may come on top."""
HEAD_S = 10.0
"""From the connection, or the first byte of its next request, to the end of the head."""
BODY_S = 60.0
"""From there to the end of the body."""
UNREAD_S = 60.0
"""A connection ends whose client has read nothing of an answer for so long; all that is unread stays in memory."""


class LimitedConnection(HttpToolsProtocol):
    """waiting for a head (HEAD_S) → for the rest of a body (BODY_S) → none of both, until the next request begins."""

    _num_unread = 0
    """Bytes since the end of the last head, of the last part of a body or of the last request."""
    _deadline: TimerHandle | None = None
    _reader_deadline: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client that sends nothing is not waited for either."""
        super().connection_made(transport)
        self._wait("head", HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline, which would keep this object alive."""
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has much to read: see that it does."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has read nearly all."""
        super().resume_writing()
        self._stop_watching()

    def data_received(self, data: bytes) -> None:
        """Read on; without end if the parser kept what it has not understood yet."""
        self._num_unread += len(data)
        super().data_received(data)
        if self._num_unread > MOST_HEAD_BYTES:
            message = f"the request's head is larger than {MOST_HEAD_BYTES >> 10} KiB; send fewer or shorter headers"
            self._refuse(RequestError(message, code="request_too_large", status=431))
        elif self._num_unread and self._deadline is None:
            self._wait("head", HEAD_S)

    def on_message_begin(self) -> None:
        """Its first byte may have come with the end of another request."""
        self._num_unread = max(1, self._num_unread)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The next deadline is the body's; without one `on_message_complete` follows at once."""
        self._num_unread = 0
        self._wait("body", BODY_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._num_unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._num_unread = 0
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed gets OpenAI's error body too."""
        self._refuse(RequestError("the request is no valid HTTP/1.1", code="invalid_http"))

    def _wait(self, for_what: str, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self._end_waiting, for_what, seconds)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_waiting(self, for_what: str, seconds: float) -> None:
        self._deadline = None
        is_next = for_what == "head" and self.cycle is not None and not self.cycle.response_complete
        if is_next or self.flow.read_paused:  # it waits for an earlier request, or for us
            self._wait(for_what, seconds)
            return
        message = f"the {for_what} of the request was not complete within {seconds:g} s; send it faster"
        self._refuse(RequestError(message, code="request_timeout", status=408))

    def _watch_reader(self) -> None:
        num_unread = self.transport.get_write_buffer_size()
        self._reader_deadline = self.loop.call_later(UNREAD_S, self._check_reader, num_unread)

    def _check_reader(self, num_unread_before: int) -> None:
        if self.transport.get_write_buffer_size() < num_unread_before:
            self._watch_reader()
        else:
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def _refuse(self, error: RequestError) -> None:
        """End the connection, after an answer if none has begun."""
        self._stop_waiting()
        self._num_unread = 0
        if self.transport.is_closing():
            return
        is_answering = self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started
        if not is_answering:
            self.transport.write(_response(error))
        self.transport.close()


def _response(error: RequestError) -> bytes:
    body: dict[str, Any] = error_body(error)
    content = json.dumps(body).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[error.status] + head.encode() + content
