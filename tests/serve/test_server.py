"""A real server on an engine without a model: what the openai client gets, streamed and in one piece."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from support.fake_engine import tiny_tokenizer
from support.fake_server import MODEL, FakeServer

from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.settings import EngineSettings

TOKENIZER = tiny_tokenizer()
TEXT = "hello 今日は 🌍, ça va? "


@pytest.fixture(scope="module")
def server():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup servers would ignore it
    starting = FakeServer(server={"default_sampling": {"top_k": 20}}, spawn=True)
    signal.signal(signal.SIGHUP, before)
    with starting as running:
        yield running
        for pid in running.family[1:]:  # as a terminal that is closed: also multiprocessing's own process has it
            os.kill(pid, signal.SIGHUP)
        assert running.end(signal.SIGHUP)[0] == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as session:
        yield session


def hello(content="hello world"):
    return [{"role": "user", "content": content}]


def complete(client, prompt, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def raw_events(server, path, body):
    with httpx.stream("POST", server.url + path, json={"model": MODEL, "stream": True, **body}, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return "".join(response.iter_text())


def test_the_ready_line_names_the_url_and_the_page(server):
    assert server.ready_line == f"aurora-lit serves tiny on {server.url}/v1; watch it at {server.url}/\n"


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0}
    assert client.models.retrieve(MODEL).default_sampling_params == defaults


def test_chat_whole(client):
    answer = client.chat.completions.create(model=MODEL, messages=hello(), max_tokens=4)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello world", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 4, 8)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


def test_chat_streamed(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=hello(TEXT), max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 60
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert "\ufffd" not in text
    assert (TEXT * 3).startswith(text)
    assert len(text) > len(TEXT)


def test_streamed_and_whole_are_the_same_text(client):
    options = {"max_tokens": 50, "stop": ["🌍, ça va? hello"]}
    whole = complete(client, TEXT, **options).choices[0]
    parts = list(complete(client, TEXT, stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == whole.text == "hello 今日は "
    assert parts[-1].choices[0].finish_reason == whole.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_choice_alone_and_only_tokens_up_to_it_count(client, stream):
    options = {"max_tokens": 40, "stop": ["X"], "logprobs": 0}
    prompts = ["abcdX", "hello"]
    if stream:
        parts = list(complete(client, prompts, stream=True, stream_options={"include_usage": True}, **options))
        usage, choices = parts[-1].usage, [part.choices[0] for part in parts[:-1]]
    else:
        answer = complete(client, prompts, **options)
        usage, choices = answer.usage, answer.choices
    by_index = [[choice for choice in choices if choice.index == index] for index in range(2)]
    texts = ["".join(choice.text for choice in each) for each in by_index]
    tokens = [[token for choice in each for token in choice.logprobs.tokens] for each in by_index]
    assert texts == ["abcd", "hello" * 40]
    assert tokens == [list("abcdX"), ["hello"] * 40]
    assert [each[-1].finish_reason for each in by_index] == ["stop", "length"]
    assert usage.completion_tokens == 45


def test_the_frame_of_a_stream_and_what_is_only_in_it_if_asked_for(server):
    """A request without a model gets the served one."""
    text = raw_events(server, "/v1/completions", {"prompt": "héllo", "max_tokens": 7, "model": None})
    *events, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    chunks = [json.loads(event[6:]) for event in events]
    assert {chunk["model"] for chunk in chunks} == {MODEL}
    assert not any("usage" in chunk or "token_sources" in chunk["choices"][0] for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": hello(), "max_tokens": 7, "stream_options": options}
    events = raw_events(server, "/v1/chat/completions", body).split("\n\n")[:-2]
    counts = [json.loads(event[6:])["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 7


def test_finish_reason_stop_at_the_end_of_text(client):
    answer = complete(client, "abc<|end|>", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "stop")
    assert answer.usage.completion_tokens == 4
    assert complete(client, "abc<|end|>", max_tokens=9, extra_body={"ignore_eos": True}).usage.completion_tokens == 9


def test_n_choices_have_one_id_and_their_own_index(client):
    answer = client.chat.completions.create(model=MODEL, messages=hello("xyz"), max_tokens=4, n=3, seed=7)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "xyz") for i in range(3)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    ids = TOKENIZER.encode("hello world")
    for prompts in (["hello world", "hello"], [ids, ids[:1]]):
        answer = complete(client, prompts, max_tokens=2, n=2)
        assert [choice.text for choice in answer.choices] == ["hello world"] * 2 + ["hellohello"] * 2
        assert answer.usage.prompt_tokens == 3
    stream = client.chat.completions.create(model=MODEL, messages=hello("xyz"), max_tokens=5, n=2, stream=True)
    texts, roles, reasons = ["", ""], [0, 0], [None, None]
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        reasons[choice.index] = choice.finish_reason
    assert (roles, reasons) == ([1, 1], ["length", "length"])
    assert texts[0] == texts[1]


def test_echo_with_logprobs_as_an_evaluation_harness_asks(client):
    ids = TOKENIZER.encode("hello world €")
    for max_tokens, num_new in ((0, 0), (1, 1)):
        answer = complete(client, [ids], max_tokens=max_tokens, echo=True, logprobs=1, temperature=0)
        choice = answer.choices[0]
        assert choice.text == "hello world €" + "hello" * num_new
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == num_new
        assert len(choice.logprobs.tokens) == len(ids) + num_new
        assert choice.logprobs.token_logprobs == [None, *[-0.5] * (len(ids) - 1 + num_new)]
        assert choice.logprobs.top_logprobs[0] is None
        assert all(max(top.values()) == -0.5 for top in choice.logprobs.top_logprobs[1:])
        assert choice.logprobs.tokens[:2] == ["hello", " world"]
        assert choice.logprobs.tokens[3] == "bytes:\\xe2"
        assert choice.logprobs.text_offset[:3] == [0, 5, 11]
    parts = list(complete(client, "abc", max_tokens=4, echo=True, stream=True, logprobs=0))
    assert "".join(part.choices[0].text for part in parts) == "abcabca"
    assert [entry for part in parts for entry in part.choices[0].logprobs.text_offset] == list(range(7))


def test_prompt_logprobs_as_in_vllm(client):
    more = {"extra_body": {"prompt_logprobs": 2}}
    plain, echoed = complete(client, "abc", **more), complete(client, "abc", echo=True, logprobs=1, **more)
    shown = plain.choices[0].model_extra["prompt_logprobs"]
    assert shown == echoed.choices[0].model_extra["prompt_logprobs"]
    assert shown[0] is None
    assert plain.choices[0].logprobs is None
    for known, logprob, top in zip(
        shown[1:],
        echoed.choices[0].logprobs.token_logprobs[1:],
        echoed.choices[0].logprobs.top_logprobs[1:],
        strict=False,
    ):
        assert logprob in [entry["logprob"] for entry in known.values()]
        assert [entry["rank"] for entry in known.values()][:2] == [1, 2]
        assert len(top) <= 2, "one alternative and the token itself"
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], **more)
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens
    assert plain.model_extra.get("prompt_logprobs") is None


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=hello("€"), max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["<|user|>", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert bytes(byte for entry in content[1:] for byte in entry.bytes).decode() == "€"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)


def test_speculation_is_reported(server, client):
    before = server.status()["speculation"]
    answer = complete(client, "abc", max_tokens=7)
    report = answer.model_extra["metrics"]["speculative_decoding"]
    assert report == {
        "num_spec_steps": 3,
        "num_draft_tokens": 6,
        "num_accepted_draft_tokens": 4,
        "num_accepted_memory_tokens": 0,
        "acceptance_histogram": [1, 0, 2],
        "draft_acceptance_rate": pytest.approx(4 / 6),
        "mean_acceptance_length": pytest.approx(1 + 4 / 3),
        "num_spec_tokens": 2,
        "draft_versions": ["fake-000001"],
        "domains": [],
    }
    server.wait_until(lambda now: now["speculation"]["proposed"] == before["proposed"] + 6, 2)
    plain = complete(client, "abc", max_tokens=7, extra_body={"speculate": False})
    assert plain.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_tokens_of_a_text_and_of_a_conversation_and_back(server):
    def post(path, **body):
        return httpx.post(server.url + path, json=body, timeout=20).json()

    found = post("/tokenize", prompt=TEXT, return_token_strs=True)
    assert found["tokens"] == TOKENIZER.encode(TEXT)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] > 0
    assert post("/detokenize", tokens=found["tokens"]) == {"prompt": TEXT}
    chat = post("/tokenize", messages=hello())
    prompt = TOKENIZER.apply_chat_template(hello(), tokenize=False, add_generation_prompt=True)
    assert chat["tokens"] == TOKENIZER.encode(prompt, add_special_tokens=False)
    assert chat["token_strs"] is None


def test_a_chat_goes_on_with_its_final_message(server, client):
    """The engine repeats its prompt, which ends with what is to be continued."""
    messages = [*hello(), {"role": "assistant", "content": "it begins"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    asked = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, extra_body=extra)
    body = {"messages": messages, **extra}
    tokens = httpx.post(f"{server.url}/tokenize", json=body, timeout=20).json()["tokens"]
    assert asked.usage.prompt_tokens == len(tokens)
    assert TOKENIZER.decode(tokens).endswith("it begins")


def test_metrics_count_what_was_done(server, client):
    complete(client, "abc", max_tokens=7)
    server.wait_until(lambda now: now["queue"]["running"] == 0, 2)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    label = '{engine="0",model_name="tiny"}'
    status = server.status()
    assert values[f"vllm:generation_tokens_total{label}"] == status["tokens"]["generated"] > 0
    assert values[f"vllm:spec_decode_num_accepted_tokens_total{label}"] == status["speculation"]["accepted"] > 0
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert values[f"vllm:{name}_seconds_count{label}"] > 0
    assert values['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] > 0


def test_clients_are_told_apart_by_user_and_address_on_both_routes(server):
    """By the address of the connection: anyone can write another one into a header."""

    def client(path, headers=None, **fields):
        turn = (
            {"prompt": "<|client|>"}
            if path == "completions"
            else {"messages": [{"role": "user", "content": "<|client|>"}]}
        )
        body = {"model": MODEL, "max_tokens": 16, **turn, **fields}
        choice = httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers).json()["choices"][0]
        return choice["text"] if path == "completions" else choice["message"]["content"]

    routes = "completions", "chat/completions"
    of_address, of_ann = ({client(path, **fields) for path in routes} for fields in ({}, {"user": "ann"}))
    assert len(of_address) == len(of_ann) == len(of_address - of_ann) == 1, "the same on both, and not each other's"
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in of_address | of_ann)
    for path in routes:
        assert client(path, headers={"X-Forwarded-For": "10.1.2.3", "Forwarded": "for=10.1.2.3"}) in of_address


def test_the_engines_page_says_how_many_requests_run_together(server):
    """By which a learner knows how busy it is."""
    page = EngineStatusPage.open(server.run_folder / STATUS_NAME)
    assert page.read().num_slots == EngineSettings().max_batch_size


def test_an_error_before_the_first_token_has_a_status_even_in_a_stream(server):
    def whole_requests():
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return next(
            line.rpartition(" ")[2] for line in lines if line.startswith("vllm:e2e_request_latency_seconds_count")
        )

    body, before = {"model": MODEL, "prompt": "<|error|>", "stream": True}, whole_requests()
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert whole_requests() == before, "it had no last token"
    assert response.status_code == 500
    assert "as asked" in response.json()["error"]["message"]


@pytest.mark.parametrize(("given", "kept"), [("editor-7", True), ("a b", False), ("x" * 129, False), (None, False)])
def test_every_response_has_a_request_id(server, given, kept):
    headers = {} if given is None else {"x-request-id": given}
    answers = [httpx.get(f"{server.url}{path}", headers=headers) for path in ("/health", "/v1/models", "/nothing")]
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 1, "stream": True}
    answers += [httpx.post(f"{server.url}/v1/completions", json=each, headers=headers) for each in (body, {})]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 400]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all((one == given) is kept and 0 < len(one) <= 128 for one in ids)
    assert len(set(ids)) == (1 if kept else len(ids))


def test_props_tell_llama_cpps_clients_the_context(server):
    told, models = (httpx.get(f"{server.url}{path}").json() for path in ("/props", "/v1/models"))
    (card,) = models["data"]
    assert told["default_generation_settings"]["n_ctx"] == card["max_model_len"] == card["meta"]["n_ctx_train"] > 0
    assert told["total_slots"] > 0
    assert told["model_alias"] == MODEL
    assert told["modalities"] == {"vision": False, "audio": False}


def test_a_streamed_completion_has_an_event_for_each_token(server):
    body = {"model": MODEL, "prompt": "abcdefgh", "max_tokens": 6, "stream": True}
    lines = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    whole = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}).json()
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert len(texts) == whole["usage"]["completion_tokens"]


def test_openapi_describes_requests_and_errors(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/fim/completions",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/props",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/aurora/status",
        "/metrics",
        "/health",
        "/ready",
    }
    for path in ("/v1/chat/completions", "/v1/completions"):
        operation = schema["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", "default"}
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        body = schema["components"]["schemas"][reference.rpartition("/")[2]]
        assert body["additionalProperties"] is False
        assert "temperature" in body["properties"]
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    text = json.dumps(schema)
    assert "HTTPValidationError" not in text
    assert "security" not in text, "no key is set, so none is asked for"


def one_of_many(server, number):
    """A mix: whole, streamed, left early, bad, several choices."""
    chat, text = f"{server.url}/v1/chat/completions", f"{server.url}/v1/completions"
    with httpx.Client(timeout=20, verify=False) as session:  # certificates take longer to read than all else
        match number % 5:
            case 0:
                body = {"model": MODEL, "messages": hello(TEXT), "max_tokens": 20}
                return session.post(chat, json=body).status_code == 200
            case 1:
                body = {"model": MODEL, "prompt": TEXT, "max_tokens": 20, "stream": True, "logprobs": 2}
                return "[DONE]" in session.post(text, json=body).text
            case 2:
                body = {"model": MODEL, "prompt": "abc", "max_tokens": 400, "stream": True}
                with session.stream("POST", text, json=body) as response:
                    return next(response.iter_lines()).startswith("data: ")  # and then it leaves
            case 3:
                return session.post(chat, json={"model": MODEL, "messages": [], "n": number}).status_code == 400
            case _:
                return session.post(text, json={"model": MODEL, "prompt": ["a", "b"], "n": 2}).status_code == 200


def rss_bytes(server):
    return {process.pid: process.memory_info().rss for process in map(psutil.Process, server.family)}


@pytest.mark.process
def test_memory_is_flat_over_500_mixed_requests(server):
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert all(pool.map(lambda number: one_of_many(server, number), range(200)))  # caches fill, allocators settle
        before = rss_bytes(server)
        assert all(pool.map(lambda number: one_of_many(server, number), range(500)))
    server.wait_until(lambda now: not any(now["queue"][key] for key in ("running", "waiting", "in_flight", "calls")), 5)
    growth = {pid: (now - before[pid]) / 2**20 for pid, now in rss_bytes(server).items()}
    assert max(growth.values()) < 16, f"MiB by process: {growth}"


@pytest.mark.process
def test_idle_it_does_not_spin(server):
    server.wait_until(lambda now: now["queue"]["in_flight"] == 0, 5)
    processes = [psutil.Process(pid) for pid in server.family]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    threading.Event().wait(1)
    assert sum(sum(process.cpu_times()[:2]) for process in processes) - before < 0.15


@pytest.mark.parametrize("stream", [False, True])
def test_token_sources_say_where_each_token_came_from(server, client, stream):
    """The fake accepts two of three tokens a round, so every third is the target's own."""
    before = server.status()["speculation"]["generated_by_source"]
    options = {"max_tokens": 8, "stream": stream, "extra_body": {"return_token_sources": True}}
    answer = client.chat.completions.create(model=MODEL, messages=hello("abcd"), **options)
    parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    sources = [entry for part in parts for entry in part.token_sources]
    texts = [(part.delta if stream else part.message).content or "" for part in parts]
    assert "".join(entry["text"] for entry in sources) == "".join(texts)
    assert [entry["source"] for entry in sources] == ["draft", "draft", "target"] * 2 + ["draft", "target"]
    expected = {**before, "target": before["target"] + 3, "draft": before["draft"] + 5}
    server.wait_until(lambda now: now["speculation"]["generated_by_source"] == expected, 2)
    echoed = complete(client, "abc", max_tokens=4, echo=True, extra_body={"return_token_sources": True}).choices[0]
    assert "".join(entry["text"] for entry in echoed.token_sources) == "abca", "without the prompt"
