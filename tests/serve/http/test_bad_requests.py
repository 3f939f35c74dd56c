"""Bad requests: each gets its status, OpenAI's error body and the name of the field; the server goes on."""

import asyncio
import gzip
import http.client
import json
import socket
import time

import httpx
import pytest
from starlette.requests import Request
from support.fake_server import MODEL, FakeServer

from aurora_lit.errors import RequestError
from aurora_lit.serve.api import AuroraAPI
from aurora_lit.settings import AuroraConfig, ServerSettings

KEY = "sekret-ключах"
"""Clients write it in UTF-8. The last byte of х is white space in Latin-1."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with FakeServer(server={"api_key": KEY, "max_queue": 8}, options={"max_seq_len": 128}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}".encode()}, timeout=20) as session:
        yield session


def chat(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 4, **fields}


def text(**fields):
    return {"model": MODEL, "prompt": "hello", "max_tokens": 4, **fields}


def message(**fields):
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


def json_schema(schema, **fields):
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, **fields)


IN_DEPTH = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "numbr"}}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "numbr"}}}}}


TEXT_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}


def called(arguments):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


BAD = [
    # (path, body, status, param)
    (CHAT, chat(temperature=-5), 400, "temperature"),
    (CHAT, chat(temperature=2.1), 400, "temperature"),
    (CHAT, chat(temperature=float("nan")), 400, "temperature"),
    (CHAT, chat(temperature=float("inf")), 400, "temperature"),
    (CHAT, chat(temperature="1"), 400, "temperature"),
    (CHAT, chat(temperature=True), 400, "temperature"),
    (CHAT, chat(temperature=10**400), 400, "temperature"),
    (CHAT, chat(continue_final_message=True), 400, "continue_final_message"),
    (CHAT, chat(continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message"),
    (CHAT, chat(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs={"not a name": 1}), 400, "chat_template_kwargs"),
    (CHAT, chat(chat_template_kwargs=1), 400, "chat_template_kwargs"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/tokenize", {"prompt": "a" * ((1 << 20) + 1)}, 400, "prompt"),
    ("/tokenize", {"prompt": "é" * ((1 << 16) + 1), "return_token_strs": True}, 400, "return_token_strs"),
    ("/tokenize", {"prompt": "a", "unknown": 1}, 400, "unknown"),
    ("/tokenize", {"prompt": "\ud83d"}, 400, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "messages"),
    ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    ("/detokenize", {"tokens": [1], "model": "gpt-4"}, 404, "model"),
    ("/detokenize", {}, 400, "tokens"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
    (CHAT, chat(top_p=0), 400, "top_p"),
    (CHAT, chat(top_p=1.01), 400, "top_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(top_k=1.5), 400, "top_k"),
    (CHAT, chat(min_p=2), 400, "min_p"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
    (CHAT, chat(repetition_penalty=5e-324), 400, "repetition_penalty"),  # 0 in fp32
    (CHAT, chat(presence_penalty=3), 400, "presence_penalty"),
    (CHAT, chat(frequency_penalty=-3), 400, "frequency_penalty"),
    (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias"),
    (CHAT, chat(seed=2**63), 400, "seed"),
    (CHAT, chat(seed="7"), 400, "seed"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=-1), 400, "n"),
    (CHAT, chat(n=9), 400, "n"),  # more than server.max_queue
    (CHAT, chat(n=10**9), 400, "n"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1000), 400, "max_tokens"),
    (CHAT, chat(max_tokens=4, max_completion_tokens=5), 400, "max_completion_tokens"),
    (CHAT, chat(stop=[""]), 400, "stop[0]"),
    (CHAT, chat(stop=7), 400, "stop"),
    (CHAT, chat(stop=["x"] * 17), 400, "stop"),
    (CHAT, chat(stop_token_ids=[99999]), 400, "stop_token_ids"),
    (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(stream=True, stream_options={"surprise": True}), 400, "stream_options.surprise"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(logprobs=1), 400, "logprobs"),
    (CHAT, chat(metadata={"a": 1}), 400, "metadata"),
    (CHAT, chat(metadata={str(i): "a" for i in range(17)}), 400, "metadata"),
    (CHAT, chat(speculate="no"), 400, "speculate"),
    (CHAT, chat(cache_salt=""), 400, "cache_salt"),
    (CHAT, chat(cache_salt="x" * 257), 400, "cache_salt"),
    (CHAT, chat(cache_salt=7), 400, "cache_salt"),
    (CHAT, chat(cache_salt="\ud800"), 400, "cache_salt"),  # half of a surrogate pair
    (TEXT, text(cache_salt=""), 400, "cache_salt"),
    (CHAT, chat(stream=True, stream_options={"include_obfuscation": 1}), 400, "stream_options.include_obfuscation"),
    (CHAT, chat(frobnicate=1), 400, "frobnicate"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f g"}}]), 400, "tools[0].function.name"),
    (CHAT, chat(tools=[{"type": "retrieval"}]), 400, "tools[0].type"),
    (CHAT, chat(tools=[TOOL, TOOL]), 400, "tools"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice="always"), 400, "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice="required", ignore_eos=True), 400, "ignore_eos"),
    (CHAT, chat(tools=[TOOL], tool_choice="required", guided_regex="a"), 400, "tool_choice"),
    (CHAT, chat(tools=[TOOL], guided_regex="a"), 400, "guided_regex"),
    (CHAT, chat(tools=[TEXT_TOOL], tool_choice="required"), 400, "tools[0].function.parameters.type"),
    (CHAT, chat(tools=[BAD_TOOL], tool_choice="required"), 400, "tools[0].function.parameters.properties.a"),
    (CHAT, chat(messages=[{"role": "assistant"}]), 400, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": "a", "tool_call_id": "b"}]), 400, "messages[0].tool_call_id"),
    (TEXT, text(tools=[TOOL]), 400, "tools"),
    (CHAT, chat(functions=[{"name": "f"}]), 400, "functions"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format"),
    (CHAT, chat(response_format={"type": "json_object", "json_schema": {"schema": {}}}), 400, "response_format"),
    (CHAT, json_schema(5), 400, "response_format.json_schema.schema"),
    (CHAT, json_schema({"type": "strin"}), 400, "response_format.json_schema.schema"),
    (CHAT, json_schema(IN_DEPTH), 400, "response_format.json_schema.schema.properties.a.items"),
    (CHAT, json_schema({}, ignore_eos=True), 400, "ignore_eos"),
    (CHAT, json_schema({}, min_tokens=2), 400, "min_tokens"),
    (CHAT, json_schema({}, guided_json={}), 400, "guided_json"),
    (TEXT, text(structured_outputs={}), 400, "structured_outputs"),
    (TEXT, text(structured_outputs={"regex": "("}), 400, "structured_outputs.regex"),
    (TEXT, text(structured_outputs={"json": "{"}), 400, "structured_outputs.json"),
    (TEXT, text(structured_outputs={"choice": []}), 400, "structured_outputs.choice"),
    (TEXT, text(structured_outputs={"regex": "a", "choice": ["a"]}), 400, "structured_outputs"),
    (TEXT, text(structured_outputs={"structural_tag": "x"}), 400, "structured_outputs.structural_tag"),
    (TEXT, text(structured_outputs={"grammar": "start: <nothing>"}), 400, "structured_outputs.grammar"),
    (TEXT, text(guided_json={"type": "strin"}), 400, "guided_json"),
    (TEXT, text(guided_json=IN_DEPTH), 400, "guided_json.properties.a.items"),
    (TEXT, text(guided_regex="("), 400, "guided_regex"),
    (TEXT, text(guided_choice=[1]), 400, "guided_choice[0]"),
    (TEXT, text(guided_grammar="start: x"), 400, "guided_grammar"),
    (TEXT, text(guided_decoding_backend="outlines"), 400, "guided_decoding_backend"),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities"),
    (CHAT, chat(prompt_logprobs=21), 400, "prompt_logprobs"),
    (TEXT, text(prompt_logprobs=1, stream=True), 400, "prompt_logprobs"),
    (CHAT, chat(min_tokens=5), 400, "min_tokens"),  # of 4
    (CHAT, chat(min_tokens=-1), 400, "min_tokens"),
    (CHAT, chat(best_of=True), 400, "best_of"),  # to Python, True == 1
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="hello"), 400, "messages"),
    (CHAT, chat(messages=[1]), 400, "messages[0]"),
    (CHAT, chat(messages=[{"role": "user", "content": "hello " * 200}]), 400, "messages"),
    (CHAT, chat(messages=[{"role": "user", "content": "forbidden"}]), 400, "messages"),
    (CHAT, {"model": MODEL}, 400, "messages"),
    (CHAT, chat(model=5), 400, "model"),
    (CHAT, chat(model="gpt-4"), 404, "model"),
    (CHAT, message(role="function"), 400, "messages[0].role"),
    (CHAT, message(content=None), 400, "messages[0].content"),
    (CHAT, message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), 400, "messages[0].content[0].type"),
    (CHAT, message(content="\ud800"), 400, "messages"),
    (CHAT, message(tool_calls=[{"id": "1"}]), 400, "messages[0].tool_calls[0].function"),
    (CHAT, message(tool_calls=called("{}")["tool_calls"]), 400, "messages[0].tool_calls"),
    (CHAT, message(name=5), 400, "messages[0].name"),
    (CHAT, message(mood="cheerful"), 400, "messages[0].mood"),
    (CHAT, chat(prompt="hello"), 400, "prompt"),
    (TEXT, text(messages=HELLO), 400, "messages"),
    (TEXT, text(prompt=""), 400, "prompt"),
    (TEXT, text(prompt=[]), 400, "prompt"),
    (TEXT, text(prompt=["a", ""]), 400, "prompt"),
    (TEXT, text(prompt=[[]]), 400, "prompt"),
    (TEXT, text(prompt=None), 400, "prompt"),
    (TEXT, text(prompt=[1, "a"]), 400, "prompt[1]"),
    (TEXT, text(prompt="\udfff"), 400, "prompt"),
    (TEXT, text(prompt=[-1]), 400, "prompt[0]"),
    (TEXT, text(prompt=[276]), 400, "prompt"),
    (TEXT, text(prompt=[[1], [10**30]]), 400, "prompt[1][0]"),
    (TEXT, text(prompt="hello " * 200), 400, "prompt"),
    (TEXT, text(prompt="<|toolong|>"), 400, "prompt"),  # refused by the engine itself
    (TEXT, text(prompt=["a", *"b" * 8]), 400, "prompt"),
    (TEXT, text(n=9), 400, "n"),
    (TEXT, text(max_tokens=0), 400, "max_tokens"),
    (TEXT, text(logprobs=True), 400, "logprobs"),
    (TEXT, text(logprobs=21), 400, "logprobs"),
    (TEXT, text(best_of=3), 400, "best_of"),
    (TEXT, text(suffix="tail"), 400, "suffix"),
    (TEXT, text(echo="yes"), 400, "echo"),
    (TEXT, text(top_logprobs=3), 400, "top_logprobs"),
    (TEXT, text(prompt="<|refuse|>"), 500, None),
    (TEXT, text(prompt="<|error|>"), 500, None),
    (CHAT, [], 400, "body"),
    (CHAT, "hello", 400, "body"),
    (CHAT, None, 400, "body"),
]


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


def case_name(case):
    path, body, *_ = case
    return f"{path.rpartition('/')[2]}-{json.dumps(body, default=str)[:60]}"


@pytest.mark.parametrize("case", BAD, ids=case_name)
def test_bad_body(client, case):
    path, body, status, param = case
    response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    check_error(response, status, param)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (chat(stop=["x"] * 17), "at most 16 items"),
        (text(prompt=[-1]), "greater than or equal to 0"),
        (chat(metadata={"kind": 1}), "metadata['kind']=1"),
        (chat(logit_bias={"5": -101}), "logit_bias['5']=-101"),
        (chat(logit_bias={str(i): 1 for i in range(1025)}), "at most 1024 items"),
        (text(prompt=["a", *"b" * 8]), "server.max_queue"),
        (text(prompt=["", *"b" * 8]), "server.max_queue"),  # before any prompt is looked at
        (chat(messages=[{"role": "user", "content": "forbidden"}], n=9), "server.max_queue"),
    ],
)
def test_an_error_says_what_would_be_right(client, body, said):
    response = client.post(CHAT if "messages" in body else TEXT, json=body)
    assert said in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_told_the_limit(client):
    check_error(client.post(TEXT, content=b" " * (17 << 20), headers={"Content-Type": "application/json"}), 413, "body")


def test_megabytes_of_prompt_are_refused_at_once(client):
    began = time.monotonic()
    check_error(client.post(TEXT, json=text(prompt="hello " * 2_000_000)), 400, "prompt")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("fields", [{"stream": True}, {}])
def test_too_long_a_prompt_has_its_code(client, fields):
    response = client.post(TEXT, json=text(prompt="hello " * 200, **fields))
    check_error(response, 400, "prompt")
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"{'model': 1}", b"\xff\xfe", b'{"model": "tiny"', b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}"],
    ids=["empty", "brace", "quotes", "no UTF-8", "cut", "deep", "digits"],
)
def test_bad_json(client, raw):
    check_error(client.post(CHAT, content=raw, headers={"Content-Type": "application/json"}), 400, "body")


@pytest.mark.parametrize(
    ("raw", "encoding", "param", "said"),
    [
        (b'{"model": "\xff"}', "identity", "body", "body is not UTF-8; send UTF-8"),
        (b"[" * 100_000, "identity", "body", "body is nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "identity", "body", "value has 5000 digits"),
        (gzip.compress(b"{}"), "gzip", "content-encoding", "content-encoding is 'gzip'; send the body uncompressed"),
        (b"compressed to text", "x-own", "content-encoding", "content-encoding is 'x-own'; send the body uncompressed"),
    ],
    ids=["no UTF-8", "deep", "digits", "gzip", "read as text"],
)
def test_a_body_that_cannot_be_read_is_told_why(client, raw, encoding, param, said):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = client.post(CHAT, content=raw, headers=headers)
    check_error(response, 400, param)
    assert said in response.json()["error"]["message"]


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
    if num_writes == 2 and text == b"Invalid HTTP request received.":
        return
    error = json.loads(text)["error"]
    assert error["param"] == "upgrade"
    assert error["message"] == "upgrade is 'h2c'; send HTTP/1.1 without that header"


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_wrong_content_type(client, kind):
    """A web page of another origin can send these without asking, to a server on loopback too."""
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post(CHAT, content=json.dumps(chat()), headers=headers)
    check_error(response, 400, "content-type")


def test_too_large_a_body(client):
    response = client.post(
        CHAT, content=b'{"model": "' + b"x" * (17 * 2**20) + b'"}', headers={"Content-Type": "application/json"}
    )
    check_error(response, 413, "body")


def test_unknown_paths_and_methods(client):
    check_error(client.get("/v1/nothing"), 404, None)
    check_error(client.get(CHAT), 405, None)
    check_error(client.delete("/health"), 405, None)
    check_error(client.get("/v1/models/other"), 404, "model")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/aurora/status", "/v1/models/tiny"])
@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY.encode()},
        {"X-API-Key": KEY.encode()},
        {"Authorization": "Bearer ü".encode("latin-1")},
    ],
)
def test_without_the_key_nothing_is_shown(server, path, header):
    response = httpx.get(server.url + path, headers=header)
    check_error(response, 401, None)
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_openapi_says_that_a_key_is_asked_for(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "security" in schema["paths"][CHAT]["post"]
    assert "security" not in schema["paths"]["/health"]["get"]


def test_without_the_key_nothing_is_generated(server):
    check_error(httpx.post(server.url + CHAT, json=chat()), 401, None)


def test_without_the_key_no_body_is_parsed(server):
    headers = {"Content-Type": "application/json"}
    for path in (CHAT, "/tokenize", "/v1/nothing"):
        response = httpx.post(server.url + path, content=b'{"model', headers=headers)
        check_error(response, 401, None)
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_without_the_key_no_body_is_awaited(server):
    """The client has announced a body and sends none of it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 401"


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
    with pytest.raises(
        RequestError, match="Host header is .*send 127.0.0.1 or localhost, or set server.api_key"
    ) as error:
        asyncio.run(api.check(request))
    assert error.value.status == 403


def test_another_host_is_refused_before_a_route_is_sought(server):
    with FakeServer() as without_key:
        response = httpx.get(f"{without_key.url}/health", headers={"Host": "evil.example"})
        check_error(response, 403, None)
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 200


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


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
        {"structured_outputs": {"json": '{"type": "object"}', "whitespace_pattern": None}},
        {"structured_outputs": {"regex": "a+", "json_object": False}},
        {"structured_outputs": {"grammar": "start: <|end|>"}, "stop": "x"},
        {"guided_json": {"type": "object"}},
        {"guided_regex": "[ab]"},
        {"guided_choice": ["a", "b"], "guided_decoding_backend": None},
        {"guided_grammar": 'root ::= "a"', "min_tokens": 0, "ignore_eos": False},
    ],
    ids=json.dumps,
)
def test_every_form_of_structured_outputs_is_accepted(client, fields):
    """The fake engine does not follow them: tests/serve/test_structured_server.py has one that does."""
    assert client.post(CHAT, json=chat(**fields)).status_code == 200
    assert client.post(TEXT, json=text(**fields)).status_code == 200


def test_after_all_that_nothing_is_left(client):
    queue = client.get("/v1/aurora/status").json()["queue"]
    assert (queue["in_flight"], queue["calls"]) == (0, 0)
    assert client.post(CHAT, json=chat()).status_code == 200
