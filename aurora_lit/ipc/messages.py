"""The messages between the HTTP process and the engine worker, and the socket that carries responses.

HTTP process → worker: a `Call`, or `CANCEL` with a call's id, over LitServe's request queue. That queue is LitServe's
own and pickles what it carries; both of its ends belong to this server.

Worker → HTTP process: one message a round, with a `CallUpdate` for each call that the round concerns. It is encoded as
msgpack, decoded by type, and goes through a socket (`ResponseTransport`) in place of LitServe's response queue. That
queue lives in a process of its own: each message would wake it twice and wait twice for its reply, on the cores that
rounds run on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus, LoopResponseType

from aurora_lit.request import Request, TokenLogprob

CANCEL = "cancel"
"""What the HTTP process sends in place of a `Call` when its client has gone."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One client call: all the sequences it asked for (n choices of each prompt)."""

    call_id: str
    requests: tuple[Request, ...]
    """In the order of the response's choices."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one round added to one choice."""

    index: int
    """Position in Call.requests."""
    text: str
    """Whole characters that later tokens cannot change; may be empty although there are new tokens."""
    token_ids: tuple[int, ...]
    """Tokens that count as output: up to the one that completed a stop string."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_proposed: int = 0
    num_accepted: int = 0
    finish_reason: str | None = None
    """"stop" or "length" with the choice's last delta."""
    draft_versions: tuple[str, ...] = ()
    """Draft versions that have proposed for the choice so far."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The call as a whole ended with an error; the fields are those of OpenAI's error body."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 500


CallUpdate = tuple[Delta, ...] | Failure
"""What one round brings one call."""
RoundUpdates = tuple[tuple[str, CallUpdate], ...]
"""One message of the worker: (call id, update) of every call that it concerns."""
RESPONSES_UID = "every call"
"""LitServe files a response under the uid of its request. All our messages have this one; the HTTP process distributes
their updates by call id."""

_LENGTH = struct.Struct("<Q")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RoundUpdates)
_DAMAGED = Failure(message="a message of the engine worker was damaged", code="engine_error")


def encode_updates(updates: RoundUpdates) -> bytes:
    """One message as msgpack. Raises TypeError for values that are no messages."""
    return _encoder.encode(updates)


def decode_updates(payload: bytes) -> RoundUpdates:
    """Inverse of `encode_updates`. Raises ValueError, which names the wrong field, for anything else than a message."""
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"{len(payload)} bytes are no message of the engine worker: {error}") from error


class ResponseTransport(MessageTransport):  # type: ignore[misc]
    """LitServe's transport from one sender, the first engine worker, to one receiver, the HTTP process.

    Create it before either process starts. A sender whose messages are not read blocks once the socket's buffer is
    full, which is after some hundred rounds.
    """

    def __init__(self) -> None:
        """Open the socket pair. Raises OSError."""
        self._receiving, self._sending = socket.socketpair()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None  # kept: without a reference to it the stream closes

    def send(self, item: Any, consumer_id: int) -> None:
        """Send what `LitLoop.put_response` hands over: (uid, (updates, status, response type, worker id)).

        consumer_id: LitServe's number of the HTTP process; there is one. Only the updates travel: the rest is constant.
        """
        uid, (updates, status, _, _) = item
        if uid != RESPONSES_UID or status != LitAPIStatus.OK:
            raise ValueError(f"a response with uid={uid!r} and status={status!r} is not one of EngineLoop")
        payload = encode_updates(updates)
        self._sending.sendall(_LENGTH.pack(len(payload)) + payload)

    async def areceive(self, consumer_id: int | None = None, timeout: int | None = None, block: bool = True) -> Any:
        """The next message, in the shape that LitServe unpacks.

        A message that cannot be decoded is logged and becomes a `Failure` in place of the updates; the next one is read
        as usual. Raises CancelledError, as LitServe expects, when the worker's end is closed.
        """
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(sock=self._receiving)
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
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
        """Close this process's ends."""
        if self._writer is not None:
            self._writer.close()
        self._receiving.close()
        self._sending.close()
