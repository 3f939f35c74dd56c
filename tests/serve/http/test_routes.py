"""GenerationRoutes without a server: a large response is built outside of the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import Delta
from aurora_lit.request import TokenLogprob
from aurora_lit.serve.http.channel import RESPONSES_UID
from aurora_lit.serve.http.metrics import ServerMetrics
from aurora_lit.serve.http.responses import TextResponse
from aurora_lit.serve.http.routes import GenerationRoutes
from aurora_lit.serve.http.schema import CompletionRequest
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
    status = EngineStatusPage.create(tmp_path / "status")
    status.write(state=WorkerState.READY, max_seq_len=64, vocab_size=len(TOKENIZER))
    status.beat()
    worker_client = WorkerClient(status=status, max_queue=4, tokenizer=TOKENIZER)
    worker_client.connect(Spec())
    learner: Any = None
    routes = GenerationRoutes(
        model="m",
        tokenizer=TOKENIZER,
        worker_client=worker_client,
        metrics=ServerMetrics(model="m", status=status, learner=learner, ring=learner),
        status=status,
        stream_shape=StreamShape(),
    )
    request: Any = SimpleNamespace(client=None, receive=receive)

    async def answer() -> str:
        body = CompletionRequest(prompt=[TOKEN], echo=True, logprobs=0, max_tokens=1, stream=stream)
        response: Any = await routes.complete(body, request)
        if not stream:
            return str(response.body, "utf-8")
        parts = [part async for part in response.body_iterator]
        return "".join(parts).removeprefix("data: ").partition("\n")[0]

    (choice,) = json.loads(asyncio.run(answer()))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert threads
    assert threading.get_ident() not in threads
