"""How large a body may be, and of how many parts, before it is parsed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from aurora_lit.errors import RequestError
from aurora_lit.serve.http import bodies
from aurora_lit.serve.http.bodies import MOST_CONTAINERS, BodyLimits, check_containers, most_bytes
from aurora_lit.serve.http.errors import error_body
from aurora_lit.settings import AuroraConfig, EngineSettings, ServerSettings


def refused(body: bytes) -> bool:
    try:
        check_containers(body)
    except RequestError:
        return True
    return False


def test_lists_and_objects_are_counted_outside_strings() -> None:
    many = MOST_CONTAINERS + 1
    assert refused(b"[[1]," * many)
    assert refused(b'{"prompt": [' + b",".join([b"{}"] * many) + b"]}")
    assert not refused(b"[" + b",".join([b"[1]"] * (MOST_CONTAINERS - 1)) + b"]")
    code = 'while (a[i][j]) { b[i] = \'\\\\\'; printf("[\\"\\\\"); }\n' * many
    assert not refused(json.dumps({"prompt": code, "suffix": code}).encode())
    nested = json.dumps({"prompt": 'a\\"' * 3, "n": []}).encode()
    assert refused(nested[:-2] + b"[1]," * many + b"]}")
    assert refused(b'["a",' * (MOST_CONTAINERS * 8 + 1)), "too many strings to be told apart"
    assert refused(('["' + "[1]," * many + '"').encode("utf-16")), "there escapes cannot be told apart"


def test_the_largest_body_follows_from_the_settings() -> None:
    def of(max_seq_len: int, max_queue: int) -> int:
        engine, server = EngineSettings(max_seq_len=max_seq_len), ServerSettings(max_queue=max_queue)
        return most_bytes(AuroraConfig(engine=engine, server=server))

    assert of(16, 1) == 2 * 2**20 + 32 * 16
    assert of(2048, 64) == 6 * 2**20
    assert of(1 << 20, 64) == 16 * 2**20


def ask(parts: list[bytes], *, most: int = 1000, announced: int | None = None, app: Any = None) -> tuple[int, Any]:
    """Status and what the route has seen, of a body that arrives in these parts."""

    async def explain(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse(error_body(error), error.status)

    async def route(request: Request) -> Any:
        return {"seen": len(await request.body())}

    app = FastAPI()
    app.add_api_route("/", route, methods=["POST"])
    app.add_middleware(BodyLimits, most=most, explain=explain)
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    left[-1]["more_body"] = False
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0)
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if announced is None else [(b"content-length", str(announced).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_beyond_the_limit_is_refused_before_it_is_read() -> None:
    assert ask([b"x" * 600, b"x" * 400]) == (200, {"seen": 1000})
    status, answer = ask([b"x"], announced=1001)
    assert status == 413
    assert "engine.max_seq_len" in answer["error"]["message"]
    assert "server.max_queue" in answer["error"]["message"]
    assert ask([b"x" * 600, b"x" * 401, b"x"])[0] == 413  # one that is not announced


def test_large_bodies_that_arrive_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MOST_LARGE", 0)
    assert ask([b"x" * 1000], most=1 << 20)[0] == 200
    assert ask([b"x" * (1 << 16), b"x"], most=1 << 20)[0] == 429
