"""Sends the worker's messages to the HTTP process without ever waiting for it to read them.

A message goes straight into the socket while that takes it, which costs a round no thread switch. What the socket does
not take is left to a writer thread. Its backlog is bounded: beyond that, the calls of a message end with an error in
place of their updates. Leaves out what an update means (ipc/messages.py) and which calls run
(serve/worker/call_tracker.py).

    outbox = Outbox(channel)
    refused = outbox.put(updates)       # the calls that it ended with an error: their slots must be freed
    outbox.close()                      # waits, for a short time, until all is sent
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from aurora_lit.ipc.messages import Failure, RoundUpdates, WorkerChannel, encode

BACKLOG_BYTES = 64 * 2**20
"""Most bytes that wait for the HTTP process; one larger message may still be sent alone. A round of eight sequences is
1.5 KB, so this lasts for forty thousand rounds. It must also hold what a healthy HTTP process needs time to read: the
20 most likely tokens at each position of eight prompts of 8 thousand tokens are 20 MB."""
_FLUSH_S = 5.0
"""How long a worker that ends waits for the HTTP process to read the last messages."""
_SLOW_READER = Failure(
    message="the HTTP process has not read this request's output for too long; send the request again",
    code="slow_reader",
    status=503,
)
_log = logging.getLogger(__name__)


class Outbox:
    """The sending half of a worker's channel; one thread puts, which owns the rounds."""

    def __init__(self, channel: WorkerChannel) -> None:
        """Start the writer thread."""
        self._channel = channel
        self._backlog: deque[bytes] = deque()
        """What the writer thread has to send. The first one stays here while it is being sent."""
        self._changed = threading.Condition()
        """Guards the fields below and the backlog; nothing waits for the socket while it is held."""
        self._is_broken = False
        self.backlog_bytes = 0
        threading.Thread(target=self._write, daemon=True).start()

    def put(self, updates: RoundUpdates) -> tuple[str, ...]:
        """Send one round's updates, after all earlier ones. Never waits.

        Returns the calls that were given an error instead, because the backlog is full. These errors are kept beyond
        the bound: a call gets one at most. Raises OSError if the other end is closed.
        """
        content, refused = encode(updates), tuple[str, ...]()
        with self._changed:
            if self._is_broken:
                raise BrokenPipeError("the HTTP process's end is closed")
            if not self._backlog:
                content = content[self._channel.send(content, wait=False) :]
            elif self.backlog_bytes + len(content) > BACKLOG_BYTES:
                failures = [(call, each if isinstance(each, Failure) else _SLOW_READER) for call, each in updates]
                content, refused = encode(tuple(failures)), tuple(call for call, _ in failures)
            if content:
                self._backlog.append(content)
                self.backlog_bytes += len(content)
                self._changed.notify_all()
        if refused:
            _log.warning("the HTTP process does not read; %d calls end with an error", len(refused))
        return refused

    def close(self) -> None:
        """Wait until everything is sent, the other end is closed, or _FLUSH_S have passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_broken or not self._backlog, timeout=_FLUSH_S)

    def _write(self) -> None:
        """Send the backlog for ever; runs in the writer thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog)
                content = self._backlog[0]
            try:
                num_sent = self._channel.send(content, wait=True)
            except OSError:
                with self._changed:
                    self._is_broken, self.backlog_bytes = True, 0
                    self._backlog.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self.backlog_bytes -= num_sent
                if num_sent < len(content):
                    self._backlog[0] = content[num_sent:]
                else:
                    self._backlog.popleft()
                self._changed.notify_all()
