"""How a stream's chunks are sent: as server-sent events, filled up to a fixed size, on a clock.

Someone who sees an encrypted connection sees the size and the time of each message. A message for each round, or for
few, shows how many of their proposals were accepted, and that pattern tells answers apart (arXiv 2411.01076). A clock
hides the rounds, and filling hides the lengths of texts. Both are off by default; docs/privacy.md says what stays
visible. A stream whose client does not read is ended, since everything that was not sent is kept.

Leaves out what a chunk holds (serve/http/responses.py).

    clock = SendClock(interval_s=0.1)
    await asyncio.sleep(clock.wait_s())          # then send everything that is ready
    event(chunk, padding_bytes=512)              # the event whose JSON has 512, 1024, … bytes
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from aurora_lit.serve.http.schema import StreamOptions

OBFUSCATION_BYTES = 512
"""Chunks are filled to multiples of this if a request asks for it and the server has no size of its own."""
DONE = "data: [DONE]\n\n"
"""The event that ends a stream."""
COMMENT = ": waiting\n\n"
"""What a stream sends when there is nothing to send, so that nobody on the way takes it for dead; clients ignore it."""
COMMENT_EVERY_S = 10.0
SLOW_READER_S = 60.0
"""A stream ends whose client has so much unread for this time that no message can be sent."""
_END = '"}'
"""What follows the characters of `obfuscation` in a chunk."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Characters that end a line for some readers and that JSON need not escape; they stand in strings only."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """What a deployment does to hide its streams' rounds."""

    interval_s: float = 0.0
    """Time between two messages of a stream; 0: as they come from the engine worker."""
    padding_bytes: int = 0
    """The JSON of a chunk has a multiple of this many bytes; 0: its own length."""

    def padding_for(self, options: StreamOptions) -> int:
        """Padding of one stream: a request may ask for it, or do without."""
        if options.include_obfuscation is None:
            return self.padding_bytes
        return (self.padding_bytes or OBFUSCATION_BYTES) if options.include_obfuscation else 0


class SendClock:
    """Says when a stream may send: at the ends of intervals that begin when the clock is made."""

    def __init__(self, interval_s: float) -> None:
        """interval_s: 0 for a clock that lets everything be sent at once."""
        self._interval_s, self._started_s = interval_s, time.monotonic()
        self._num_intervals = 0
        """Intervals up to the last end that was taken."""

    @property
    def is_on(self) -> bool:
        """True if sending waits."""
        return self._interval_s > 0

    def wait_s(self) -> float:
        """Seconds until the next end of an interval, which is then taken: a second call means the one after it."""
        if not self.is_on:
            return 0.0
        elapsed_s = time.monotonic() - self._started_s
        self._num_intervals = max(self._num_intervals, math.floor(elapsed_s / self._interval_s)) + 1
        return self._num_intervals * self._interval_s - elapsed_s


class EventStream(StreamingResponse):
    """The response that sends a stream's events. At its end, whatever ends it, it closes their generator."""

    def __init__(self, events: AsyncGenerator[str], *, on_end: Callable[[], None]) -> None:
        """events: complete server-sent events, one or more at a time. on_end: called at the end, also if none of them
        was asked for, when the generator itself does nothing."""
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._on_end = events, on_end

    async def stream_response(self, send: Send) -> None:
        """Send all events; end without the last message if the client does not read for SLOW_READER_S."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SLOW_READER_S):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            _log.warning("ended a stream whose client had not read for %.0f s", SLOW_READER_S)
        finally:
            await self._events.aclose()
            self._on_end()


def event(chunk: dict[str, Any], *, padding_bytes: int = 0) -> str:
    """One chunk as a server-sent event.

    With padding, its JSON ends with the field `obfuscation`, as in OpenAI's API: random characters that fill it up to
    the next multiple of `padding_bytes` in UTF-8. They are random so that no compression on the way undoes the filling.
    """
    if not padding_bytes:
        return f"data: {to_json(chunk)}\n\n"
    text = to_json({**chunk, "obfuscation": ""})
    num_missing = -len(text.encode()) % padding_bytes
    filling = secrets.token_urlsafe(num_missing)[:num_missing]
    return f"data: {text.removesuffix(_END)}{filling}{_END}\n\n"


def to_json(content: dict[str, Any]) -> str:
    """JSON on one line, also for readers that end a line where Python's `str.splitlines` does, as httpx does."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else text.translate(_LINE_ENDS)
