"""WorkerClient and PendingCall without a server: a silent worker, a broken queue, nothing left behind."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import StatusBlock, WorkerState
from aurora_lit.ipc.messages import CANCEL, EVERY_CALL, Call, Delta
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.http import worker_client as in_flight
from aurora_lit.serve.http.worker_client import ClientGone, WorkerClient

CALL = Call(call_id="c", requests=(Request(request_id="c-0", prompt_ids=(1,), params=SamplingParams(max_tokens=1)),))


class Spec:
    """What WorkerClient needs of LitServe's spec."""

    response_queue_id = 0

    def __init__(self):
        self.response_buffer, self.sent = {}, []
        self.request_queue = SimpleNamespace(put=self.sent.append)


class Client:
    """What PendingCall needs of a request: a connection that ends when told."""

    def __init__(self):
        self._gone = asyncio.Event()

    def leave(self):
        self._gone.set()

    async def receive(self):
        await self._gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def block(tmp_path):
    block = StatusBlock.create(tmp_path / "status")
    block.write(state=WorkerState.READY)
    block.beat()
    return block


@pytest.fixture
def spec():
    return Spec()


@pytest.fixture
def flights(block, spec):
    flights = WorkerClient(status=block, max_queue=2)
    flights.connect(spec)
    return flights


def deliver(spec, *deltas):
    spec.response_buffer[EVERY_CALL].response_queue.append([(("gone", deltas), ("c", deltas)), "OK"])


def test_a_finished_call_leaves_nothing_and_sends_no_cancel(flights, spec):
    async def run():
        ends = []
        flight = flights.start(CALL, Client(), on_close=ends.append)
        deliver(spec, Delta(index=0, text="x", token_ids=(1,), finish_reason="length"))
        assert (await flight.next())[0].text == "x"
        flight.close()
        flight.close()
        assert ends == [False]

    asyncio.run(run())
    assert (flights.num_calls, flights.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {EVERY_CALL}
    assert [entry[3] for entry in spec.sent] == [CALL]


def test_a_client_that_leaves_before_the_response_starts_is_cleaned_up_too(flights, spec):
    async def run():
        client = Client()
        flight = flights.start(CALL, client, on_close=lambda failed: None)
        client.leave()
        with pytest.raises(ClientGone):
            await flight.next()

    asyncio.run(run())
    assert (flights.num_calls, flights.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {EVERY_CALL}
    assert [entry[3] for entry in spec.sent] == [CALL, CANCEL]


def test_a_queue_that_breaks_leaves_nothing(flights, spec):
    def broken(item):
        raise BrokenPipeError

    async def run():
        spec.request_queue.put = broken
        with pytest.raises(BrokenPipeError):
            flights.start(CALL, Client(), on_close=lambda failed: None)

    asyncio.run(run())
    assert (flights.num_calls, flights.num_sequences) == (0, 0)
    assert spec.response_buffer.keys() <= {EVERY_CALL}


def test_a_silent_worker_gives_waiting_calls_an_error(flights, block, spec, monkeypatch):
    monkeypatch.setattr(in_flight, "_CHECK_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(in_flight, "HEARTBEAT_STALE_S", 0.3)
    monkeypatch.setattr(in_flight, "call_when_process_ends", lambda pid, callback: lambda: None)

    async def run():
        async with flights.watch_worker():
            block.beat()
            flight = flights.start(CALL, Client(), on_close=lambda failed: None)
            began = time.monotonic()
            with pytest.raises(RequestError) as caught:
                await flight.next()
            assert 0.2 < time.monotonic() - began < 5
            assert (caught.value.status, caught.value.code) == (503, "engine_dead")
            flight.close()
            assert [entry[3] for entry in spec.sent] == [CALL, CANCEL], "should it come back, it has nothing to do"
            assert "no sign of life" in flights.trouble()
            with pytest.raises(RequestError, match="cannot serve"):
                flights.start(CALL, Client(), on_close=lambda failed: None)
            block.beat()
            assert flights.trouble() is None, "it is back: the server serves again"

    asyncio.run(run())


def test_a_server_that_was_suspended_gives_its_worker_time_to_beat_again(flights, block, spec, monkeypatch):
    monkeypatch.setattr(in_flight, "_CHECK_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(in_flight, "HEARTBEAT_STALE_S", 0.5)
    monkeypatch.setattr(in_flight, "call_when_process_ends", lambda pid, callback: lambda: None)

    async def run():
        async with flights.watch_worker():
            block.beat()
            flight = flights.start(CALL, Client(), on_close=lambda failed: None)
            await asyncio.sleep(0.02)
            time.sleep(0.8)  # all of the process stands still, as the worker does
            assert flights.trouble() is not None
            await asyncio.sleep(0.02)
            assert flights.trouble() is None
            with pytest.raises(RequestError) as caught:  # but not for ever
                await flight.next()
            assert caught.value.code == "engine_dead"
            flight.close()

    asyncio.run(run())
