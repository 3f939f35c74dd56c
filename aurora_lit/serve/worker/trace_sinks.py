"""Destinations of the engine's traces: the ring for a learner, and a folder on disk if trace.record names one.

Neither delays a round. The ring never waits. A thread writes to disk from a short queue; a trace that does not fit into
the queue, or that a full disk refuses, is counted and dropped.

    sinks = TraceSinks(ring=RingWriter.open(path, layout=LAYOUT_DIGEST), recording=TraceRecording(folder, max_bytes=n))
    recorder = TraceRecorder(sinks, ...)
    sinks.close()                           # writes what is pending
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

from aurora_lit.ipc.ring import RingWriter
from aurora_lit.kernels import native
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace, to_pieces

_QUEUE_TRACES = 16
_SHARDS_AT_LEAST = 16
"""The log's size limit is divided into at least this many shards, so that deleting the oldest loses little."""
_SHARD_BYTES = 32 << 20
_logger = logging.getLogger(__name__)


class TraceRecording:
    """A trace log of limited size, written by a thread that the constructor starts."""

    def __init__(self, folder: Path, *, max_bytes: int, flush_s: float = 10.0) -> None:
        """flush_s: longest time before a pending trace is written.

        Raises BlockingIOError if another process records in the folder, another OSError if it cannot be made.
        """
        self.written = 0
        """Traces written to disk."""
        self.dropped = 0
        """Traces dropped because the disk was full or too slow."""
        self._folder, self._flush_s = folder, flush_s
        self._shard_bytes = min(_SHARD_BYTES, max_bytes // _SHARDS_AT_LEAST)
        # Shards are closed by bytes, not by positions: traces of equal length differ much in size.
        self._log = TraceLogWriter(folder, kind="live", shard_positions=1 << 62, max_bytes=max_bytes)
        self._pending = self._pending_bytes = 0
        self._has_logged_error = False
        self._queue: queue.Queue[Trace | None] = queue.Queue(_QUEUE_TRACES)
        self._thread = threading.Thread(target=self._run, name="trace-recording", daemon=True)
        self._thread.start()

    def put(self, trace: Trace) -> None:
        """Queue a copy of a trace, or drop it if the queue is full. Not thread-safe."""
        if self._queue.full():
            self.dropped += 1
        else:
            self._queue.put_nowait(trace.copy())

    def close(self) -> None:
        """Write what is pending and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._log.close()

    def _run(self) -> None:
        native.compute_alone()
        due_s = float("inf")
        while True:
            wait_s = min(self._flush_s, max(0.0, due_s - time.monotonic()))
            try:
                trace = self._queue.get(timeout=wait_s)
            except queue.Empty:
                self._flush()
                due_s = float("inf")
                continue
            if trace is None:
                self._flush()
                return
            if not self._pending:
                due_s = time.monotonic() + self._flush_s
            self._log.append(trace)
            self._pending += 1
            self._pending_bytes += trace.num_bytes
            if self._pending_bytes >= self._shard_bytes or time.monotonic() >= due_s:
                self._flush()
                due_s = float("inf")

    def _flush(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, 0, 0
        try:
            self._log.flush()
            self.written += pending
        except Exception as error:  # such as a full disk; whatever it is, later traces may be written
            self.dropped += pending
            if not self._has_logged_error:
                _logger.error("traces cannot be recorded in %s (%s); serving continues without", self._folder, error)
            self._has_logged_error = True


class TraceSinks:
    """The recorder's sink: passes each trace to the ring, as soon as a learner has opened it, and to the recording."""

    def __init__(self, *, ring: RingWriter | None, recording: TraceRecording | None = None) -> None:
        """None: that destination is off."""
        self.ring = ring
        self.recording = recording
        self._has_mapped_ring = False

    def __call__(self, trace: Trace) -> None:
        """Pass a trace on. Never waits, and keeps no reference to the trace's memory."""
        if self.ring is not None and self.ring.is_reserved:
            if not self._has_mapped_ring:
                self._has_mapped_ring = True
                threading.Thread(target=self.ring.map_pages, name="ring-pages", daemon=True).start()
            self.ring.push(*to_pieces(trace))
        if self.recording is not None:
            self.recording.put(trace)

    def close(self) -> None:
        """Write what is pending."""
        if self.ring is not None:
            self.ring.close()
        if self.recording is not None:
            self.recording.close()
