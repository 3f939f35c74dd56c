"""Messages between engine worker and HTTP process: encoded without pickle, checked when decoded, read whole."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import random
import socket
import threading
from typing import Any

import msgspec
import pytest

from aurora_lit.ipc.messages import (
    CANCEL,
    LENGTH,
    Call,
    CallMessage,
    CancelRequest,
    Delta,
    Failure,
    RoundUpdates,
    WorkerChannel,
    decode_call,
    decode_updates,
    encode,
)
from aurora_lit.request import Client, Request, SamplingParams, StructuredOutputsParams, TokenLogprob

FULL_DELTA = Delta(
    index=3,
    token_ids=(1, 2**31),
    logprobs=(TokenLogprob(token_id=1, logprob=-0.5, top=((1, -0.5), (7, -math.inf))),),
    prompt_logprobs=(None, TokenLogprob(token_id=4, logprob=-2.25, top=())),
    num_proposed=4,
    num_accepted=2,
    accepted_from=(3,),
    finish_reason="error",
    error="häßlich 🌍",
    draft_versions=("start", "draft-000001"),
    domain="auto-3",
    num_cached_tokens=9,
)
UPDATES: RoundUpdates = (
    ("a", (FULL_DELTA, Delta(index=0, token_ids=()))),
    ("b", Failure(message="broken", param="prompt", code="engine_error", status=503)),
    ("c", ()),
)
FULL_PARAMS = SamplingParams(
    max_tokens=2**40,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=-1.0,
    frequency_penalty=0.5,
    logit_bias={7: -100.0, 9: 1.5},
    seed=-(2**63),
    stop=("ende", "\n\n🌍"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    min_tokens=2,
    include_stop_str_in_output=True,
    skip_special_tokens=False,
    n=3,
    logprobs=2,
    prompt_logprobs=0,
    speculate=False,
    structured_outputs=StructuredOutputsParams(json={"a": [1, None, 2.5]}, choice=("ä", "b"), json_object=False),
)
FULL_REQUEST = Request(
    request_id="r-0",
    prompt_ids=(1, 2, 49151),
    prediction_ids=(2, 49151),
    params=FULL_PARAMS,
    store=False,
    domain="code",
    client=Client("00ff", "ff00"),
    cache_salt="söt",
    call="d0",
)
CALL: CallMessage = ("c", Call(call_id="c", requests=(FULL_REQUEST, FULL_REQUEST)))
LONG_CALL: CallMessage = (
    "l",
    Call(
        call_id="l",
        requests=(Request(request_id="l", prompt_ids=tuple(range(1 << 20)), params=SamplingParams(max_tokens=1)),),
    ),
)
"""More bytes than a socket's buffer holds."""


def payload_of(message: RoundUpdates | CallMessage) -> bytes:
    content = encode(message)
    assert LENGTH.unpack(content[: LENGTH.size]) == (len(content) - LENGTH.size,)
    return content[LENGTH.size :]


def set_fields(record: Any, default: Any) -> set[str]:
    """Names of the fields that differ from a record's defaults."""
    return {f.name for f in dataclasses.fields(record) if getattr(record, f.name) != getattr(default, f.name)}


def test_what_is_decoded_equals_what_was_encoded_in_every_field() -> None:
    assert decode_updates(payload_of(UPDATES)) == UPDATES
    fields = {field.name for field in dataclasses.fields(Delta)}
    assert {name for name in fields if getattr(FULL_DELTA, name)} == fields, "FULL_DELTA sets every field"


def test_a_call_arrives_as_it_was_sent_in_every_field() -> None:
    assert decode_call(payload_of(CALL)) == CALL
    assert decode_call(payload_of(("c", CANCEL))) == ("c", CANCEL)
    cancelled = decode_call(payload_of(("c", CancelRequest(3))))
    assert cancelled == ("c", CancelRequest(3))
    assert isinstance(cancelled[1], CancelRequest)
    bare = Request(request_id="", prompt_ids=(), params=SamplingParams(max_tokens=1))
    assert set_fields(FULL_REQUEST, bare) == {field.name for field in dataclasses.fields(Request)}
    assert set_fields(FULL_PARAMS, bare.params) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            [["a", [{"index": "0", "token_ids": []}]]],
            r"Expected `int`, got `str` - at `\$\[0\]\[1\]\[0\].index`",
        ),
        ([["a", [{"index": 0}]]], "missing required field `token_ids`"),
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


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (["a", "stop"], "Invalid enum value 'stop'"),
        (["a", {"call_id": "a"}], "missing required field `requests`"),
        (["a", ["0"]], "Expected `int`, got `str`"),
        (["a"], "Expected `array` of length 2"),
        (b"\x80\x04", "Expected `array`, got `bytes`"),
    ],
)
def test_what_is_no_call_is_refused(content: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode_call(msgspec.msgpack.encode(content))


def test_what_is_no_message_is_not_sent() -> None:
    with pytest.raises(TypeError):
        encode((("a", object()),))  # type: ignore[arg-type]


def test_a_damaged_message_is_refused_or_is_a_whole_message() -> None:
    payload, rng, num_refused = payload_of(UPDATES), random.Random(0), 0
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


def test_calls_of_any_size_arrive_whole_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    messages: list[CallMessage] = [CALL, LONG_CALL, *[(str(number), CANCEL) for number in range(500)]]
    sender = threading.Thread(target=lambda: [theirs.sendall(encode(message)) for message in messages])
    sender.start()
    channel = WorkerChannel(ours)
    assert [channel.receive() for _ in messages] == messages
    sender.join()
    channel.close()
    theirs.close()


@pytest.mark.parametrize("cut", [0, 3, 12])
def test_an_http_process_that_is_gone_ends_receiving_and_half_a_message_is_none(cut: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(encode(CALL) + encode(CALL)[:cut])
    theirs.close()
    channel = WorkerChannel(ours)
    assert channel.receive() == CALL
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_sending_without_waiting_takes_what_there_is_room_for() -> None:
    ours, theirs = socket.socketpair()
    channel, content = WorkerChannel(ours), bytes(8 << 20)
    taken = channel.send(content, wait=False)
    assert 0 < taken < len(content)
    assert channel.send(content, wait=False) == 0
    channel.close()
    assert sum(len(piece) for piece in iter(lambda: theirs.recv(1 << 20), b"")) == taken
    theirs.close()


def send_updates(channel: WorkerChannel) -> None:
    assert channel.send(encode(UPDATES), wait=True) == len(encode(UPDATES))


def test_a_spawned_process_can_send() -> None:
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=send_updates, args=(WorkerChannel(ours),))
    process.start()
    ours.close()
    content = b""
    while piece := theirs.recv(4096):  # ends when no process holds the other end any more
        content += piece
    process.join()
    theirs.close()
    assert content == encode(UPDATES)
    assert process.exitcode == 0
