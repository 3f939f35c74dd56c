"""Latencies of a call: what is measured from where, that tokens which arrive together share their time, and that a
client which reads late changes none."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import Call, Delta
from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.http import routes, worker_client
from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.channel import RESPONSES_UID

Found = dict[str, list[float]]


def delta(index: int, num_tokens: int) -> TextDelta:
    return TextDelta(index=index, text="x" * num_tokens, token_ids=(7,) * num_tokens)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`now`: the time of the code under test, in seconds."""
    clock = SimpleNamespace(now=100.0)
    for module in (routes, worker_client):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def found() -> Found:
    """What was observed, by histogram."""
    return {"first_token": [], "between_tokens": [], "whole_request": []}


@pytest.fixture
def recorder(clock: SimpleNamespace, found: Found) -> routes._LatencyRecorder:
    metrics: Any = SimpleNamespace(**{name: SimpleNamespace(observe=each.append) for name, each in found.items()})
    return routes._LatencyRecorder(metrics)


def test_tokens_that_arrive_together_share_the_time_since_the_last_ones(
    found: Found, recorder: routes._LatencyRecorder
) -> None:
    now = 100.0
    for seconds, deltas in ((2, [(0, 3), (1, 1)]), (1, [(0, 4)]), (1, [(0, 0), (1, 2)]), (5, [(1, 0)])):
        now += seconds
        recorder.record(tuple(delta(index, num_tokens) for index, num_tokens in deltas), at_s=now)
    recorder.end()
    assert found["first_token"] == [2, 2], "of both choices"
    assert found["between_tokens"] == [0.25] * 4 + [1.0] * 2
    assert found["whole_request"] == [4], "up to the last token"


class SilentClient:
    """A request whose connection stays open."""

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(("is_on", "between", "whole"), [(False, [0.5, 0.5], 2), (True, [15.5, 15.5], 32)])
def test_a_client_that_reads_late_changes_no_latency_unless_messages_are_sent_on_a_clock(
    is_on: bool,
    between: list[float],
    whole: float,
    tmp_path: Path,
    clock: SimpleNamespace,
    found: Found,
    recorder: routes._LatencyRecorder,
) -> None:
    """Tokens arrive after 1, 1.5 and 2 s; the client reads the second and third one after 32 s."""
    params = SamplingParams(max_tokens=3)
    call = Call(call_id="c", requests=(Request(request_id="c-0", prompt_ids=(1,), params=params),))
    tokenizer, spec = tiny_tokenizer(), SimpleNamespace(response_buffer={}, request_queue=SimpleNamespace(put=list))
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(state=WorkerState.READY)
    page.beat()
    send_clock: Any = SimpleNamespace(is_on=is_on, wait_s=lambda: 0.0)

    async def run() -> None:
        client = worker_client.WorkerClient(status=page, max_queue=1, tokenizer=tokenizer)
        client.connect(spec)
        pending = client.start(call, SilentClient(), on_close=lambda failed: None)  # type: ignore[arg-type]

        def arrive(at_s: float) -> None:
            clock.now = 100 + at_s
            update = (("c", (Delta(index=0, token_ids=tuple(tokenizer.encode("x"))),)),)
            spec.response_buffer[RESPONSES_UID].response_queue.append([update, "OK"])

        arrive(1)
        await routes._next_deltas(pending, send_clock, recorder)
        arrive(1.5)
        arrive(2)
        clock.now = 132
        num_tokens = 0
        while num_tokens < 2:
            num_tokens += len(await routes._next_deltas(pending, send_clock, recorder))
        pending.close()

    asyncio.run(run())
    recorder.end()
    assert found == {"first_token": [1], "between_tokens": between, "whole_request": [whole]}
