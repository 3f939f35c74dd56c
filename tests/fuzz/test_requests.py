"""Whatever a client sends: an answer, or an error that names the field; and no grammar ends the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import strategies as st
from support.fake_engine import FIM_MARKS, FakeEngine, FakeOptions, tiny_tokenizer
from support.grammars import byte_tokenizer
from support.mutations import mutated_bytes, mutated_json, odd_values
from uvicorn.config import Config
from uvicorn.server import ServerState

from aurora_lit.errors import RequestError
from aurora_lit.grammars.definition import fault_of
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.ipc.messages import Call, decode_call, encode
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.serve.http.bodies import BodyLimits
from aurora_lit.serve.http.channel import RESPONSES_UID
from aurora_lit.serve.http.connection import LimitedConnection
from aurora_lit.serve.http.errors import install_error_handlers
from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.metrics import ServerMetrics
from aurora_lit.serve.http.routes import GenerationRoutes
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from aurora_lit.serve.http.stream_events import StreamShape
from aurora_lit.serve.http.token_routes import TokenRoutes
from aurora_lit.serve.http.worker_client import WorkerClient
from aurora_lit.serve.worker.call_tracker import CallTracker

SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
TOLD = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [TOLD]},
    {"role": "tool", "tool_call_id": "a", "content": "world"},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
EVERYWHERE = {
    "max_tokens": 4,
    "n": 2,
    "stop": ["lo"],
    "logit_bias": {"5": 1.5},
    "stream": True,
    "seed": 7,
    "top_p": 0.9,
}
BODIES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "/v1/chat/completions": (
        ChatRequest,
        [
            {
                "messages": MESSAGES,
                "tools": [TOOL],
                "tool_choice": "auto",
                "max_tokens": 4,
                "parallel_tool_calls": False,
            },
            {"messages": MESSAGES[:2], "response_format": FORMAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 3},
            {"messages": MESSAGES[:1], **EVERYWHERE, "stream_options": {"include_usage": True}, "metadata": {"a": "b"}},
        ],
    ),
    "/v1/completions": (
        CompletionRequest,
        [
            {"prompt": "hello", "echo": True, "logprobs": 2, "max_tokens": 3, "prompt_logprobs": 1},
            {"prompt": ["a", "b"], "suffix": "tail", **EVERYWHERE},
            {"prompt": [[1, 2], [3]], "structured_outputs": {"regex": "a|b"}, "max_tokens": 2, "min_tokens": 0},
        ],
    ),
    "/v1/fim/completions": (FimRequest, [{"prompt": "hello", "suffix": "world", **EVERYWHERE, "min_tokens": 1}]),
    "/infill": (
        InfillRequest,
        [
            {
                **{"input_prefix": "hello\n", "input_suffix": "", "prompt": "a", "n_predict": 4, "t_max_predict_ms": 9},
                **{"input_extra": [{"filename": "a", "text": "b"}], "id_slot": 0, "n_indent": 1, "stream": True},
            }
        ],
    ),
    "/tokenize": (TokenizeRequest, [{"prompt": "a", "return_token_strs": True}, {"messages": MESSAGES[:2]}]),
    "/detokenize": (DetokenizeRequest, [{"tokens": [1, 2, 3]}]),
}


class Worker:
    """What WorkerClient uses of LitServe's spec, with a worker that answers each call at once."""

    def __init__(self) -> None:
        self.response_buffer: dict[str, Any] = {}
        self.request_queue = SimpleNamespace(put=self._answer)

    def _answer(self, message: Any) -> None:
        call_id, call = decode_call(encode(message)[8:])
        if not isinstance(call, Call):
            return
        engine = FakeEngine(FakeOptions(max_seq_len=128, fills_holes=True))
        tracker = CallTracker(engine)
        tracker.add(call)
        while engine.has_work:
            updates = tracker.advance(engine.round()).updates
            self.response_buffer[RESPONSES_UID].response_queue.append((updates, "OK"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The routes that take a body, in this process."""
    tokenizer = tiny_tokenizer(FIM_MARKS)
    status = EngineStatusPage.create(tmp_path_factory.mktemp("run") / "status")
    status.write(state=WorkerState.READY, max_seq_len=128, vocab_size=len(tokenizer), max_draft_tokens=2)
    status.beat()
    client = WorkerClient(status=status, max_queue=8, tokenizer=tokenizer)
    client.connect(Worker())
    client.unavailable_reason = lambda: None  # type: ignore[method-assign]  # nothing beats while examples are made
    nothing: Any = None
    metrics = ServerMetrics(model="tiny", status=status, learner=nothing, ring=nothing)
    shared: Any = {"model": "tiny", "tokenizer": tokenizer, "status": status}
    generation = GenerationRoutes(**shared, worker_client=client, metrics=metrics, stream_shape=StreamShape())
    tokens = TokenRoutes(**shared)
    routes = [generation.chat, generation.complete, generation.fill, generation.infill, tokens.tokenize]
    made = FastAPI()
    for path, route in zip(BODIES, [*routes, tokens.detokenize], strict=True):
        made.add_api_route(path, route, methods=["POST"])
    install_error_handlers(made, on_error=lambda status: None, needs_key=False)
    return made


def check_answer(response: httpx.Response) -> None:
    """An answer, or an error of the client's that names a field."""
    if response.status_code == 200:
        if not response.headers["content-type"].startswith("text/event-stream"):
            json.loads(response.content)
            return
        for line in response.text.splitlines():
            content = line.removeprefix("data: ")
            assert not line or content == "[DONE]" or "server_error" not in json.dumps(json.loads(content))
        return
    assert response.status_code in (400, 404, 429), (response.status_code, response.text)
    error = response.json()["error"]
    assert error["message"]
    assert error["param"], error


def test_json_bodies(fuzz: Any, app: FastAPI) -> None:
    async def send(path: str, content: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content, headers={"Content-Type": "application/json"})

    def check(path_and_content: tuple[str, bytes]) -> None:
        check_answer(asyncio.run(send(*path_and_content)))

    def bodies(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
        kind, examples = BODIES[path]
        example = st.sampled_from(examples)
        names = st.sampled_from([field.alias or name for name, field in kind.model_fields.items()])
        one_more = st.tuples(example, names, odd_values()).map(lambda parts: {**parts[0], parts[1]: parts[2]})
        changed = st.one_of(example.flatmap(mutated_json), one_more, one_more.flatmap(mutated_json))
        texts = changed.map(lambda body: json.dumps(body).encode())
        return st.tuples(st.just(path), st.one_of(texts, texts, texts.flatmap(mutated_bytes)))

    fuzz(check, st.sampled_from(list(BODIES)).flatmap(bodies), examples=60)


BODY = json.dumps(BODIES["/v1/completions"][1][0]).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
RAW = [
    HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n5\r\n"
    + BODY[:5]
    + b"\r\n%x\r\n" % len(BODY[5:])
    + BODY[5:]
    + b"\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    + HEAD
    + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
]


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self._closing = b"", False

    def write(self, data: Any) -> None:
        assert not self._closing, "nothing is written after the end"
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def test_bytes_of_connections(fuzz: Any, app: FastAPI) -> None:
    async def refused(request: Any, error: Exception) -> Any:
        return await app.exception_handlers[RequestError](request, error)  # type: ignore[misc]

    config = Config(BodyLimits(app, most=10_000, explain=refused), log_config=None, lifespan="off", ws="none")
    config.load()

    async def speak(parts: list[bytes]) -> bytes:
        state, transport = ServerState(), Transport()
        connection = LimitedConnection(config, state, {})
        connection.connection_made(transport)
        for part in parts:
            if transport.is_closing():
                break
            connection.data_received(part)
            await asyncio.sleep(0)
        ends_s = time.monotonic() + 0.05
        while state.tasks and time.monotonic() < ends_s:  # one that waits for its body never ends
            await asyncio.sleep(0.001)
        transport.close()
        connection.connection_lost(None)
        async with asyncio.timeout(5):
            while state.tasks:
                await asyncio.sleep(0.001)
        assert not state.connections
        assert connection._deadline is None
        return transport.written

    def check(content: bytes, sizes: list[int]) -> None:
        parts, at = [], 0
        for size in [*sizes, len(content)]:
            parts.append(content[at : at + size])
            at += size
        written = asyncio.run(speak([part for part in parts if part]))
        assert not written or written.startswith(b"HTTP/1.1 ")
        assert not re.search(rb"(?m)^HTTP/1\.1 5", written), written

    content = st.lists(st.sampled_from(RAW), min_size=1, max_size=3).map(b"".join)
    fuzz(
        check, st.one_of(content, content.flatmap(mutated_bytes)), st.lists(st.integers(1, 90), max_size=4), examples=60
    )


# -- grammars ----------------------------------------------------------------------------------------------------------

SCHEMAS: list[Any] = [
    SCHEMA,
    {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"anyOf": [{"type": "null"}, {"items": {"$ref": "#/$defs/t"}, "type": "array"}]}},
    },
    {"type": "string", "pattern": "^[a-c]+$", "minLength": 2, "maxLength": 5, "format": "date"},
    {"type": "integer", "minimum": -5, "maximum": 99, "multipleOf": 3},
    {"allOf": [{"type": "object", "additionalProperties": {"enum": [1, "a", None]}}, {"minProperties": 1}]},
    {"prefixItems": [{"const": "a"}, {"type": "number", "exclusiveMinimum": 0.5}], "minItems": 2, "type": "array"},
]
REGEXES = st.lists(
    st.sampled_from([*"ab.^$|()[]{}*+?\\-,&~é", "(a|b)", "[^a-z]", "{1,3}", "{150}", r"\d", r"\p{L}", r"\b", "(?i)"]),
    max_size=12,
).map("".join)
GBNF = 'root ::= item ("," item)* ws\nitem ::= [a-z]+ | "\\"" [^"]{2,5} "\\"" | root?\nws ::= [ \\t\\n]*\n'
LARK = 'start: a "," a?\na: /[a-z]+/ | B{1,3}\nB: "x" | "\\n"\n%json {"type": "integer", "minimum": -7}\n'


def run_in_child(work: Callable[[], None], *, seconds: int, more_bytes: int) -> None:
    """In a copy of this process, with a limit of its time and of the memory beyond what this one has."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + more_bytes, size + more_bytes))
            signal.alarm(seconds)
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "it ended the process, or took too long"


def test_grammars(fuzz: Any) -> None:
    state = byte_tokenizer().to_str()

    def follow(asked: StructuredOutputsParams) -> None:
        if fault_of(asked) is not None:
            return
        compiler = GrammarCompiler(lambda: state, vocab_size=257, eos_token_ids=frozenset([256]))
        with contextlib.suppress(RequestError):
            grammar = compiler.compile(asked, end_tokens=frozenset([256])).result()
            for step in range(12):
                allowed = [token for token in range(256) if grammar.allowed[token >> 3] >> (token & 7) & 1]
                if not allowed:
                    return
                grammar.branch().forced()
                grammar.advance([allowed[step * 7 % len(allowed)]])

    def check(asked: dict[str, Any]) -> None:
        run_in_child(lambda: follow(StructuredOutputsParams(**asked)), seconds=8, more_bytes=4 << 30)

    texts = st.sampled_from([GBNF, LARK]).flatmap(lambda text: mutated_bytes(text.encode()))
    fuzz(
        check,
        st.one_of(
            st.sampled_from(SCHEMAS).flatmap(mutated_json).map(lambda schema: {"json": json.dumps(schema)}),
            REGEXES.map(lambda text: {"regex": text}),
            texts.map(lambda content: {"grammar": content.decode(errors="replace")}),
        ),
        examples=12,
    )
