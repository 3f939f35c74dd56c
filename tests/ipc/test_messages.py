"""Messages of the engine worker: encoded without pickle, checked when decoded, and carried by a socket in order."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import multiprocessing
import random
import socket
import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from litserve.loops import LitLoop
from litserve.server import response_queue_to_buffer
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem

from aurora_lit.ipc.messages import (
    RESPONSES_UID,
    Delta,
    Failure,
    ResponseTransport,
    RoundUpdates,
    decode_updates,
    encode_updates,
)
from aurora_lit.request import TokenLogprob

FULL_DELTA = Delta(
    index=3,
    text="héllo 🌍",
    token_ids=(1, 2**31),
    logprobs=(TokenLogprob(token_id=1, logprob=-0.5, top=((1, -0.5), (7, -math.inf))),),
    prompt_logprobs=(None, TokenLogprob(token_id=4, logprob=-2.25, top=())),
    num_proposed=4,
    num_accepted=2,
    finish_reason="stop",
    draft_versions=("start", "draft-000001"),
)
UPDATES: RoundUpdates = (
    ("a", (FULL_DELTA, Delta(index=0, text="", token_ids=()))),
    ("b", Failure(message="broken", param="prompt", code="engine_error", status=503)),
    ("c", ()),
)
LARGE: RoundUpdates = (("large", (Delta(index=0, text="ü" * (4 << 20), token_ids=tuple(range(1000))),)),)
"""More bytes than a socket's buffer holds."""


def send_all(transport: ResponseTransport, messages: list[RoundUpdates]) -> None:
    for message in messages:
        LitLoop().put_response(transport, 0, RESPONSES_UID, message, LitAPIStatus.OK, LoopResponseType.STREAMING)


async def receive(transport: ResponseTransport, count: int) -> list[RoundUpdates | Failure]:
    """The updates of `count` messages, as LitServe unpacks them."""
    updates = []
    try:
        for _ in range(count):
            uid, (*response, response_type, worker_id) = await asyncio.wait_for(transport.areceive(0), 60)
            assert (uid, response[1], response_type) == (RESPONSES_UID, LitAPIStatus.OK, LoopResponseType.STREAMING)
            updates.append(response[0])
    finally:
        transport.close()
    return updates


def test_what_is_decoded_equals_what_was_encoded_in_every_field() -> None:
    assert decode_updates(encode_updates(UPDATES)) == UPDATES
    set_fields = {field.name for field in dataclasses.fields(Delta) if getattr(FULL_DELTA, field.name)}
    assert set_fields == {field.name for field in dataclasses.fields(Delta)}, "FULL_DELTA sets every field"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            [["a", [{"index": 0, "text": 5, "token_ids": []}]]],
            r"Expected `str`, got `int` - at `\$\[0\]\[1\]\[0\].text`",
        ),
        ([["a", [{"index": 0, "text": "x"}]]], "missing required field `token_ids`"),
        ([["a", {"text": "x"}]], "missing required field `message`"),
        ([["a", "cancel"]], "Expected `object | array`, got `str`"),
        ({"a": []}, "Expected `array`, got `object`"),
        ([[1, []]], "Expected `str`, got `int`"),
        (None, "Expected `array`, got `None`"),
    ],
)
def test_an_unknown_message_is_refused_and_the_wrong_field_is_named(content: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode_updates(msgspec.msgpack.encode(content))


def test_a_damaged_message_is_refused_or_is_a_whole_message() -> None:
    payload, rng, num_refused = encode_updates(UPDATES), random.Random(0), 0
    for _ in range(3000):
        damaged = bytearray(payload)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            updates = decode_updates(bytes(damaged[: rng.randrange(len(damaged) // 2, len(damaged) + 1)]))
        except ValueError:
            num_refused += 1
        else:
            assert all(isinstance(call_id, str) for call_id, _ in updates)
            assert all(isinstance(update, Failure | tuple) for _, update in updates)
    assert num_refused > 2000


def test_messages_of_any_size_arrive_whole_and_in_order() -> None:
    transport = ResponseTransport()
    messages: list[RoundUpdates] = [UPDATES, LARGE, (), *[((str(number), ()),) for number in range(500)]]
    sender = threading.Thread(target=send_all, args=(transport, messages))
    sender.start()
    assert asyncio.run(receive(transport, len(messages))) == messages
    sender.join()


def test_a_spawned_process_can_send() -> None:
    transport = ResponseTransport()
    process = multiprocessing.get_context("spawn").Process(target=send_all, args=(transport, [UPDATES, LARGE]))
    process.start()
    assert asyncio.run(receive(transport, 2)) == [UPDATES, LARGE]
    process.join()
    assert process.exitcode == 0


def test_litserve_delivers_our_messages_and_goes_on_after_a_damaged_one() -> None:
    """LitServe stops delivering for ever when its transport raises."""
    transport = ResponseTransport()
    sending: socket.socket = transport._sending

    async def deliver() -> list[Any]:
        item = ResponseBufferItem(event=asyncio.Event(), response_queue=deque())
        one_streaming_api = SimpleNamespace(lit_apis=[None], any_stream=lambda: True)
        delivering = asyncio.create_task(
            response_queue_to_buffer(transport, {RESPONSES_UID: item}, 0, one_streaming_api)  # type: ignore[arg-type]
        )
        send_all(transport, [UPDATES])
        sending.sendall((5).to_bytes(8, "little") + b"junk!")
        send_all(transport, [UPDATES])
        while len(item.response_queue) < 3:
            await asyncio.sleep(0.01)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
        transport.close()
        return list(item.response_queue)

    first, damaged, last = asyncio.run(asyncio.wait_for(deliver(), 20))
    assert first == last == [UPDATES, "OK"]
    assert damaged == [Failure(message="a message of the engine worker was damaged", code="engine_error"), "OK"]


@pytest.mark.parametrize(
    ("uid", "status", "updates", "error"),
    [
        ("request 7", LitAPIStatus.OK, UPDATES, ValueError),
        (RESPONSES_UID, LitAPIStatus.ERROR, b"LitServe pickles errors here", ValueError),
        (RESPONSES_UID, LitAPIStatus.OK, ((0, object()),), TypeError),
    ],
)
def test_what_is_no_message_of_ours_is_not_sent(uid: str, status: str, updates: Any, error: type[Exception]) -> None:
    transport = ResponseTransport()
    with pytest.raises(error):
        LitLoop().put_response(transport, 0, uid, updates, status, LoopResponseType.STREAMING)
    transport.close()


@pytest.mark.parametrize("cut", [0, 3, 12])
def test_a_sender_that_is_gone_ends_receiving_and_half_a_message_is_none(cut: int) -> None:
    transport = ResponseTransport()
    send_all(transport, [UPDATES])
    transport._sending.sendall(((100).to_bytes(8, "little") + b"half")[:cut])
    transport._sending.close()
    seen: list[Any] = []

    async def read() -> None:
        try:
            while True:
                seen.append(await transport.areceive(0))
        finally:
            transport.close()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert len(seen) == 1
