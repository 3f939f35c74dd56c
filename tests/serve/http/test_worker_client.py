"""WorkerClient and PendingCall without a server: a silent worker, a broken queue, a damaged message, no leftovers."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support import in_loop
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import CANCEL, Call, CancelRequest, Delta, Failure
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.http import worker_client as worker_client_module
from aurora_lit.serve.http.channel import RESPONSES_UID
from aurora_lit.serve.http.worker_client import ClientDisconnected, Slot, WorkerClient

TOKENIZER = tiny_tokenizer()
CALL = Call(call_id="c", requests=(Request(request_id="c-0", prompt_ids=(1,), params=SamplingParams(max_tokens=1)),))


class FakeSpec:
    """The attributes of LitServe's spec that WorkerClient uses."""

    def __init__(self):
        self.response_buffer, self.sent = {}, []
        self.request_queue = SimpleNamespace(put=self.sent.append)


class FakeClient:
    """The method of a request that PendingCall uses; the connection ends on `disconnect`."""

    def __init__(self):
        self._disconnected = asyncio.Event()

    def disconnect(self):
        self._disconnected.set()

    async def receive(self):
        await self._disconnected.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def page(tmp_path):
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(state=WorkerState.READY)
    page.beat()
    return page


@pytest.fixture
def spec():
    return FakeSpec()


@pytest.fixture
def worker_client(page, spec):
    worker_client = WorkerClient(status=page, max_queue=2, tokenizer=TOKENIZER)
    worker_client.connect(spec)
    return worker_client


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setattr(worker_client_module, "_CHECK_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(worker_client_module, "HEARTBEAT_STALE_S", 0.3)
    monkeypatch.setattr(worker_client_module, "call_when_process_ends", lambda pid, callback: lambda: None)


def deliver(spec, updates):
    """As LitServe does with a message of the worker."""
    spec.response_buffer[RESPONSES_UID].response_queue.append([updates, "OK"])


def begin(worker_client, call=CALL):
    return worker_client.start(call, FakeClient(), on_close=lambda failed: None)


def ids(text):
    return tuple(TOKENIZER.encode(text))


def sent_messages(spec):
    return [message for _, message in spec.sent]


@in_loop
async def test_a_finished_call_leaves_nothing_and_sends_no_cancel(worker_client, spec):
    ends = []
    pending = worker_client.start(CALL, FakeClient(), on_close=ends.append)
    deltas = (Delta(index=0, token_ids=ids("x"), finish_reason="length"),)
    deliver(spec, (("ended before", deltas), ("c", deltas)))
    assert (await pending.next())[0].text == "x"
    pending.close()
    pending.close()
    assert ends == [False]
    assert (worker_client.num_calls, worker_client.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {RESPONSES_UID}
    assert sent_messages(spec) == [CALL]


@in_loop
async def test_what_is_ready_is_taken_at_once_and_a_failure_after_it_is_left_to_next(worker_client, spec):
    pending = begin(worker_client)
    assert pending.take_ready() == ()
    for text in ("a", "b"):
        deliver(spec, (("c", (Delta(index=0, token_ids=ids(text)),)),))
    deliver(spec, (("c", Failure(message="as asked")),))
    assert [delta.text for delta in pending.take_ready()] == ["a", "b"]
    assert pending.take_ready() == ()
    with pytest.raises(RequestError, match="as asked"):
        await pending.next()
    pending.close()


@in_loop
async def test_a_damaged_message_fails_every_waiting_call_and_frees_its_slots(worker_client, spec):
    ends = []
    pending = worker_client.start(CALL, FakeClient(), on_close=ends.append)
    deliver(spec, Failure(message="damaged", code="engine_error"))
    with pytest.raises(RequestError, match="damaged"):
        await pending.next()
    pending.close()
    assert ends == [True]
    assert sent_messages(spec) == [CALL, CANCEL], "the worker still works on the call"


@pytest.mark.parametrize(("num_prompts", "num_choices", "field"), [(1, 2, None), (1, 3, "n"), (3, 1, "prompt")])
def test_a_call_that_never_fits_into_the_queue_is_refused(worker_client, num_prompts, num_choices, field):
    places = worker_client.places(num_prompts=num_prompts, num_choices=num_choices)
    if field is None:
        with places:
            return
    with pytest.raises(RequestError, match=f"^{field}: .* asks for 3 choices.*server.max_queue is 2") as caught, places:
        pass
    assert (caught.value.status, caught.value.param) == (400, field)


def test_calls_that_are_being_prepared_have_places_in_the_queue(worker_client):
    """Else a burst would all be prepared, on the cores of rounds, and then be refused."""

    def prepare(num_prompts, then=lambda: None):
        with worker_client.places(num_prompts=num_prompts, num_choices=1):
            then()

    with pytest.raises(RequestError, match="the queue is full: 2 choices"):
        prepare(2, then=lambda: prepare(1))
    prepare(1, then=lambda: prepare(1))
    with pytest.raises(KeyError):
        prepare(2, then=lambda: {}["a fault of preparing"])
    prepare(2)


@in_loop
async def test_a_full_queue_is_told_before_prompts_are_tokenized(worker_client):
    pending = begin(worker_client)
    with worker_client.places(num_prompts=1, num_choices=1):
        pass
    with pytest.raises(RequestError, match="the queue is full: 1 choices") as caught:
        worker_client.places(num_prompts=1, num_choices=2).__enter__()
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    pending.close()
    with worker_client.places(num_prompts=1, num_choices=2):
        pass


def call_with_stop(*stop, num_choices):
    params = SamplingParams(max_tokens=9, stop=stop)
    requests = tuple(Request(request_id=f"c-{i}", prompt_ids=(1,), params=params) for i in range(num_choices))
    return Call(call_id="c", requests=requests)


@in_loop
async def test_a_stop_string_cancels_that_request_at_once_and_what_is_still_on_its_way_is_dropped(worker_client, spec):
    call = call_with_stop("c", num_choices=2)
    pending = begin(worker_client, call)
    deliver(spec, (("c", (Delta(index=0, token_ids=ids("abcd")), Delta(index=1, token_ids=ids("xy")))),))
    assert spec.sent[1:] == [("c", CancelRequest(0))], "although nobody has read the text yet"
    deliver(spec, (("c", (Delta(index=0, token_ids=ids("efgh")),)),))
    deliver(spec, (("c", (Delta(index=1, token_ids=ids("zc"), finish_reason="length"),)),))
    first, second = await pending.next(), await pending.next()
    assert [(delta.text, delta.token_ids, delta.finish_reason) for delta in first] == [
        ("ab", ids("abc"), "stop"),
        ("xy", ids("xy"), None),
    ]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in second] == [(1, "z", "stop")]
    pending.close()
    assert sent_messages(spec) == [call, CancelRequest(0)], "the worker has ended both, so nothing is left to cancel"


@in_loop
async def test_a_choice_that_has_ended_leaves_the_queue_although_nobody_reads(worker_client, spec):
    pending = begin(worker_client, call_with_stop("c", num_choices=2))
    assert worker_client.num_sequences == 2
    deliver(spec, (("c", (Delta(index=0, token_ids=ids("abc")), Delta(index=1, token_ids=ids("x")))),))
    assert worker_client.num_sequences == 1, "a stop string has ended the first"
    deliver(spec, (("c", (Delta(index=1, token_ids=ids("y"), finish_reason="length"),)),))
    assert worker_client.num_sequences == 0
    pending.close()
    assert worker_client.num_sequences == 0


@in_loop
async def test_a_closed_call_holds_nothing_although_its_connection_stays(worker_client, spec):
    pending = begin(worker_client, call_with_stop(num_choices=1))
    (watcher,) = worker_client._disconnect_watchers
    deliver(spec, (("c", (Delta(index=0, token_ids=ids("x")),)),))
    pending.close()
    await asyncio.wait([watcher])
    assert worker_client._disconnect_watchers == set()
    assert not pending._updates


@in_loop
async def test_a_call_that_the_worker_fails_leaves_the_queue_although_nobody_reads(worker_client, spec):
    pending = begin(worker_client, call_with_stop(num_choices=2))
    deliver(spec, (("c", Failure(message="as asked")),))
    assert worker_client.num_sequences == 0
    pending.close()
    assert worker_client.num_sequences == 0


@in_loop
async def test_a_call_that_is_closed_after_one_choice_has_stopped_is_cancelled_whole(worker_client, spec):
    pending = begin(worker_client, call_with_stop("c", num_choices=2))
    deliver(spec, (("c", (Delta(index=0, token_ids=ids("c")),)),))
    pending.close()
    assert sent_messages(spec)[1:] == [CancelRequest(0), CANCEL]


@pytest.mark.parametrize(
    "update",
    [
        (Delta(index=1, token_ids=(), finish_reason="error", error="as asked"),),
        (Delta(index=0, token_ids=(-1,)),),  # the tokenizer raises OverflowError
    ],
)
@in_loop
async def test_a_choice_that_fails_fails_its_call_alone_and_the_others_are_cancelled(worker_client, spec, update):
    pending = begin(worker_client, call_with_stop(num_choices=2))
    deliver(spec, (("c", update),))
    with pytest.raises(RequestError) as caught:
        await pending.next()
    assert (caught.value.status, caught.value.code) == (500, "engine_error")
    pending.close()
    assert sent_messages(spec)[1:] == [CANCEL]


@in_loop
async def test_a_client_that_leaves_before_the_response_starts_is_cleaned_up_too(worker_client, spec):
    client = FakeClient()
    pending = worker_client.start(CALL, client, on_close=lambda failed: None)
    client.disconnect()
    with pytest.raises(ClientDisconnected):
        await pending.next()
    assert (worker_client.num_calls, worker_client.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {RESPONSES_UID}
    assert sent_messages(spec) == [CALL, CANCEL]


@in_loop
async def test_a_queue_that_breaks_leaves_nothing(worker_client, spec):
    def broken(item):
        raise BrokenPipeError

    spec.request_queue.put = broken
    with pytest.raises(BrokenPipeError):
        begin(worker_client)
    assert (worker_client.num_calls, worker_client.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {RESPONSES_UID}


@in_loop
async def test_a_silent_worker_gives_waiting_calls_an_error(worker_client, page, spec, short_timeouts):
    async with worker_client.watch_worker():
        page.beat()
        pending = begin(worker_client)
        began = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await pending.next()
        assert 0.2 < time.monotonic() - began < 5
        assert (caught.value.status, caught.value.code) == (503, "engine_dead")
        assert "gave no sign of life" in str(caught.value), "it may come back: nobody need restart it"
        pending.close()
        assert sent_messages(spec) == [CALL, CANCEL], "if the worker comes back, it has nothing to do"
        assert "no sign of life" in worker_client.unavailable_reason()
        with pytest.raises(RequestError, match="cannot serve"):
            begin(worker_client)
        page.beat()
        assert worker_client.unavailable_reason() is None, "the worker is back, so the server serves again"


@in_loop
async def test_a_server_that_was_suspended_gives_its_worker_time(worker_client, page, spec, short_timeouts):
    async with worker_client.watch_worker():
        page.beat()
        pending = begin(worker_client)
        await asyncio.sleep(0.02)
        time.sleep(0.5)  # this process stands still, as the worker does
        assert worker_client.unavailable_reason() is not None
        await asyncio.sleep(0.02)
        assert worker_client.unavailable_reason() is None
        with pytest.raises(RequestError) as caught:  # but not for ever
            await pending.next()
        assert caught.value.code == "engine_dead"
        pending.close()


@in_loop
async def test_a_newer_request_of_a_slot_replaces_those_that_have_not_begun(worker_client, spec):
    def start(name, slot):
        call = replace(CALL, call_id=name)
        return worker_client.start(call, FakeClient(), on_close=lambda failed: None, slot=slot)

    own = Slot("10.0.0.7", "key", 0, "")
    old = start("old", own)
    other = start("other", own._replace(id_slot=1))
    with pytest.raises(RequestError, match="queue is full"):
        start("early", own)
    worker_client.replace(own)
    new = start("new", own)  # in the place of the old one
    with pytest.raises(RequestError) as caught:
        await old.next()
    assert (caught.value.status, caught.value.code, caught.value.param) == (409, "replaced", "id_slot")
    old.close()
    assert [message for name, message in spec.sent if name == "old"][1:] == [CANCEL]
    deliver(spec, (("new", (Delta(index=0, token_ids=(2,)),)),))
    worker_client.replace(own)  # it has begun, so it goes on
    deliver(spec, (("new", (Delta(index=0, token_ids=(3,), finish_reason="length"),)),))
    assert [(await new.next())[0].token_ids for _ in range(2)] == [(2,), (3,)]
    assert ("other", CANCEL) not in spec.sent
    assert worker_client.num_sequences == 1
    for pending in (new, other):
        pending.close()
    assert worker_client.num_sequences == 0


@in_loop
async def test_when_the_worker_ends_waiting_calls_fail_at_once(worker_client, page, spec, monkeypatch):
    ends = []
    monkeypatch.setattr(worker_client_module, "call_when_process_ends", lambda pid, call: ends.append(call) or list)
    async with worker_client.watch_worker():
        pending = begin(worker_client)
        ends[0]()
        with pytest.raises(RequestError, match="must be restarted") as caught:
            await pending.next()
        assert (caught.value.status, caught.value.code) == (503, "engine_dead")
        pending.close()


@in_loop
async def test_what_has_not_ended_when_draining_ends_is_told_so(worker_client, spec):
    began = []
    with worker_client.drain_on_sigterm(0.05, on_begin=lambda: began.append(time.monotonic())):
        pending = begin(worker_client)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(RequestError, match="is shutting down") as caught:
            await pending.next()
        assert time.monotonic() - began[0] >= 0.04
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
        pending.close()
