"""The HTTP process's end of the sockets to the engine worker, as LitServe's transport and its request queue.

LitServe reads responses from a transport and puts requests into a queue; this object is both. Leaves out the messages
and the worker's end (ipc/messages.py), and what becomes of an update (worker_client.py).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus, LoopResponseType

from aurora_lit.ipc.messages import LENGTH, CallMessage, Failure, RoundUpdates, decode_updates, encode

RESPONSES_UID = "every call"
"""LitServe files a response under the uid of its request. All our messages have this one; worker_client.py distributes
their updates by call id."""
_DAMAGED = Failure(message="a message of the engine worker was damaged", code="engine_error")
_log = logging.getLogger(__name__)


class HTTPChannel(MessageTransport):  # type: ignore[misc]
    """The receiving transport and the request queue of LitServe; made before the HTTP process is forked."""

    def __init__(self, connection: socket.socket) -> None:
        """connection: one of a pair, whose other end the worker has."""
        self._connection = connection
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._unsent = b""

    def put(self, message: CallMessage) -> None:
        """Send a call or its end to the worker. Never waits: what the socket does not take is sent later."""
        content = encode(message)
        if self._writer is None:  # LitServe has not begun to receive; the first requests may come before
            self._unsent += content
        else:
            self._writer.write(content)

    def send(self, item: Any, consumer_id: int) -> None:
        """Required by LitServe and not called: the worker sends by its own end."""
        raise NotImplementedError

    async def areceive(self, consumer_id: int | None = None, timeout: int | None = None, block: bool = True) -> Any:
        """The next message, in the shape that LitServe unpacks.

        A message that cannot be decoded is logged and becomes a `Failure` in place of the updates; the next one is read
        as usual. Raises CancelledError, as LitServe expects, when the worker's end is closed.
        """
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(sock=self._connection)
            self._writer.write(self._unsent)
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            payload = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise asyncio.CancelledError("the engine worker's end is closed") from error
        updates: RoundUpdates | Failure
        try:
            updates = decode_updates(payload)
        except ValueError as error:  # raised from here, it would make LitServe stop to deliver responses at all
            _log.error("%s; all running requests fail", error)
            updates = _DAMAGED
        return RESPONSES_UID, (updates, LitAPIStatus.OK, LoopResponseType.STREAMING, 0)

    def close(self, **_: Any) -> None:
        """Close this process's end."""
        if self._writer is not None:
            self._writer.close()
        self._connection.close()
