"""/tokenize and /detokenize do few texts at a time, so that they leave threads to requests for answers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.serve.http import token_routes
from aurora_lit.serve.http.schema import DetokenizeRequest, TokenizeRequest
from aurora_lit.serve.http.token_routes import TokenRoutes


def test_two_texts_at_a_time_and_too_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_routes, "_MOST_WAITING", 4)
    tokenizer = tiny_tokenizer()
    status = EngineStatusPage.create(tmp_path / "status")
    status.write(state=WorkerState.READY, max_seq_len=64, vocab_size=len(tokenizer))
    routes = TokenRoutes(model="m", tokenizer=tokenizer, status=status)
    running, go_on = threading.Semaphore(0), threading.Event()
    encode: Any = TokenRoutes._tokenize

    def slow(*arguments: Any) -> Any:
        running.release()
        assert go_on.wait(10)
        return encode(*arguments)

    monkeypatch.setattr(TokenRoutes, "_tokenize", slow)

    async def run() -> None:
        body = TokenizeRequest(prompt="hello")
        tasks = [asyncio.create_task(routes.tokenize(body)) for _ in range(4)]
        for _ in range(2):
            assert await asyncio.to_thread(running.acquire, timeout=10)
        assert not await asyncio.to_thread(running.acquire, timeout=0.1), "the other two wait"
        for refused in (routes.tokenize(body), routes.detokenize(DetokenizeRequest(tokens=[1]))):
            with pytest.raises(RequestError, match="4 texts .* try again later") as caught:
                await refused
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 4
        assert (await routes.detokenize(DetokenizeRequest(tokens=[1]))).status_code == 200

    asyncio.run(run())


def test_a_text_of_too_many_characters_is_told_under_the_field_that_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_routes, "_MOST_CHARACTERS", 20)
    status = EngineStatusPage.create(tmp_path / "status")
    routes = TokenRoutes(model="m", tokenizer=tiny_tokenizer(), status=status)
    turns: Any = [{"role": "user", "content": "a" * 21}]
    for body in (TokenizeRequest(prompt="a" * 21), TokenizeRequest(messages=turns)):
        field = "prompt" if body.messages is None else "messages"
        with pytest.raises(RequestError, match=f"^{field}: ") as refused:
            asyncio.run(routes.tokenize(body))
        assert refused.value.param == field
