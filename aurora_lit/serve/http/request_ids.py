"""`x-request-id`: a request's name, given by the client or made here, in its response and in what is logged meanwhile.

Leaves out a call's own id (serve/http/routes.py), which is unique where clients' names need not be.

    app.add_middleware(RequestIds)
    logging.getLogger().handlers[0].addFilter(name_request)    # lines then end with [request …]
"""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_VALID = re.compile(r"[!-~]{1,128}")
"""Printable and without spaces: it goes into logs. Another one is replaced."""
_current: ContextVar[str] = ContextVar("request id", default="")


class RequestIds:
    """Middleware around all others, so that refused requests have a name too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _VALID.fullmatch(given) else uuid.uuid4().hex
        _current.set(request_id)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_named)


def name_request(record: logging.LogRecord) -> bool:
    """A filter that lets every record through, and adds the name of the request that it belongs to."""
    if _current.get() and isinstance(record.msg, str) and "[request " not in record.msg:
        record.msg = f"{record.msg} [request {_current.get().replace('%', '%%')}]"
    return True
