"""The socket between engine worker and HTTP process: in order, whole, from another process, and an end."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading

import pytest

from aurora_lit.ipc.channel import SocketTransport

LARGE = 8 << 20
"""Bytes of a message that no socket buffer holds."""


def send_all(transport: SocketTransport, messages: list[object]) -> None:
    for message in messages:
        transport.send(message, 0)


async def receive(transport: SocketTransport, count: int) -> list[object]:
    try:
        return [await asyncio.wait_for(transport.areceive(0), 60) for _ in range(count)]
    finally:
        transport.close()


def test_messages_of_any_size_arrive_whole_and_in_order() -> None:
    transport = SocketTransport()
    messages: list[object] = [("a", (1, 2.5)), b"x" * LARGE, None, {"b": "ü" * 1000}, *range(500)]
    sender = threading.Thread(target=send_all, args=(transport, messages))
    sender.start()
    assert asyncio.run(receive(transport, len(messages))) == messages
    sender.join()


def test_a_spawned_process_can_send() -> None:
    transport = SocketTransport()
    process = multiprocessing.get_context("spawn").Process(target=send_all, args=(transport, ["from", "afar"]))
    process.start()
    assert asyncio.run(receive(transport, 2)) == ["from", "afar"]
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("cut", [0, 3, 12])
def test_a_sender_that_is_gone_ends_receiving_and_half_a_message_is_none(cut: int) -> None:
    transport = SocketTransport()
    transport.send("whole", 0)
    transport._sending.sendall((100).to_bytes(8, "little") + b"half"[:4] if cut > 8 else bytes(cut))
    transport._sending.close()
    seen: list[object] = []

    async def read() -> None:
        try:
            while True:
                seen.append(await transport.areceive(0))
        finally:
            transport.close()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert seen == ["whole"]
