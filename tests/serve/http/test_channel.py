"""The HTTP process's end of the sockets: LitServe delivers our messages, and requests never wait."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from litserve.server import response_queue_to_buffer
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem

from aurora_lit.ipc.messages import CANCEL, Call, CallMessage, Delta, Failure, RoundUpdates, WorkerChannel, encode
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.http.channel import RESPONSES_UID, HTTPChannel
from aurora_lit.serve.worker.outbox import Outbox

UPDATES: RoundUpdates = (("a", (Delta(index=0, token_ids=(1,)),)), ("b", Failure(message="broken")))
LARGE: RoundUpdates = (("large", (Delta(index=0, token_ids=tuple(range(1 << 20))),)),)
"""More bytes than a socket's buffer holds."""


def long_call(call_id: str) -> CallMessage:
    """More bytes than a socket's buffer holds."""
    params = SamplingParams(max_tokens=1)
    request = Request(request_id=call_id, prompt_ids=tuple(range(1 << 18)), params=params)
    return call_id, Call(call_id=call_id, requests=(request,))


async def receive(channel: HTTPChannel, count: int) -> list[RoundUpdates | Failure]:
    """The updates of `count` messages, as LitServe unpacks them."""
    updates = []
    for _ in range(count):
        uid, (*response, response_type, worker_id) = await asyncio.wait_for(channel.areceive(0), 60)
        assert (uid, response[1], response_type) == (RESPONSES_UID, LitAPIStatus.OK, LoopResponseType.STREAMING)
        updates.append(response[0])
    return updates


def test_updates_of_any_size_arrive_whole_and_in_order() -> None:
    http_end, worker_end = socket.socketpair()
    channel, outbox = HTTPChannel(http_end), Outbox(WorkerChannel(worker_end))
    messages: list[RoundUpdates] = [UPDATES, LARGE, (), *[((str(number), ()),) for number in range(500)]]
    for message in messages:
        assert outbox.put(message) == ()

    async def run() -> list[RoundUpdates | Failure]:
        try:
            return await receive(channel, len(messages))
        finally:
            channel.close()

    assert asyncio.run(run()) == messages
    outbox.close()
    worker_end.close()


def test_calls_arrive_in_order_and_putting_them_never_waits_for_the_worker() -> None:
    http_end, worker_end = socket.socketpair()
    channel, worker = HTTPChannel(http_end), WorkerChannel(worker_end)
    messages: list[CallMessage] = [long_call("before"), long_call("a"), ("a", CANCEL), long_call("b")]

    async def run() -> list[CallMessage]:
        channel.put(messages[0])  # before LitServe begins to receive
        receiving = asyncio.create_task(channel.areceive(0))
        await asyncio.sleep(0)
        for message in messages[1:]:
            channel.put(message)  # nobody reads yet, and the socket's buffer is full
        received = [await asyncio.to_thread(worker.receive) for _ in messages]
        worker_end.sendall(encode(UPDATES))
        assert (await asyncio.wait_for(receiving, 20))[1][0] == UPDATES
        channel.close()
        return received

    assert asyncio.run(run()) == messages
    worker.close()


def test_litserve_delivers_our_messages_and_goes_on_after_a_damaged_one() -> None:
    """LitServe stops delivering for ever when its transport raises."""
    http_end, worker_end = socket.socketpair()
    channel = HTTPChannel(http_end)

    async def deliver() -> list[Any]:
        item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        one_streaming_api = SimpleNamespace(lit_apis=[None], any_stream=lambda: True)
        delivering = asyncio.create_task(
            response_queue_to_buffer(channel, {RESPONSES_UID: item}, 0, one_streaming_api)  # type: ignore[arg-type]
        )
        worker_end.sendall(encode(UPDATES) + (5).to_bytes(8, "little") + b"junk!" + encode(UPDATES))
        while len(item.response_queue) < 3:
            await asyncio.sleep(0.01)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
        channel.close()
        return list(item.response_queue)

    first, damaged, last = asyncio.run(asyncio.wait_for(deliver(), 20))
    assert first == last == [UPDATES, "OK"]
    assert damaged == [Failure(message="a message of the engine worker was damaged", code="engine_error"), "OK"]
    worker_end.close()


@pytest.mark.parametrize("cut", [0, 3, 12])
def test_a_worker_that_is_gone_ends_receiving_and_half_a_message_is_none(cut: int) -> None:
    http_end, worker_end = socket.socketpair()
    worker_end.sendall(encode(UPDATES) + ((100).to_bytes(8, "little") + b"half")[:cut])
    worker_end.close()
    channel, seen = HTTPChannel(http_end), list[Any]()

    async def read() -> None:
        try:
            while True:
                seen.append(await channel.areceive(0))
        finally:
            channel.close()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert len(seen) == 1
