"""EngineLoop over a real pair of sockets, with an HTTP process that stalls, cancels, or is told to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.ipc.messages import (
    CANCEL,
    LENGTH,
    Call,
    CallMessage,
    CancelRequest,
    Delta,
    Failure,
    WorkerChannel,
    decode_updates,
    encode,
)
from aurora_lit.request import Output, Request, SamplingParams
from aurora_lit.serve.worker import loop
from aurora_lit.serve.worker import outbox as outbox_module
from aurora_lit.serve.worker.loop import EngineLoop, _Untold
from aurora_lit.serve.worker.parts import WorkerParts
from aurora_lit.serve.worker.status_report import RoundTimes, StatusReport
from aurora_lit.serve.worker.swap_gain import SwapGain

TOKENIZER = tiny_tokenizer()
BACKLOG_BYTES = 300_000
ENDLESS = 10**6
"""Tokens that no test waits for."""


class HTTPProcess:
    """The other end of the loop's socket; reads only in `read` and `read_until`."""

    def __init__(self, connection: socket.socket, page: EngineStatusPage, loop_has_ended: threading.Event) -> None:
        self._connection, self.page, self.loop_has_ended = connection, page, loop_has_ended
        connection.settimeout(20)
        self.deltas: dict[tuple[str, int], list[Delta]] = {}
        """By call and choice, all that were read."""
        self.failures: dict[str, Failure] = {}
        self.num_bytes = 0

    def call(self, call_id: str, *prompts: str, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        requests = tuple(
            Request(request_id=f"{call_id}-{i}", prompt_ids=tuple(TOKENIZER.encode(prompt)), params=params)
            for i, prompt in enumerate(prompts)
        )
        self.send((call_id, Call(call_id=call_id, requests=requests)))

    def send(self, message: CallMessage) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, content: bytes) -> None:
        self._connection.sendall(content)

    def read(self) -> None:
        """Read one message. Nothing may follow the error that ended a call."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        for call_id, update in decode_updates(self._exactly(length)):
            assert call_id not in self.failures
            if isinstance(update, Failure):
                self.failures[call_id] = update
                continue
            for delta in update:
                self.deltas.setdefault((call_id, delta.index), []).append(delta)

    def read_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.read()

    def tokens(self, call_id: str, index: int = 0) -> list[int]:
        return [token_id for delta in self.deltas.get((call_id, index), ()) for token_id in delta.token_ids]

    def ended(self, call_id: str, index: int = 0) -> bool:
        return bool(self.deltas.get((call_id, index))) and self.deltas[call_id, index][-1].finish_reason is not None

    def wait_until(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.001)

    def _exactly(self, length: int) -> bytes:
        content = b""
        while len(content) < length:
            piece = self._connection.recv(length - len(content))
            if not piece:
                raise EOFError
            content += piece
        self.num_bytes += length
        return content


class DraftToSwap:
    """In place of a LiveDraft: records what had been told whenever a draft could be swapped."""

    domain_watch = refused = rolled_back = alarm = None
    num_swaps = num_refused = num_rollbacks = num_alarms = 0

    def __init__(self) -> None:
        self.engine: FakeEngine
        self.gain = SwapGain()
        self.told = 0
        """Tokens."""
        self.untold_at_swaps: list[int] = []
        """Tokens."""

    def start(self, *, on_change: Callable[[], None]) -> None: ...

    def close(self) -> None: ...

    def before_round(self) -> None:
        self.untold_at_swaps.append(self.engine.counters.generated_tokens - self.told)

    def after_round(self, outputs: Sequence[Output], kinds: Sequence[object]) -> None:
        self.told += sum(len(output.token_ids) for output in outputs)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeEngine]]:
    """Runs a loop in this thread, for its signal handler, until `http_process` returns in another one."""
    monkeypatch.setattr(outbox_module, "BACKLOG_BYTES", BACKLOG_BYTES)
    handler = signal.getsignal(signal.SIGTERM)

    def serve(
        http_process: Callable[[HTTPProcess], None],
        *,
        live: DraftToSwap | None = None,
        close: Callable[[], None] = lambda: None,
        **options: float,
    ) -> FakeEngine:
        http_end, worker_end = socket.socketpair()
        page = EngineStatusPage.create(tmp_path / "status")
        engine = FakeEngine(FakeOptions(**{"tokens_per_round": 2, **options}))  # type: ignore[arg-type]
        errors, loop_has_ended = list[BaseException](), threading.Event()
        if live is not None:
            live.engine = engine

        def run() -> None:
            try:
                http_process(HTTPProcess(http_end, EngineStatusPage.open(tmp_path / "status"), loop_has_ended))
            except BaseException as error:
                errors.append(error)
            finally:
                http_end.close()

        thread = threading.Thread(target=run)
        thread.start()
        parts = WorkerParts(engine=engine, close=close)
        with pytest.raises(SystemExit) as ended:
            EngineLoop(WorkerChannel(worker_end), page).run(parts, live)  # type: ignore[arg-type]
        loop_has_ended.set()
        thread.join()
        worker_end.close()
        assert not errors, errors[0]
        assert ended.value.code == 0
        return engine

    yield serve
    signal.signal(signal.SIGTERM, handler)


def test_while_the_http_process_stalls_rounds_go_on_until_the_backlog_is_full_and_later_calls_are_fine(
    serve: Callable[..., FakeEngine],
) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", "xyz", max_tokens=ENDLESS)
        http.call("b", "hello", max_tokens=ENDLESS)
        # It does not read, so only its bounded backlog ends the rounds; then the engine has nothing to do.
        http.wait_until(lambda: http.page.read().running == 3)
        http.wait_until(lambda: http.page.read().running == 0)
        assert http.page.read().rounds > 500
        http.read_until(lambda: http.failures.keys() == {"a", "b"})
        assert {(failure.code, failure.status) for failure in http.failures.values()} == {("slow_reader", 503)}
        assert http.num_bytes < BACKLOG_BYTES + (1 << 20), "memory is bounded"
        for key, prompt in ((("a", 0), "abcd"), (("a", 1), "xyz"), (("b", 0), "hello")):
            ids = TOKENIZER.encode(prompt)
            got = http.tokens(*key)
            assert len(got) > 500
            assert got == (ids * len(got))[: len(got)], "none is missing before the error"
        http.call("later", "abc", max_tokens=5)
        http.read_until(lambda: http.ended("later"))
        assert http.tokens("later") == TOKENIZER.encode("abcab")

    engine = serve(http_process)
    assert not engine.has_work


def test_one_request_of_a_call_is_cancelled_and_the_other_goes_on(serve: Callable[..., FakeEngine]) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", "xyz", max_tokens=ENDLESS)
        http.read_until(lambda: http.tokens("a", 1))
        http.send(("a", CancelRequest(0)))
        http.wait_until(lambda: http.page.read().running == 1)
        http.send(("a", CANCEL))
        http.wait_until(lambda: http.page.read().running == 0)
        http.call("later", "abc", max_tokens=5)
        http.read_until(lambda: http.ended("later"))
        assert len(http.tokens("a", 0)) < len(http.tokens("a", 1))

    serve(http_process, round_s=0.001)


def test_a_refused_call_is_told_so_and_the_others_go_on(serve: Callable[..., FakeEngine]) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.call("good", "abc", max_tokens=5)
        http.call("long", "<|toolong|>", max_tokens=5)
        http.call("bad", "abc", "<|refuse|>", max_tokens=5)
        http.read_until(lambda: http.ended("good") and len(http.failures) == 2)
        assert http.failures["long"].code == "context_length_exceeded"
        assert http.failures["bad"].code == "engine_error"
        assert http.tokens("bad") == []

    serve(http_process)


def test_a_call_that_cannot_be_read_is_told_so(serve: Callable[..., FakeEngine]) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.send(("bad", {"call_id": "bad"}))  # type: ignore[arg-type]
        http.read_until(lambda: "bad" in http.failures)
        assert "cannot be read" in http.failures["bad"].message
        http.call("a", "abc", max_tokens=5)
        http.read_until(lambda: http.ended("a"))

    serve(http_process)


def test_a_message_that_cannot_be_read_is_dropped_and_the_next_one_is_read(
    serve: Callable[..., FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.send_bytes(LENGTH.pack(7) + b"\xc1damage")  # no msgpack begins like this
        http.call("a", "abc", max_tokens=5)
        http.read_until(lambda: http.ended("a"))
        assert http.tokens("a") == TOKENIZER.encode("abcab")

    serve(http_process)
    assert "7 bytes are no message of the HTTP process" in caplog.text


@pytest.mark.parametrize("stalled", [False, True])
def test_after_sigterm_the_running_request_and_calls_that_come_later_are_answered_whole(
    serve: Callable[..., FakeEngine], stalled: bool
) -> None:
    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", max_tokens=3000)
        http.wait_until(lambda: http.page.read().rounds > 10)
        os.kill(os.getpid(), signal.SIGTERM)
        if stalled:
            http.wait_until(lambda: http.page.read().rounds == 1500)
            assert not http.loop_has_ended.wait(0.3), "what it has not sent would be lost with its process"
            assert http.page.read().running == 0, "a stall within the bound holds no round up"
        http.read_until(lambda: http.ended("a"))
        assert len(http.tokens("a")) == 3000
        time.sleep(0.1)  # nothing runs
        http.call("accepted before SIGTERM, sent after it", "abcd", max_tokens=8)
        http.read_until(lambda: http.ended("accepted before SIGTERM, sent after it"))

    serve(http_process)


def test_what_rounds_bring_is_told_together_but_at_once_where_a_request_begins_or_ends() -> None:
    untold, told = _Untold(), []

    def round_at(ms: float, *running: str, ends: str = "") -> None:
        names = [*running, ends] if ends else running
        outputs = [
            Output(request_id=name, token_ids=(7,), finish_reason="stop" if name == ends else None) for name in names
        ]
        if untold.add(outputs, ms / 1000):
            told.append((ms, "".join(output.request_id for output in untold.take(ms / 1000))))

    round_at(0, "a")  # begins
    for ms in (4, 8, 12, 16, 20):
        round_at(ms, "a")
    assert told == [(0, "a"), (12, "aaa")]
    round_at(21, "a", "b")  # b begins
    round_at(22, "b", ends="a")
    round_at(23, "b")
    round_at(24, ends="b")
    round_at(25)
    round_at(26, "c")  # begins as soon as another has ended
    assert told[2:] == [(21, "aaab"), (22, "ba"), (24, "bb"), (26, "c")]
    assert untold.outputs == []


def test_a_draft_is_swapped_between_rounds_but_not_while_what_they_brought_is_untold(
    serve: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be judged as the next draft's."""
    monkeypatch.setattr(loop, "_TELL_EVERY_S", 0.05)

    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", max_tokens=200)
        http.read_until(lambda: http.ended("a"))

    draft = DraftToSwap()
    rounds = serve(http_process, live=draft, round_s=0.002).counters.rounds
    assert rounds == 100
    assert set(draft.untold_at_swaps) == {0}
    assert 3 < len(draft.untold_at_swaps) < rounds
    assert draft.told == 200


def test_what_is_pending_is_written_before_the_end_waits_for_a_draft_that_loads(
    serve: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process kills a worker that takes long to end."""
    closed: list[str] = []
    draft = DraftToSwap()
    monkeypatch.setattr(draft, "close", lambda: closed.append("draft"))
    serve(lambda http: None, live=draft, close=lambda: closed.append("traces"))
    assert closed == ["traces", "draft"]


def test_a_request_that_ends_idleness_is_told_before_its_first_round(
    serve: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner that uses the idle time has to give way."""
    running_before_rounds: list[int] = []
    round_of = FakeEngine.round

    def round(self: FakeEngine) -> list[Output]:
        running_before_rounds.append(http_end[0].page.read().running)
        return round_of(self)

    monkeypatch.setattr(FakeEngine, "round", round)
    http_end: list[HTTPProcess] = []

    def http_process(http: HTTPProcess) -> None:
        http_end.append(http)
        for name in "ab":
            http.call(name, "abcd", "efgh", max_tokens=4)
            http.read_until(lambda name=name: http.ended(name, 0) and http.ended(name, 1))
            http.wait_until(lambda: http.page.read().running == 0)

    serve(http_process)
    assert running_before_rounds == [2, 2] * (len(running_before_rounds) // 2)


def test_counters_are_written_ten_times_a_second_and_when_a_request_ends(
    serve: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[float, int]] = []
    write = StatusReport.write

    def recorded(self: StatusReport, **more: int) -> None:
        write(self, **more)
        written.append((time.perf_counter(), self._parts.engine.counters.rounds))

    monkeypatch.setattr(StatusReport, "write", recorded)

    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", max_tokens=400)
        http.wait_until(lambda: http.page.read().rounds == 200)

    serve(http_process, round_s=0.003)
    while_it_runs = [at_s for at_s, rounds in written if 0 < rounds < 200]
    assert 4 <= len(while_it_runs) <= 2 + (while_it_runs[-1] - while_it_runs[0]) / 0.1


def test_a_round_in_which_all_wait_for_their_grammars_is_not_timed(
    serve: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps, which would count as long rounds."""
    waits, timed = iter(range(5)), list[float]()
    round_of = FakeEngine.round

    def round(self: FakeEngine) -> list[Output]:
        return round_of(self) if next(waits, None) is None else []

    monkeypatch.setattr(FakeEngine, "round", round)
    monkeypatch.setattr(RoundTimes, "add", lambda self, seconds, *, swapped: timed.append(seconds))

    def http_process(http: HTTPProcess) -> None:
        http.call("a", "abcd", max_tokens=8)
        http.read_until(lambda: http.ended("a"))

    engine = serve(http_process)
    assert engine.counters.rounds == len(timed) == 4
