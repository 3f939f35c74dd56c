"""The messages between the HTTP process and the engine worker, and the pair of sockets that carries them.

HTTP process → worker: a `Call`, a `CancelRequest` or `CANCEL`, with the call's id. Worker → HTTP process: one message
for one or several rounds, with a `CallUpdate` for each call that they concern. It holds token ids; text is made in
the HTTP process (serve/http/answer_stream.py). Both are msgpack, decoded by type, and go through a pair of connected
sockets in place of LitServe's queues. Those live in a process of their own: each message would wake it twice and wait
twice for its reply, on the cores that rounds run on.

Here is the worker's end, `WorkerChannel`, which serve/worker/outbox.py sends by; the HTTP process's end belongs to its
event loop (serve/http/channel.py).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from aurora_lit.request import Request, Source, TokenLogprob

CANCEL: Literal["cancel"] = "cancel"
"""What the HTTP process sends in place of a `Call` when its client has gone: no request of the call goes on."""


class CancelRequest(NamedTuple):
    """What the HTTP process sends when one request of a call has reached a stop string; the call's others go on."""

    request_index: int
    """Position in Call.requests."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One client call: all the sequences it asked for (n choices of each prompt)."""

    call_id: str
    requests: tuple[Request, ...]
    """In the order of the response's choices."""
    is_answered_whole: bool = False
    """True: nobody looks at an answer before it ends, so that its deltas may come late."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one round added to one choice, as the engine produced it: stop strings are not looked for yet."""

    index: int
    """Position in Call.requests."""
    token_ids: tuple[int, ...]
    """New tokens, including the end-of-text token if it ended the choice."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_proposed: int = 0
    num_accepted: int = 0
    accepted_from: tuple[Source, ...] = ()
    """For each accepted token, which come first, what proposed it."""
    finish_reason: str | None = None
    """"stop" (end of text or stop token), "length" or "error" with the choice's last delta."""
    error: str | None = None
    """The reason if finish_reason is "error"."""
    draft_versions: tuple[str, ...] = ()
    """Draft versions that have proposed for the choice so far."""
    domain: str = ""
    """The domain that the choice is served as; "" without one."""
    num_cached_tokens: int = 0
    """Tokens of its prompt that the prefix cache had."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The call as a whole ended with an error; the fields are those of OpenAI's error body."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 500


CallUpdate = tuple[Delta, ...] | Failure
"""What one round brings one call; or several rounds, in their order."""
RoundUpdates = tuple[tuple[str, CallUpdate], ...]
"""One message of the worker: (call id, update) of every call that it concerns."""
CallMessage = tuple[str, Call | CancelRequest | Literal["cancel"]]
"""One message of the HTTP process: the call's id, and what is asked for."""

LENGTH = struct.Struct("<Q")
"""Precedes each message: its length in bytes."""
_encoder = msgspec.msgpack.Encoder()
_updates_decoder = msgspec.msgpack.Decoder(RoundUpdates)
_call_decoder = msgspec.msgpack.Decoder(CallMessage)
_id_decoder = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


class UnreadableError(ValueError):
    """Bytes that are no message of the HTTP process."""

    def __init__(self, message: str, *, call_id: str) -> None:
        """call_id: of the call that they were about; "" if not even that can be read."""
        super().__init__(message)
        self.call_id = call_id


def encode(message: RoundUpdates | CallMessage) -> bytes:
    """One message as msgpack, after its length. Raises TypeError for values that are no messages."""
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


def decode_updates(payload: bytes) -> RoundUpdates:
    """What `encode` made of a worker's message. Raises ValueError, which names the wrong field, for anything else."""
    try:
        return _updates_decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"{len(payload)} bytes are no message of the engine worker: {error}") from error


def decode_call(payload: bytes) -> CallMessage:
    """What `encode` made of a call or its end. Raises UnreadableError, which names the wrong field."""
    try:
        call: CallMessage = _call_decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:
        try:
            call_id = _id_decoder.decode(payload)[0]
        except (msgspec.MsgspecError, ValueError):
            call_id = ""
        message = f"{len(payload)} bytes are no message of the HTTP process: {error}"
        raise UnreadableError(message, call_id=call_id) from error
    return call


class WorkerChannel:
    """The engine worker's end. One thread may send while another receives.

    If the HTTP process does not read, the socket's buffer is full after some hundred rounds.
    """

    def __init__(self, connection: socket.socket) -> None:
        """connection: one of a pair; can be sent to a process that is being started."""
        self._connection = connection

    def send(self, content: bytes, *, wait: bool) -> int:
        """Send the beginning of encoded messages; returns how many bytes of it the socket has taken.

        wait: until it takes some. Otherwise 0 if its buffer is full. Raises OSError if the other end is closed.
        """
        try:
            return self._connection.send(content, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive(self) -> CallMessage:
        """Wait for the next message. Raises EOFError if the other end is closed, UnreadableError."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        return decode_call(self._read(length))

    def close(self) -> None:
        """Close this process's end."""
        self._connection.close()

    def _read(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            piece = self._connection.recv(min(length - len(content), 1 << 20))
            if not piece:
                raise EOFError("the HTTP process's end is closed")
            content += piece
        return bytes(content)
