"""The engine worker's messages on their way to the HTTP process: a socket in place of LitServe's queue.

That queue lies in a process of its own: each message wakes it twice and waits for its reply twice, on the cores that
rounds run on. Requests still come over it: they are few. What is left out: what is said (ipc/messages.py).
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from typing import Any

from litserve.transport.base import MessageTransport

_LENGTH = struct.Struct("<Q")


class SocketTransport(MessageTransport):  # type: ignore[misc]
    """One sender, the first engine worker, and one receiver; made before either process is.

    A sender whose messages nobody reads waits once the socket's buffer is full, which is some hundred rounds.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._receiving, self._sending = socket.socketpair()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None  # kept, or the stream closes

    def send(self, item: Any, consumer_id: int) -> None:
        """Hand a message on; `consumer_id` is LitServe's number of the HTTP process, of which there is one."""
        payload = pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
        self._sending.sendall(_LENGTH.pack(len(payload)) + payload)

    async def areceive(self, consumer_id: int | None = None, timeout: int | None = None, block: bool = True) -> Any:
        """The next message. Raises CancelledError when no more can come, as LitServe wants it."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(sock=self._receiving)
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return pickle.loads(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise asyncio.CancelledError("the engine worker's end is closed") from error

    def close(self, **_: Any) -> None:
        """Let go of this process's ends."""
        if self._writer is not None:
            self._writer.close()
        self._receiving.close()
        self._sending.close()
