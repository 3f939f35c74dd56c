"""The live page at `GET /`: its files, and what it shows as server-sent events. Only where `server.page` has it.

    GET /  /aurora/page.css  page.js  fences.js  open, since they hold no data
    GET /v1/aurora/events                        needs the API key

One task samples the status for all viewers: once a second while somebody watches, else rarely, so that a page that is
opened later has a past to show. A viewer that reads slowly misses samples, and nothing waits for it. Leaves out what a
sample holds (serve/http/history.py) and the page itself (static/).

The stream begins with an event `history` (`points`, `events`, `report`, `first_lengths`); then comes an event `sample`
(`point` in place of `points`) for each sample, or another `history` where the clock was set. Reports are those of
GET /v1/aurora/status.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import Response, StreamingResponse

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.history import History
from aurora_lit.serve.http.stream_events import to_json

Json = dict[str, Any]
SAMPLE_S = 1.0
IDLE_SAMPLE_S = 15.0
"""While nobody watches."""
MAX_VIEWERS = 32
_CLOCK_SET_S = 5.0
"""By so much the clock must have been set for the history to follow."""
_STATIC = Path(__file__).with_name("static")
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/aurora/page.css": ("page.css", "text/css; charset=utf-8"),
    "/aurora/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/aurora/fences.js": ("fences.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class LivePage:
    """The page's routes and its sampler.

    >>> page = LivePage(read_report, read_latencies)
    >>> page.add_routes(app, authorize=api.authorize)
    >>> async with page.sampling(): ...     # while the app runs
    """

    def __init__(self, report: Callable[[], Json], latencies: Callable[[], Json]) -> None:
        """report: that of GET /v1/aurora/status. latencies: name → (seconds in total, count)."""
        self._report, self._latencies = report, latencies
        self.history = History()
        self.num_viewers = 0
        self._closed = False
        self._epoch_s = time.time() - _since_boot_s()
        """When the machine started, as the clock says; the history stays in order when the clock is set."""
        self._sampled, self._watched = asyncio.Event(), asyncio.Event()

    def add_routes(self, app: FastAPI, *, authorize: Callable[..., None]) -> None:
        """Register the routes; `authorize` guards the events.

        None is in /openapi.json: programs that try out its routes would wait for the end of the events.
        """
        for path, (name, media_type) in FILES.items():
            response = Response((_STATIC / name).read_bytes(), media_type=media_type, headers=HEADERS)
            app.add_api_route(path, _always(response), methods=["GET", "HEAD"], include_in_schema=False)
        dependencies = [Depends(authorize)]
        app.add_api_route("/v1/aurora/events", self.events, dependencies=dependencies, include_in_schema=False)

    @contextlib.asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Inside the context, the history grows and viewers get its samples."""
        task = asyncio.create_task(self._sample_for_ever())
        task.add_done_callback(lambda _: self.close())  # should it fail, viewers see their streams end
        try:
            yield
        finally:
            self.close()
            task.cancel()

    def close(self) -> None:
        """End all streams: the server shuts down, and waits for its connections."""
        self._closed = True
        self._sampled.set()

    async def events(self) -> StreamingResponse:
        """GET /v1/aurora/events. Raises RequestError if too many watch."""
        if self.num_viewers >= MAX_VIEWERS:
            raise RequestError(
                f"{MAX_VIEWERS} pages watch already; close one, or read /v1/aurora/status",
                status=503,  # 429 counts as a refused request
                code="too_many_viewers",
            )
        return StreamingResponse(self.messages(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def messages(self) -> AsyncIterator[str]:
        """One viewer's events, until it leaves or the server shuts down."""
        self.num_viewers += 1
        self._watched.set()
        try:
            if self.num_viewers == 1:  # the last sample is an old one
                self._sample()
            history, message = self.history, self._whole_history()
            while True:
                last_event, epoch_s, sampled = history.num_events, self._epoch_s, self._sampled
                yield message
                await sampled.wait()  # no wait if there was a sample while the message was sent
                if self._closed:
                    return
                events = history.events_after(last_event)
                message = self._message("sample", point=history.points[-1], events=events)
                if self._epoch_s != epoch_s:
                    message = self._whole_history()
        finally:
            self.num_viewers -= 1
            if self.num_viewers == 0:
                self._watched.clear()

    def _whole_history(self) -> str:
        return self._message("history", points=self.history.points, events=self.history.events_after(0))

    def _message(self, event: str, **content: Any) -> str:
        content |= {"report": self.history.report, "first_lengths": self.history.first_lengths}
        return f"event: {event}\ndata: {to_json(content)}\n\n"

    async def _sample_for_ever(self) -> None:
        while True:
            self._sample()
            if self.num_viewers:
                await asyncio.sleep(SAMPLE_S)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._watched.wait(), IDLE_SAMPLE_S)
                    await asyncio.sleep(SAMPLE_S)  # the viewer has taken a sample itself

    def _sample(self) -> None:
        since_boot_s = _since_boot_s()
        set_by_s = time.time() - since_boot_s - self._epoch_s
        if abs(set_by_s) > _CLOCK_SET_S:
            self._epoch_s += set_by_s
            self.history.shift(set_by_s)
        self.history.add(self._report(), latencies=self._latencies(), now_s=self._epoch_s + since_boot_s)
        # Whoever waits now is woken; who comes back waits for the next sample.
        sampled, self._sampled = self._sampled, asyncio.Event()
        sampled.set()


def _since_boot_s() -> float:
    """Of a clock that is never set, and goes on while the machine sleeps, as time.monotonic() does not.

    Without Linux' CLOCK_BOOTTIME that is macOS' CLOCK_MONOTONIC.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _always(response: Response) -> Callable[[], Any]:
    async def respond() -> Response:
        return response

    return respond
