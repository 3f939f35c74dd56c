"""GenerationRoutes without a server: a large response is built outside of the event loop; what latencies are measured;
pseudonyms that tell clients apart and reveal nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import in_loop
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import CANCEL, Call, Delta, Failure
from aurora_lit.request import Client, Request, SamplingParams, TokenLogprob
from aurora_lit.serve.http import routes, worker_client
from aurora_lit.serve.http.answer_stream import TextDelta
from aurora_lit.serve.http.channel import RESPONSES_UID
from aurora_lit.serve.http.metrics import ServerMetrics
from aurora_lit.serve.http.responses import TextResponse
from aurora_lit.serve.http.routes import ClientPseudonyms, GenerationRoutes
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest
from aurora_lit.serve.http.spec import AuroraSpec
from aurora_lit.serve.http.stream_events import StreamShape
from aurora_lit.serve.http.worker_client import WorkerClient

TOKENIZER = tiny_tokenizer()
(TOKEN,) = TOKENIZER.encode("hello")
KNOWN = TokenLogprob(token_id=TOKEN, logprob=-0.5, top=())


class Spec:
    """What WorkerClient uses of LitServe's spec; each call is answered at once."""

    def __init__(self) -> None:
        self.response_buffer: dict[str, Any] = {}
        self.request_queue = SimpleNamespace(put=self._answer)

    def _answer(self, item: Any) -> None:
        delta = Delta(index=0, token_ids=(TOKEN,), logprobs=(KNOWN,), prompt_logprobs=(None,), finish_reason="length")
        self.response_buffer[RESPONSES_UID].response_queue.append([((item[0], (delta,)),), "OK"])


async def receive() -> Any:
    await asyncio.Event().wait()


def routes_of(spec: Spec, folder: Path) -> GenerationRoutes:
    """On a worker that is ready and answers as `spec` does."""
    status = EngineStatusPage.create(folder / "status")
    status.write(state=WorkerState.READY, max_seq_len=64, vocab_size=len(TOKENIZER))
    status.beat()
    client = WorkerClient(status=status, max_queue=4, tokenizer=TOKENIZER)
    client.connect(spec)
    learner: Any = None
    return GenerationRoutes(
        model="m",
        tokenizer=TOKENIZER,
        worker_client=client,
        metrics=ServerMetrics(model="m", status=status, learner=learner, ring=learner),
        status=status,
        stream_shape=StreamShape(),
    )


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_written_in_another_thread(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[int]()
    make_logprobs: Any = TextResponse._logprobs

    def noting(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return make_logprobs(*arguments)

    monkeypatch.setattr(TextResponse, "_logprobs", noting)
    generation = routes_of(Spec(), tmp_path)
    request: Any = SimpleNamespace(client=None, receive=receive)

    async def answer() -> str:
        body = CompletionRequest(prompt=[TOKEN], echo=True, logprobs=0, max_tokens=1, stream=stream)
        response: Any = await generation.complete(body, request)
        if not stream:
            return str(response.body, "utf-8")
        parts = [part async for part in response.body_iterator]
        return "".join(parts).removeprefix("data: ").partition("\n")[0]

    (choice,) = json.loads(asyncio.run(answer()))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert threads
    assert threading.get_ident() not in threads


class LateSpec(Spec):
    """Each call is answered, or fails, after a while."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self._fails = fails

    def _answer(self, item: Any) -> None:
        if item[1] is CANCEL:
            return
        delta = Delta(index=0, token_ids=(TOKEN,), finish_reason="length")
        update = Failure(message="broken", code="engine_error") if self._fails else (delta,)
        router = self.response_buffer[RESPONSES_UID].response_queue
        asyncio.get_running_loop().call_later(0.3, router.append, [((item[0], update),), "OK"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_shows_life_while_it_waits(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails only then is an event, since the response has begun."""
    monkeypatch.setattr(routes, "COMMENT_EVERY_S", 0.05)
    generation = routes_of(LateSpec(fails=fails), tmp_path)
    request: Any = SimpleNamespace(client=None, receive=receive)

    async def answer() -> list[str]:
        body = CompletionRequest(prompt=[TOKEN], max_tokens=1, stream=True)
        response: Any = await generation.complete(body, request)
        return [part async for part in response.body_iterator]

    *waiting, last = asyncio.run(answer())
    assert len(waiting) >= 3
    assert set(waiting) == {": waiting\n\n"}
    assert ("broken" in last, '"text":"hello"' in last) == (fails, not fails)


def test_both_routes_fill_in_what_a_request_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = EngineStatusPage.create(tmp_path / "status")
    status.write(state=WorkerState.READY, max_seq_len=64, vocab_size=len(TOKENIZER))
    status.beat()
    shared: Any = {"model": "m", "tokenizer": TOKENIZER, "status": status, "stream_shape": StreamShape()}
    client = WorkerClient(status=status, max_queue=4, tokenizer=TOKENIZER)
    own = {"temperature": 0.7, "top_k": 20}
    generation = GenerationRoutes(**shared, worker_client=client, metrics=None, default_sampling=own)
    seen = list[tuple[float, int]]()

    def prepare(body: Any, **_: Any) -> None:
        seen.append((body.temperature, body.top_k))
        raise RequestError("that is all")

    request: Any = SimpleNamespace(client=None, receive=receive)
    for route, name, content in (
        (generation.chat, "prepare_chat", ChatRequest(messages=[{"role": "user", "content": "x"}], top_k=3)),
        (generation.complete, "prepare_completion", CompletionRequest(prompt="x", temperature=0)),
    ):
        monkeypatch.setattr(routes, name, prepare)
        with pytest.raises(RequestError, match="that is all"):
            asyncio.run(route(content, request))  # type: ignore[operator]
    assert seen == [(0.7, 3), (0.0, 20)]


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
def recorder(clock: SimpleNamespace, found: Found) -> routes._CallRecorder:
    metrics: Any = SimpleNamespace(**{name: SimpleNamespace(observe=each.append) for name, each in found.items()})
    metrics.count = lambda kind, deltas, begun: None
    return routes._CallRecorder(metrics, "chat", started_s=clock.now)


def test_tokens_that_arrive_together_share_the_time_since_the_last_ones(
    found: Found, recorder: routes._CallRecorder
) -> None:
    now = 100.0
    for seconds, deltas in ((2, [(0, 3), (1, 1)]), (1, [(0, 4)]), (1, [(0, 0), (1, 2)]), (5, [(1, 0)])):
        now += seconds
        recorder.record(tuple(delta(index, num_tokens) for index, num_tokens in deltas), at_s=now)
    recorder.end()
    assert found["first_token"] == [2, 2], "of both choices"
    assert found["between_tokens"] == [0.25] * 4 + [1.0] * 2
    assert found["whole_request"] == [4], "up to the last token"


@pytest.mark.parametrize(("is_on", "between", "whole"), [(False, [0.5, 0.5], 2), (True, [15.5, 15.5], 32)])
@in_loop
async def test_a_client_that_reads_late_changes_no_latency_unless_messages_are_sent_on_a_clock(
    is_on: bool,
    between: list[float],
    whole: float,
    tmp_path: Path,
    clock: SimpleNamespace,
    found: Found,
    recorder: routes._CallRecorder,
) -> None:
    """Tokens arrive after 1, 1.5 and 2 s; the client reads the second and third one after 32 s."""
    params = SamplingParams(max_tokens=3)
    call = Call(call_id="c", requests=(Request(request_id="c-0", prompt_ids=(1,), params=params),))
    tokenizer, spec = TOKENIZER, SimpleNamespace(response_buffer={}, request_queue=SimpleNamespace(put=list))
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(state=WorkerState.READY)
    page.beat()
    silent_client: Any = SimpleNamespace(receive=receive)
    send_clock: Any = SimpleNamespace(is_on=is_on, wait_s=lambda: 0.0)
    client = worker_client.WorkerClient(status=page, max_queue=1, tokenizer=tokenizer)
    client.connect(spec)
    pending = client.start(call, silent_client, on_close=lambda failed: None)

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
    recorder.end()
    assert found == {"first_token": [1], "between_tokens": between, "whole_request": [whole]}


def test_pseudonyms_of_trusted_users_distinguish_clients_by_user_then_by_address_and_reveal_nothing() -> None:
    pseudonyms = ClientPseudonyms(trust_user=True)
    ann = pseudonyms.of(user="ann@example.org", address="10.0.0.7")
    assert ann == pseudonyms.of(user="ann@example.org", address="10.0.0.8")
    others = [
        pseudonyms.of(user="bob", address="10.0.0.7"),
        pseudonyms.of(user=None, address="10.0.0.7"),
        pseudonyms.of(user="", address="10.0.0.8"),
        pseudonyms.of(user="10.0.0.7", address=None),
    ]
    assert len({ann, *others}) == 5
    assert all(client.name == client.source for client in (ann, *others))
    assert pseudonyms.of(user=None, address=None) == Client("", "")
    assert pseudonyms.of(user="\ud800", address=None).name
    other_server = ClientPseudonyms(trust_user=True)
    assert ann != other_server.of(user="ann@example.org", address=None), "another key"
    assert len(ann.name) == 16
    assert int(ann.name, 16) >= 0


def test_an_untrusted_user_gets_no_share_beside_its_addresss_and_passes_for_nobody_elsewhere() -> None:
    pseudonyms = ClientPseudonyms(trust_user=False)
    here = [pseudonyms.of(user=user, address="10.0.0.7") for user in ("ann", "bob", None)]
    assert len({client.name for client in here}) == 3
    assert {client.source for client in here} == {here[2].name}
    there = pseudonyms.of(user="ann", address="10.0.0.8")
    assert there.name != here[0].name
    assert there.source != here[0].source


def test_health_and_ready_are_503_with_the_reason_while_the_worker_cannot_answer() -> None:
    spec: Any = AuroraSpec.__new__(AuroraSpec)
    for reason, status in (("the worker has ended", 503), (None, 200)):
        spec._worker_client = SimpleNamespace(unavailable_reason=lambda reason=reason: reason)
        for probe, well in ((spec.health, "ok"), (spec.ready, "ready")):
            response = asyncio.run(probe())
            assert response.status_code == status
            assert json.loads(response.body) == {"status": reason or well}
