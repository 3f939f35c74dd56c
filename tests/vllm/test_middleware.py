"""Consent and labels reach the engine as extra arguments; everything else passes untouched."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.made_vllm import made_deployment

from aurora_lit.vllm.deployment import VARIABLE
from aurora_lit.vllm.middleware import Middleware, with_extra_arguments


def sent(fields: dict[str, Any]) -> Any:
    return json.loads(with_extra_arguments(json.dumps(fields).encode())).get("vllm_xargs")


def test_consent_and_label_become_extra_arguments_beside_those_given() -> None:
    assert sent({"store": False}) == {"aurora_lit_store": 0}
    assert sent({"metadata": {"aurora_domain": "code"}}) == {"aurora_lit_domain": "code"}
    assert sent({"store": False, "vllm_xargs": {"a": 1}}) == {"a": 1, "aurora_lit_store": 0}
    for other in (0, "false", "off"):  # which vLLM may take for False
        assert sent({"store": other}) == {"aurora_lit_store": 0}
    assert sent({"store": True}) is None
    assert sent({"store": None, "metadata": None}) is None
    assert sent({"store": False, "metadata": 3}) == {"aurora_lit_store": 0}


@pytest.mark.parametrize("coding", ["utf-8", "utf-16", "utf-32", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["store", "st\\u006fre"])
def test_consent_is_found_however_json_spells_it(name: str, coding: str) -> None:
    body = f'{{"{name}": false, "prompt": "a"}}'.encode(coding)
    assert json.loads(body) == {"store": False, "prompt": "a"}, "as vLLM reads it"
    assert json.loads(with_extra_arguments(body))["vllm_xargs"] == {"aurora_lit_store": 0}


def test_a_client_cannot_set_the_arguments_itself() -> None:
    assert sent({"store": False, "vllm_xargs": {"aurora_lit_store": 1}}) == {"aurora_lit_store": 0}
    assert sent({"vllm_xargs": {"aurora_lit_domain": "x"}}) is None


@pytest.mark.parametrize("body", [b"", b"{", b'["store"]', b'"store"', b'{"messages": [1]}'])
def test_what_is_no_request_is_left_to_vllm(body: bytes) -> None:
    assert with_extra_arguments(body) == body


class MadeApp:
    """The application behind the middleware; keeps what it received."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.lengths: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the whole body."""
        parts, more = [], scope["type"] == "http"
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message.get("more_body", False)
        self.bodies.append(b"".join(parts))
        self.lengths += [value for name, value in scope.get("headers", []) if name == b"content-length"]


async def _nothing(message: Any = None) -> Any:
    raise AssertionError("not called")


def _post(body: bytes, *, chunks: int = 2, path: str = "/v1/completions") -> tuple[dict[str, Any], Any]:
    size = -(-len(body) // chunks)
    messages = [
        {"type": "http.request", "body": body[i * size : (i + 1) * size], "more_body": i + 1 < chunks}
        for i in range(chunks)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    headers = [(b"content-length", str(len(body)).encode())]
    return {"type": "http", "method": "POST", "path": path, "headers": headers}, receive


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made_deployment(tmp_path, tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def test_a_request_in_pieces_arrives_with_its_label_and_the_length_that_the_client_sent(run_folder: Path) -> None:
    app = MadeApp()
    scope, receive = _post(json.dumps({"store": False, "prompt": "é"}).encode())
    asyncio.run(Middleware(app)(scope, receive, _nothing))
    assert json.loads(app.bodies[0]) == {"store": False, "prompt": "é", "vllm_xargs": {"aurora_lit_store": 0}}
    assert app.lengths == [dict(scope["headers"])[b"content-length"]], "vLLM's /metrics counts what the client has sent"


def test_a_body_is_read_only_if_vllm_reads_it(run_folder: Path) -> None:
    """vllm/entrypoints/serve/middleware: those of --middleware come first, and a wrong key is answered unread."""
    answers = list[Any]()

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})

    async def send(message: Any) -> None:
        answers.append(message["status"])

    scope, _ = _post(b"")
    asyncio.run(Middleware(refuse)(scope, _nothing, send))
    assert answers == [401]


def test_a_client_that_goes_away_is_seen_by_vllm_before_and_after_the_end_of_its_body(run_folder: Path) -> None:
    """As vllm/entrypoints/serve/utils/api_utils.py, `listen_for_disconnect`, does after the body."""
    gone = {"type": "http.disconnect"}
    seen = list[list[Any]]()

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        seen.append([])
        while not seen[-1] or seen[-1][-1] != gone:
            seen[-1].append(await receive())

    for more_body in (True, False):
        messages = [{"type": "http.request", "body": b"{}", "more_body": more_body}, gone]

        async def receive() -> Any:
            return messages.pop(0)  # noqa: B023

        asyncio.run(Middleware(listen)(_post(b"{}")[0], receive, _nothing))
    assert seen == [[gone], [{"type": "http.request", "body": b"{}", "more_body": False}, gone]]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/chat/completions/batch", "/v1/messages", "/v1/responses", "/invocations"]
)
def test_consent_is_read_on_every_route_that_takes_it(run_folder: Path, path: str) -> None:
    """Those whose protocol.py in vllm/entrypoints has `vllm_xargs`; /v1/messages hands it to the chat's request."""
    app = MadeApp()
    scope, receive = _post(json.dumps({"store": False, "messages": []}).encode(), path=path)
    asyncio.run(Middleware(app)(scope, receive, _nothing))
    assert json.loads(app.bodies[0])["vllm_xargs"] == {"aurora_lit_store": 0}


def test_what_the_drafts_folder_logs_is_in_vllms_log(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    handler = logging.StreamHandler(io.StringIO())
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("aurora_lit")
    theirs.addHandler(handler)
    app = SimpleNamespace(state=SimpleNamespace(engine_client=object()))
    try:
        asyncio.run(Middleware(MadeApp())({"type": "lifespan", "app": app}, _nothing, _nothing))
        logging.getLogger("aurora_lit.drafts.hot_reload").warning("draft x is not served")
    finally:
        theirs.removeHandler(handler)
        ours.removeHandler(handler)
        ours.setLevel(logging.NOTSET)
    assert "draft x is not served\n" in handler.stream.getvalue()


@pytest.mark.parametrize("folder", [None, "nothing-here"])
def test_without_a_deployment_nothing_is_touched(folder: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(VARIABLE, folder)
    app, body = MadeApp(), json.dumps({"store": False}).encode()
    middleware = Middleware(app)
    asyncio.run(middleware(*_post(body), _nothing))
    asyncio.run(middleware({"type": "lifespan"}, _nothing, _nothing))
    assert app.bodies == [body, b""]
