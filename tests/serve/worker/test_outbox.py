"""Outbox: an HTTP process that does not read stops no round, costs bounded memory, and later reads whole messages."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from aurora_lit.ipc.messages import LENGTH, Delta, Failure, RoundUpdates, WorkerChannel, decode_updates, encode
from aurora_lit.serve.worker import outbox as outbox_module
from aurora_lit.serve.worker.outbox import Outbox

BACKLOG_BYTES = 200_000
SOCKET_BYTES = 1 << 20
"""More than a socket's buffer holds."""


class Reader:
    """The HTTP process's end: reads only when asked."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self.num_bytes = connection, 0
        connection.settimeout(20)

    def read(self) -> RoundUpdates:
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        return decode_updates(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        content = b""
        while len(content) < length:
            content += self._connection.recv(length - len(content))
        self.num_bytes += length
        return content

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Outbox, Reader]]:
    monkeypatch.setattr(outbox_module, "BACKLOG_BYTES", BACKLOG_BYTES)
    http_end, worker_end = socket.socketpair()
    reader = Reader(http_end)
    yield Outbox(WorkerChannel(worker_end)), reader
    reader.close()
    worker_end.close()


def update(number: int, *call_ids: str) -> RoundUpdates:
    return tuple((call_id, (Delta(index=number, token_ids=tuple(range(200))),)) for call_id in call_ids)


def fill(outbox: Outbox) -> int:
    """Put messages of call "a" until one is refused; returns how many were not."""
    number = 0
    while not outbox.put(update(number, "a")):
        number += 1
        assert number * len(encode(update(0, "a"))) < BACKLOG_BYTES + SOCKET_BYTES, "the backlog is not bounded"
    return number


def test_a_reader_that_does_not_read_never_makes_a_put_wait_and_the_backlog_is_bounded(
    pair: tuple[Outbox, Reader],
) -> None:
    outbox, _ = pair
    began = time.monotonic()
    fill(outbox)
    assert time.monotonic() - began < 5
    assert BACKLOG_BYTES - 2000 < outbox.backlog_bytes < BACKLOG_BYTES + 1000
    for number in range(50):
        assert outbox.put(update(number, f"b{number}", f"c{number}")) == (f"b{number}", f"c{number}")
    assert outbox.backlog_bytes < BACKLOG_BYTES + 102 * 250, "an error for each call, and no tokens"


def test_when_the_reader_reads_again_it_gets_all_that_was_accepted_then_the_errors_then_later_calls(
    pair: tuple[Outbox, Reader],
) -> None:
    outbox, reader = pair
    count = fill(outbox)
    kept = Failure(message="refused", param="prompt", status=400)
    assert outbox.put((("b", kept), *update(0, "c"))) == ("b", "c")
    assert [reader.read() for _ in range(count)] == [update(number, "a") for number in range(count)]
    ((call_id, failure),) = reader.read()
    assert isinstance(failure, Failure)
    assert (call_id, failure.code, failure.status) == ("a", "slow_reader", 503)
    assert reader.read() == (("b", kept), ("c", failure)), "an error stays the one it was"
    outbox.close()
    assert outbox.backlog_bytes == 0
    for number in range(1000):
        assert outbox.put(update(number, "later")) == ()
        assert reader.read() == update(number, "later")


def test_a_message_larger_than_the_bound_is_sent_to_a_reader_that_reads(pair: tuple[Outbox, Reader]) -> None:
    outbox, reader = pair
    large: RoundUpdates = (("a", (Delta(index=0, token_ids=tuple(range(1 << 20))),)),)
    assert len(encode(large)) > BACKLOG_BYTES + SOCKET_BYTES
    assert outbox.put(large) == ()
    assert outbox.put(update(0, "b")) == ("b",)
    assert reader.read() == large
    assert isinstance(reader.read()[0][1], Failure)


def test_closing_waits_for_a_reader_that_reads_and_not_for_ever(
    pair: tuple[Outbox, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, reader = pair
    count = fill(outbox)
    monkeypatch.setattr(outbox_module, "_FLUSH_S", 0.1)
    outbox.close()
    assert outbox.backlog_bytes > 0
    monkeypatch.setattr(outbox_module, "_FLUSH_S", 20)
    reading = threading.Thread(target=lambda: [reader.read() for _ in range(count + 1)])
    reading.start()
    outbox.close()
    assert outbox.backlog_bytes == 0
    reading.join()


@pytest.mark.parametrize("filled", [False, True])
def test_a_reader_that_is_gone_is_an_error_and_nothing_is_kept(pair: tuple[Outbox, Reader], filled: bool) -> None:
    outbox, reader = pair
    if filled:
        fill(outbox)
    reader.close()
    outbox.close()
    assert outbox.backlog_bytes == 0
    with pytest.raises(BrokenPipeError):
        outbox.put(update(0, "a"))
