"""Bad requests: each gets its status, OpenAI's error body and the name of the field; the server goes on."""

import asyncio
import gzip
import http.client
import json
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from support.fake_engine import FIM_MARKS, tiny_tokenizer
from support.fake_server import MODEL, FakeServer

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineStatusPage, WorkerState
from aurora_lit.serve.api import AuroraAPI
from aurora_lit.serve.http.errors import install_error_handlers
from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.routes import GenerationRoutes
from aurora_lit.serve.http.schema import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from aurora_lit.serve.http.stream_events import StreamShape
from aurora_lit.serve.http.token_routes import TokenRoutes
from aurora_lit.serve.http.worker_client import WorkerClient
from aurora_lit.settings import AuroraConfig, ServerSettings

KEY = "sekret-ключах"
"""Clients write it in UTF-8. The last byte of х is white space in Latin-1."""
CHAT, TEXT, FILL, INFILL = "/v1/chat/completions", "/v1/completions", "/v1/fim/completions", "/infill"
JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 4, **fields}


def text(**fields):
    return {"model": MODEL, "prompt": "hello", "max_tokens": 4, **fields}


def infill(**fields):
    return {"input_prefix": "hello", "input_suffix": "", "n_predict": 4, **fields}


def message(**fields):
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


def json_schema(schema, **fields):
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, **fields)


def check_error(response, status, param):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert len(error["message"]) < 400
    expected = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error"}
    assert error["type"] == expected.get(status, "invalid_request_error")
    if param is not None and param not in ("body", "content-type"):
        assert param.partition("[")[0].partition(".")[0] in error["message"] or "choices" in error["message"]
    return error


# -- routes without a server ---------------------------------------------------------------------------------------

IN_DEPTH = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "numbr"}}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "numbr"}}}}}
TEXT_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

VALUES_OF_CHAT = {
    "best_of": [True],  # to Python, True == 1
    "cache_salt": ["", "x" * 257, 7, "\ud800"],  # half of a surrogate pair
    "chat_template_kwargs": [{"messages": []}, {"not a name": 1}, 1],
    "continue_final_message": [True],
    "frequency_penalty": [-3],
    "frobnicate": [1],
    "functions": [[{"name": "f"}]],
    "logit_bias": [{"x": 1}, {"99999": 1}, {"-1": 1}, {"5": 101}],
    "logprobs": [1],
    "max_completion_tokens": [5],  # and max_tokens is 4
    "max_tokens": [0, -1, 10**30, 1000],
    "messages": [[], "hello", HELLO[:1] * 4097, [{"role": "user", "content": "hello " * 200}]],
    "metadata": [{"a": 1}, {str(i): "a" for i in range(17)}],
    "min_p": [2],
    "min_tokens": [5, -1],  # of 4
    "modalities": [["text", "audio"]],
    "model": [5],
    "n": [0, -1, 9, 10**9],  # server.max_queue is 8
    "n_cmpl": [9],
    "n_predict": [5, -1, 0, 1000],  # and max_tokens is 4
    "prediction": ["hello", *({"type": "content", "content": each} for each in ("\ud800", "hello " * 200))],
    "presence_penalty": [3],
    "prompt": ["hello"],
    "prompt_logprobs": [21],
    "repetition_penalty": [0, 5e-324],  # 0 in fp32
    "seed": [2**63, "7"],
    "speculate": ["no"],
    "stop": [7, ["x"] * 17],
    "stop_token_ids": [[99999]],
    "stream": ["yes"],
    "stream_options": [{"include_usage": True}],
    "temperature": [-5, 2.1, float("nan"), float("inf"), "1", True, 10**400],
    "tool_choice": ["required"],
    "tools": [[TOOL, TOOL]],
    "top_k": [-2, 1.5],
    "top_logprobs": [3, 21],
    "top_p": [0, 1.01],
}
VALUES_OF_TEXT = {
    "best_of": [3],
    "cache_salt": [""],
    "echo": ["yes"],
    "guided_decoding_backend": ["outlines"],
    "guided_grammar": ["start: x"],
    "guided_json": [{"type": "strin"}],
    "guided_regex": ["("],
    "logprobs": [True, 21],
    "max_tokens": [0],
    "messages": [HELLO],
    "n": [9],
    "n_cmpl": [9],
    "n_predict": [5, 0],
    "prompt": ["", [], ["a", ""], [[]], None, "\udfff", [282], "hello " * 200, ["a", *"b" * 8]],
    "structured_outputs": [{}, {"regex": "a", "choice": ["a"]}],
    "suffix": [7, "\ud800"],
    "tools": [[TOOL]],
    "top_logprobs": [3],
}
VALUES_OF_FILL = {
    "echo": [None],
    "logprobs": [1],
    "max_tokens": [200],  # more than the context
    "min_tokens": [5],
    "n": [9],
    "n_predict": [5],
    "prompt": ["\ud800", [1]],
    "random_seed": [8],  # and seed is 7
    "suffix": ["\ud800"],
}
VALUES_OF_INFILL = {
    "input_extra": [[{"text": "a"}] * 1025],
    "input_prefix": ["\ud800", None],
    "input_suffix": ["\ud800"],
    "max_tokens": [4],
    "n": [1],
    "n_cmpl": [9],
    "n_predict": [200],
    "prompt": ["\ud800", ["a"]],
    "prompt_logprobs": [1],
    "return_token_sources": [True],
    "stream_options": [{"include_usage": True}],
    **{name: ["something else"] for name in NEUTRAL},
}
OTHERS = [
    # (path, body, param)
    (CHAT, chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
    (CHAT, chat(stop=[""]), "stop[0]"),
    (CHAT, chat(**{"": 1}), "''"),
    (CHAT, chat(n=1, n_cmpl=2), "n_cmpl"),
    (CHAT, chat(n_cmpl=2, prediction={"type": "content", "content": "a"}), "n_cmpl"),
    (CHAT, chat(samplers=["top_k", "mirostat"]), "samplers[1]"),
    (CHAT, {"messages": HELLO, "n_predict": 1000}, "n_predict"),
    (CHAT, chat(lora=[{"id": 0, "scale": 0.5}]), "lora"),
    (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids[0]"),
    (CHAT, chat(stream=True, stream_options={"surprise": True}), "stream_options.surprise"),
    (CHAT, chat(stream=True, stream_options={"include_obfuscation": 1}), "stream_options.include_obfuscation"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f g"}}]), "tools[0].function.name"),
    (CHAT, chat(tools=[{"type": "retrieval"}]), "tools[0].type"),
    (CHAT, chat(tools=[TOOL], tool_choice="always"), "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice="required", ignore_eos=True), "ignore_eos"),
    (CHAT, chat(tools=[TOOL], tool_choice="required", guided_regex="a"), "tool_choice"),
    (CHAT, chat(tools=[TOOL], guided_regex="a"), "guided_regex"),
    (CHAT, chat(tools=[TEXT_TOOL], tool_choice="required"), "tools[0].function.parameters.type"),
    (CHAT, chat(tools=[BAD_TOOL], tool_choice="required"), "tools[0].function.parameters.properties.a"),
    (CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format"),
    (CHAT, chat(response_format={"type": "json_object", "json_schema": {"schema": {}}}), "response_format"),
    (CHAT, json_schema(5), "response_format.json_schema.schema"),
    (CHAT, json_schema({"type": "strin"}), "response_format.json_schema.schema"),
    (CHAT, json_schema(IN_DEPTH), "response_format.json_schema.schema.properties.a.items"),
    (CHAT, json_schema({}, ignore_eos=True), "ignore_eos"),
    (CHAT, json_schema({}, min_tokens=2), "min_tokens"),
    (CHAT, json_schema({}, guided_json={}), "guided_json"),
    (CHAT, chat(messages=[1]), "messages[0]"),
    (CHAT, chat(messages=[{"role": "assistant"}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": "forbidden"}]), "messages"),
    (CHAT, {"model": MODEL}, "messages"),
    (CHAT, message(tool_call_id="b"), "messages[0].tool_call_id"),
    (CHAT, message(role="function"), "messages[0].role"),
    (CHAT, message(content=None), "messages[0].content"),
    (CHAT, message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    (CHAT, message(content="\ud800"), "messages"),
    (CHAT, message(tool_calls=[{"id": "1"}]), "messages[0].tool_calls[0].function"),
    (CHAT, message(tool_calls=[CALL]), "messages[0].tool_calls"),
    (CHAT, message(name=5), "messages[0].name"),
    (CHAT, message(mood="cheerful"), "messages[0].mood"),
    (TEXT, text(structured_outputs={"regex": "("}), "structured_outputs.regex"),
    (TEXT, text(structured_outputs={"json": "{"}), "structured_outputs.json"),
    (TEXT, text(structured_outputs={"choice": []}), "structured_outputs.choice"),
    (TEXT, text(structured_outputs={"structural_tag": "x"}), "structured_outputs.structural_tag"),
    (TEXT, text(structured_outputs={"grammar": "start: <nothing>"}), "structured_outputs.grammar"),
    (TEXT, text(guided_json=IN_DEPTH), "guided_json.properties.a.items"),
    (TEXT, text(guided_choice=[1]), "guided_choice[0]"),
    (TEXT, text(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    (TEXT, text(suffix="tail", echo=True), "suffix"),
    (TEXT, text(suffix="tail", prompt=[5]), "suffix"),
    (TEXT, text(suffix="tail", prompt=["a", "\ud800"]), "prompt"),
    (INFILL, infill(input_extra=[{"text": "a"}, {"filename": "b"}]), "input_extra[1].text"),
    (INFILL, infill(input_extra=[{"text": "\ud800"}]), "input_extra[0].text"),
    (INFILL, infill(input_extra=[{"text": "a", "filename": 5}]), "input_extra[0].filename"),
    (INFILL, infill(input_extra=[{"text": "a", "mood": 5}]), "input_extra[0].mood"),
    (INFILL, infill(samplers=["top_k", "mirostat"]), "samplers[1]"),
    (INFILL, infill(response_fields=[5]), "response_fields[0]"),
    (TEXT, text(prompt=[1, "a"]), "prompt[1]"),
    (TEXT, text(prompt=[-1]), "prompt[0]"),
    (TEXT, text(prompt=[[1], [10**30]]), "prompt[1][0]"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
    ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"prompt": "a" * ((1 << 20) + 1)}, "prompt"),
    ("/tokenize", {"prompt": "é" * ((1 << 16) + 1), "return_token_strs": True}, "return_token_strs"),
    ("/tokenize", {"prompt": "a", "unknown": 1}, "unknown"),
    ("/tokenize", {"prompt": "\ud83d"}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"tokens": [10**6]}, "tokens"),
    (CHAT, [], "body"),
    (CHAT, "hello", "body"),
    (CHAT, None, "body"),
]
SAID = [
    (chat(stop=["x"] * 17), "at most 16 items"),
    (text(prompt=[-1]), "greater than or equal to 0"),
    (chat(metadata={"kind": 1}), "metadata['kind']=1"),
    (chat(logit_bias={"5": -101}), "logit_bias['5']=-101"),
    (chat(logit_bias={str(i): 1 for i in range(1025)}), "at most 1024 items"),
    (text(prompt=["a", *"b" * 8]), "server.max_queue"),
    (text(prompt=["", *"b" * 8]), "server.max_queue"),  # before any prompt is looked at
    (chat(messages=[{"role": "user", "content": "forbidden"}], n=9), "server.max_queue"),
]
UNREAD = [
    (b"", "identity", "body", ""),
    (b"{", "identity", "body", "body is no valid JSON"),
    (b'{"model": "tiny"', "identity", "body", "at character 16"),
    (b'{"model": "\xff"}', "identity", "body", "body is not UTF-8; send UTF-8"),
    (b"\xff\xfe", "identity", "body", ""),
    (b"[" * 100_000, "identity", "body", "body is nested too deeply"),
    (b'{"a":' + b"1" * 5000 + b"}", "identity", "body", "value has 5000 digits"),
    (gzip.compress(b"{}"), "gzip", "content-encoding", "content-encoding is 'gzip'; send the body uncompressed"),
    (b"compressed to text", "x-own", "content-encoding", "content-encoding is 'x-own'; send the body uncompressed"),
]


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    """Sends a body to the routes that take one, in this process; returns the response."""
    tokenizer = tiny_tokenizer(FIM_MARKS)
    status = EngineStatusPage.create(tmp_path_factory.mktemp("run") / "status")
    status.write(state=WorkerState.READY, max_seq_len=128, vocab_size=len(tokenizer), max_draft_tokens=2)
    worker_client = WorkerClient(status=status, max_queue=8, tokenizer=tokenizer)
    shared = {"model": MODEL, "tokenizer": tokenizer, "status": status}
    shape, metrics = StreamShape(), SimpleNamespace()
    generation = GenerationRoutes(**shared, worker_client=worker_client, metrics=metrics, stream_shape=shape)
    tokens = TokenRoutes(**shared)
    app = FastAPI()
    routes = {CHAT: generation.chat, TEXT: generation.complete, FILL: generation.fill, INFILL: generation.infill}
    for path, route in {**routes, "/tokenize": tokens.tokenize, "/detokenize": tokens.detokenize}.items():
        app.add_api_route(path, route, methods=["POST"])
    install_error_handlers(app, on_error=lambda status: None, needs_key=False)

    async def send(path, content, headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content, headers=headers)

    return lambda path, content, headers=JSON: asyncio.run(send(path, content, headers))


def test_a_bad_body_is_refused_under_the_name_of_its_field(post):
    cases = [
        (path, make(**{name: value}), name)
        for path, make, values in (
            (CHAT, chat, VALUES_OF_CHAT),
            (TEXT, text, VALUES_OF_TEXT),
            (FILL, lambda **fields: text(**{"seed": 7, **fields}), VALUES_OF_FILL),
            (INFILL, infill, VALUES_OF_INFILL),
        )
        for name, each in values.items()
        for value in each
    ]
    for path, body, param in [*cases, *OTHERS]:
        check_error(post(path, json.dumps(body)), 400, param)
    for path, body in ((CHAT, chat()), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        check_error(post(path, json.dumps({**body, "model": "gpt-4"})), 404, "model")


BODIES = {
    CHAT: (ChatRequest, chat()),
    TEXT: (CompletionRequest, text()),
    FILL: (FimRequest, text()),
    INFILL: (InfillRequest, infill()),
    "/tokenize": (TokenizeRequest, {"prompt": "a"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
VALUES_BY_TYPE = {"boolean": True, "integer": 1, "number": 1.5, "string": "a", "array": ["a"], "object": {"a": "b"}}


def wrong_values(schema, definitions):
    """Values that a field's schema excludes: of each type that it does not have, and beyond each of its limits."""
    branches = [definitions[b["$ref"].split("/")[-1]] if "$ref" in b else b for b in schema.get("anyOf", [schema])]
    kinds = {kind for branch in branches for kind in ([branch["type"]] if "type" in branch else VALUES_BY_TYPE)}
    kinds |= {"integer"} if "number" in kinds else set()
    yield from (value for kind, value in VALUES_BY_TYPE.items() if kind not in kinds)
    for branch in branches:
        for limit, beyond in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
            if limit in branch:
                yield branch[limit] + beyond
        for limit, more in (("maxLength", "a"), ("maxItems", ["a"])):
            if limit in branch and not (limit == "maxItems" and branch.get("items") is None):
                yield more * (branch[limit] + 1)
        if "maxProperties" in branch:
            yield {str(number): "a" for number in range(branch["maxProperties"] + 1)}
        if "enum" in branch or "const" in branch:
            yield "none of them"


@pytest.mark.parametrize("path", BODIES)
def test_what_the_schema_excludes_is_refused_under_the_name_of_its_field(path, post):
    kind, body = BODIES[path]
    schema = kind.model_json_schema()
    num_cases = 0
    for name, field in schema["properties"].items():
        for value in wrong_values(field, schema.get("$defs", {})):
            response = post(path, json.dumps({**body, name: value}))
            assert response.status_code == 400, (name, value)
            param = response.json()["error"]["param"]
            assert param.partition("[")[0].partition(".")[0] == name, (name, value, param)
            num_cases += 1
        if name in schema.get("required", ()):
            check_error(post(path, json.dumps({key: body[key] for key in body if key != name})), 400, name)
    assert num_cases > 4 * len(schema["properties"])


def test_an_error_says_what_would_be_right(post):
    for body, said in SAID:
        response = post(CHAT if "messages" in body else TEXT, json.dumps(body))
        assert said in response.json()["error"]["message"]


def test_a_body_that_cannot_be_read_is_told_why(post):
    for raw, encoding, param, said in UNREAD:
        response = post(CHAT, raw, {**JSON, "Content-Encoding": encoding})
        assert said in check_error(response, 400, param)["message"]


def test_wrong_content_type(post):
    """A web page of another origin can send these without asking, to a server on loopback too."""
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        check_error(post(CHAT, json.dumps(chat()), {} if kind is None else {"Content-Type": kind}), 400, "content-type")


def test_megabytes_of_prompt_are_refused_at_once(post):
    began = time.monotonic()
    check_error(post(TEXT, json.dumps(text(prompt="hello " * 2_000_000))), 400, "prompt")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("settings", "host", "refused"),
    [
        ({}, "127.0.0.1:8000", False),
        ({}, "LocalHost", False),
        ({}, "localhost:9", False),
        ({}, "[::1]:8000", False),
        ({}, None, False),
        ({}, "evil.example", True),
        ({}, "evil.example:8000", True),
        ({}, "127.0.0.1.evil.example:8000", True),
        ({}, "localhost:8000:1", True),
        ({}, "host.docker.internal", True),  # a name of Docker's, which leads wherever another machine's DNS says
        ({"host": "0.0.0.0"}, "evil.example", False),
    ],
)
def test_without_a_key_a_server_on_loopback_answers_under_local_names_only(settings, host, refused):
    api = AuroraAPI(AuroraConfig(server=ServerSettings(**settings)), None)
    headers = [] if host is None else [(b"host", host.encode())]
    request = Request({"type": "http", "path": CHAT, "headers": headers})
    if not refused:
        asyncio.run(api.check(request))
        return
    with pytest.raises(RequestError, match="Host header is .*server.api_key") as error:
        asyncio.run(api.check(request))
    assert error.value.status == 403


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with FakeServer(server={"api_key": KEY, "max_queue": 8}, options={"max_seq_len": 128}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}".encode()}, timeout=20) as session:
        yield session


def test_bad_requests_over_http(client):
    for path, body, status, param in [
        (CHAT, chat(temperature=float("nan")), 400, "temperature"),
        (CHAT, chat(frobnicate=1), 400, "frobnicate"),
        (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
        (CHAT, chat(n=9), 400, "n"),
        (CHAT, chat(model="gpt-4"), 404, "model"),
        (CHAT, "hello", 400, "body"),
        (TEXT, text(prompt="<|toolong|>"), 400, "prompt"),  # refused by the engine itself
        (TEXT, text(prompt="<|refuse|>"), 500, None),
        (TEXT, text(prompt="<|error|>"), 500, None),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ]:
        check_error(client.post(path, content=json.dumps(body), headers=JSON), status, param)
    for stream in (False, True):
        response = client.post(TEXT, json=text(prompt="hello " * 200, stream=stream))
        assert check_error(response, 400, "prompt")["code"] == "context_length_exceeded"
    check_error(client.post(CHAT, content=b"{", headers=JSON), 400, "body")
    for content in (b" " * (3 << 20), b'{"model": "' + b"x" * (3 << 20) + b'"}', b'{"prompt": [' + b"[1]," * 70_000):
        check_error(client.post(TEXT, content=content, headers=JSON), 413, "body")


@pytest.mark.parametrize("num_writes", [1, 2])
def test_an_offer_of_http_2_is_told_that_its_body_was_not_read(server, num_writes):
    """As Java's HttpClient and `curl --http2` make it. The parser takes the body for another protocol.

    A body that comes by itself uvicorn answers too, in its own words, and sometimes first.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        body = json.dumps(chat())
        lines = [
            f"POST {CHAT} HTTP/1.1",
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        head = "\r\n".join(lines).encode() + f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
        if num_writes == 1:
            connection.sendall(head + body.encode())
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head)
            time.sleep(0.05)
            connection.sendall(body.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        text = answer.read()
    assert answer.status == 400
    error = json.loads(text)["error"]
    if num_writes == 2 and error["code"] == "invalid_http":
        return
    assert error["param"] == "upgrade"
    assert error["message"] == "upgrade is 'h2c'; send HTTP/1.1 without that header"


def test_unknown_paths_and_methods(client):
    check_error(client.get("/v1/nothing"), 404, None)
    check_error(client.get(CHAT), 405, None)
    check_error(client.delete("/health"), 405, None)
    check_error(client.get("/v1/models/other"), 404, "model")


def test_without_the_key_nothing_is_shown_or_generated_and_no_body_is_parsed(server):
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY.encode()},
        {"X-API-Key": KEY.encode()},
        {"Authorization": "Bearer ü".encode("latin-1")},
    ]
    with httpx.Client(base_url=server.url) as session:
        answers = [
            session.get(path, headers=header)
            for path in ("/v1/models", "/metrics", "/v1/aurora/status", "/v1/models/tiny")
            for header in wrong
        ]
        answers += [session.post(path, content=b'{"model', headers=JSON) for path in (CHAT, "/tokenize", "/v1/nothing")]
        for response in [*answers, session.post(CHAT, json=chat())]:
            check_error(response, 401, None)
            assert response.headers["WWW-Authenticate"] == "Bearer"
        schema = session.get("/openapi.json").json()
    assert "security" in schema["paths"][CHAT]["post"]
    assert "security" not in schema["paths"]["/health"]["get"]
    assert "head" not in schema["paths"]["/health"], "what load balancers send is not described"


def test_without_the_key_no_body_is_awaited(server):
    """The client has announced a body and sends none of it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 401"


def test_a_head_without_end_is_refused_before_the_key_is_looked_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * (1 << 16))
        assert connection.recv(12) == b"HTTP/1.1 431"


def test_another_host_is_refused_before_a_route_is_sought(server):
    with FakeServer() as without_key:
        response = httpx.get(f"{without_key.url}/health", headers={"Host": "evil.example"})
        check_error(response, 403, None)
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 200


def test_what_a_prediction_cannot_be_combined_with_is_refused(client):
    predicted = {"prediction": {"type": "content", "content": "hello"}}
    assert client.post(CHAT, json=chat(**predicted, n=1, presence_penalty=-1, logprobs=False)).status_code == 200
    for fields in (
        {"n": 2},
        {"logprobs": True},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"tools": [TOOL]},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
    ):
        check_error(client.post(CHAT, json=chat(**predicted, **fields)), 400, next(iter(fields)))
    for fields in ({"logprobs": 0}, {"suffix": "b"}):
        check_error(client.post(TEXT, json=text(**predicted, **fields)), 400, next(iter(fields)))
    check_error(client.post(TEXT, json=text(**predicted, prompt=["a", "b"])), 400, "prediction")
    for prediction, field in (
        ({"content": "a"}, "type"),
        ({"type": "text", "content": "a"}, "type"),
        ({"type": "content", "content": 1}, "content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "content"),
    ):
        response = client.post(CHAT, json=chat(prediction=prediction))
        assert check_error(response, 400, response.json()["error"]["param"])["param"].startswith(f"prediction.{field}")
    long = {"prediction": {"type": "content", "content": "hello " * 200}}
    assert check_error(client.post(CHAT, json=chat(**long)), 400, "prediction")["code"] == "context_length_exceeded"


def test_health_and_ready_ask_for_no_key(server):
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200
        assert httpx.head(server.url + path).status_code == 200, "some load balancers send it"


NEUTRAL = {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": None,
    "modalities": ["text"],
    "service_tier": "auto",
    "audio": None,
    "prediction": None,
    "reasoning_effort": None,
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "min_tokens": 0,
    "best_of": 1,
    "logit_bias": {"5": 100},
    "stop": None,
    "seed": None,
    "stream_options": None,
    "logprobs": False,
    "cache_salt": None,
}


def test_fields_that_ask_for_nothing_are_accepted(client):
    for top in (None, 0):
        assert client.post(CHAT, json=chat(**NEUTRAL, top_logprobs=top)).status_code == 200
    answer = client.post(CHAT, json=chat()).json()["choices"][0]["message"]
    sent_back = {**answer, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    assert client.post(CHAT, json=chat(messages=[*HELLO, sent_back, *HELLO])).status_code == 200
    assert client.post(TEXT, json=text(suffix=None, best_of=1, use_beam_search=False)).status_code == 200


def test_every_form_of_structured_outputs_is_accepted(client):
    """The fake engine does not follow them: tests/serve/test_structured_server.py has one that does."""
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
        {"structured_outputs": {"json": '{"type": "object"}', "whitespace_pattern": None}},
        {"structured_outputs": {"regex": "a+", "json_object": False}},
        {"structured_outputs": {"grammar": "start: <|end|>"}, "stop": "x"},
        {"guided_json": {"type": "object"}},
        {"guided_regex": "[ab]"},
        {"guided_choice": ["a", "b"], "guided_decoding_backend": None},
        {"guided_grammar": 'root ::= "a"', "min_tokens": 0, "ignore_eos": False},
    ):
        assert client.post(CHAT, json=chat(**fields)).status_code == 200, fields
        assert client.post(TEXT, json=text(**fields)).status_code == 200, fields


def test_after_all_that_nothing_is_left(client):
    queue = client.get("/v1/aurora/status").json()["queue"]
    assert (queue["in_flight"], queue["calls"]) == (0, 0)
    assert client.post(CHAT, json=chat()).status_code == 200
