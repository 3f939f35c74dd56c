"""The routes that fill holes, over HTTP: /infill as llama.cpp's clients use it, Mistral's, `suffix`, and raw prompts.

The fake engine answers with the prompt's text, without its marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.fake_engine import FIM_MARKS, tiny_tokenizer
from support.fake_server import MODEL, FakeServer

TOKENIZER = tiny_tokenizer(FIM_MARKS)
TIMINGS = ["prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"]
TIMINGS += [name.replace("prompt", "predicted") for name in TIMINGS]
OF_LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": "def f(x):\n",
    "input_suffix": "\n",
    "input_extra": [{"text": "x = 1\n", "time": [123, -456], "filename": "b.py"}],
    "prompt": "    return ",
    "n_predict": 8,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": ["content", *(f"timings/{name}" for name in TIMINGS), "truncated", "tokens_cached"],
    "model": "",
}
"""What llama.vim sends for a completion (January 2026), and below for a warm-up."""
WARM_UP_OF_LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": [{"text": "hello world", "time": [1, 2], "filename": "b.py"}],
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "samplers": [],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
    "model": "",
}
OF_LLAMA_VSCODE = {
    "id_slot": 0,
    "input_prefix": "def f(x):\n",
    "input_suffix": "\n",
    "input_extra": [{"text": "x = 1", "time": 1764000000000, "filename": "b.py"}],
    "prompt": "    return ",
    "n_predict": 6,
    "n_cmpl": 3,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 500,
}
STOPS_OF_CONTINUE = ["<|endoftext|>", *FIM_MARKS, "<|im_start|>", "<|im_end|>"]
HOLE = {"input_prefix": "abc\n", "input_suffix": "xyz", "n_predict": 9}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        FakeServer(options={"fills_holes": True, "round_s": 0.002}) as server,
        httpx.Client(base_url=server.url, timeout=20) as session,
    ):
        yield session


def infill(client: httpx.Client, **fields: Any) -> Any:
    response = client.post("/infill", json={**HOLE, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def test_an_infill_answer_has_llama_cpps_fields(client: httpx.Client) -> None:
    answer = infill(client, id_slot=3)
    prompt = TOKENIZER.encode(
        "<|repo_name|>myproject\n<|file_sep|>filename\n<|fim_prefix|>abc\n<|fim_suffix|>xyz<|fim_middle|>"
    )
    assert answer["content"] == "myproject"
    counts = ("index", "id_slot", "tokens_predicted", "tokens_evaluated", "tokens_cached")
    assert [answer[name] for name in counts] == [0, 3, 9, len(prompt), 0]
    ends = ("stop", "stop_type", "stopping_word", "truncated", "has_new_line", "model")
    assert [answer[name] for name in ends] == [True, "limit", "", False, False, MODEL]
    timings = answer["timings"]
    assert {*TIMINGS, "cache_n", "draft_n", "draft_n_accepted"} == set(timings)
    assert (timings["prompt_n"], timings["predicted_n"]) == (len(prompt), 9)
    assert timings["prompt_ms"] > 0
    assert timings["predicted_ms"] > 2  # three rounds
    assert timings["predicted_per_second"] == pytest.approx(9000 / timings["predicted_ms"])
    assert answer["generation_settings"]["n_predict"] == 9


def test_llama_vims_completion_and_warm_up(client: httpx.Client) -> None:
    response = client.post("/infill", json=OF_LLAMA_VIM)
    assert '"content":"' in response.text, "llama.vim drops an answer without these characters"
    assert "\n" not in response.text, "Vim gets an answer line by line"
    answer = response.json()
    assert list(answer) == OF_LLAMA_VIM["response_fields"]
    assert answer["timings/predicted_n"] == 8
    warm_up = client.post("/infill", json=WARM_UP_OF_LLAMA_VIM)
    assert (warm_up.status_code, warm_up.json()) == (200, {})
    answer = infill(client, **{**WARM_UP_OF_LLAMA_VIM, "response_fields": None})
    assert (answer["content"], answer["tokens_predicted"], answer["stop_type"]) == ("", 0, "limit")


def test_llama_vscode_gets_an_array_of_answers(client: httpx.Client) -> None:
    answers = client.post("/infill", json=OF_LLAMA_VSCODE).json()
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert {answer["content"] for answer in answers} == {"mypro"}, "and the space that stands before the cursor"
    assert len(infill(client, n_cmpl=1)) > 10, "one answer is an object"


def test_an_infill_stream_has_llama_cpps_events(client: httpx.Client) -> None:
    parts = [json.loads(data) for data in events(client.post("/infill", json={**HOLE, "stream": True}))]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part["content"] for part in parts) == "myproject"
    counts = [part["tokens_predicted"] for part in parts]
    assert (counts, counts[-1], len(parts) > 2) == (sorted(counts), 9, True)
    whole, last = infill(client), parts[-1]
    assert last.keys() == whole.keys()
    assert (last["stop_type"], last["timings"]["predicted_n"]) == ("limit", 9)


def test_what_ends_an_answer(client: httpx.Client) -> None:
    assert [infill(client, stop=["oj"])[name] for name in ("content", "stop_type", "stopping_word")] == [
        "mypr",
        "word",
        "oj",
    ]
    # The engine repeats "myproject\nfilename\nabc\nxyz".
    assert infill(client, n_predict=30, n_indent=1)["content"] == "myproject"
    slow = infill(client, n_predict=400, t_max_predict_ms=1)
    assert slow["content"].startswith("myproject\n")
    assert (slow["stop_type"], slow["has_new_line"]) == ("limit", True)
    assert slow["tokens_predicted"] < 100
    assert infill(client, n_predict=400, t_max_predict_ms=0)["tokens_predicted"] == 400


def test_an_answer_goes_on_with_the_word_at_the_cursor(client: httpx.Client) -> None:
    """The engine writes that word again; it is neither text nor looked through for stop strings."""
    answer = infill(client, prompt="  co", stop=["com", "c"], n_predict=12)
    assert (answer["content"], answer["tokens_predicted"], answer["stopping_word"]) == ("myproje", 10, "c")
    answer = infill(client, prompt="x ", n_predict=3, stop=[" "])
    assert (answer["content"], answer["tokens_predicted"]) == ("my", 3)
    body = {"prompt": "a\nbc", "suffix": "d", "max_tokens": 4}
    texts = [client.post("/v1/completions", json={**body, **fields}).json() for fields in ({}, {"logprobs": 0})]
    assert [text["choices"][0]["text"] for text in texts] == ["a\n", "a\nbc"]


def test_samplers_say_which_parameters_count(client: httpx.Client) -> None:
    asked = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1}

    def settings(**fields: Any) -> list[float]:
        answers = infill(client, n_predict=1, **asked, **fields)
        used = (answers[0] if isinstance(answers, list) else answers)["generation_settings"]
        return [used[name] for name in asked]

    assert settings() == [0.7, 40, 0.9, 0.1]
    assert settings(samplers=["top_k", "top_p", "infill"]) == [0, 40, 0.9, 0], "the most certain token is taken"
    assert settings(samplers=["top_k", "infill"], n_cmpl=2) == [0.7, 40, 1, 0], "two of these would be the same"
    assert settings(samplers=["min_p", "temperature"]) == [0.7, 0, 1, 0.1]
    assert settings(samplers=[]) == [1, 0, 1, 0]


def test_a_prompt_that_is_too_long_is_cut_and_not_refused(client: httpx.Client) -> None:
    answer = infill(client, input_prefix="hello world\n" * 5000, input_suffix="xyz" * 5000)
    assert answer["truncated"]
    assert answer["tokens_evaluated"] + 9 <= 512
    for path, fields in (("/v1/completions", {"suffix": "x" * 5000}), ("/v1/fim/completions", {})):
        response = client.post(path, json={"prompt": "hello world\n" * 5000, **fields})
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["prompt_tokens"] < 512
    response = client.post("/infill", json={**HOLE, "n_predict": 512})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n_predict")


def test_a_suffix_is_a_field_of_completions(client: httpx.Client) -> None:
    body = {"prompt": ["ab", "c"], "suffix": "d", "max_tokens": 4, "n": 2, "logprobs": 0}
    response = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in response["choices"]] == ["abda", "abda", "cdcd", "cdcd"]
    assert response["choices"][0]["logprobs"]["tokens"] == ["a", "b", "d", "a"]
    assert response["usage"]["prompt_tokens"] == 6 + 5
    assert response["usage"]["completion_tokens"] == 16
    streamed = client.post("/v1/completions", json={**body, "prompt": "ab", "n": 1, "stream": True})
    *chunks, done = events(streamed)
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "abda"
    for suffix in ("", None):
        plain = client.post("/v1/completions", json={"prompt": "ab", "suffix": suffix, "max_tokens": 4}).json()
        assert (plain["choices"][0]["text"], plain["usage"]["prompt_tokens"]) == ("abab", 2)


def test_marks_in_a_raw_prompt_are_marks_and_end_its_answer(client: httpx.Client) -> None:
    """As Continue sends it, with its nine stop strings. The fake engine repeats no marks, but other special tokens."""
    raw = "<|fim_prefix|>ab<|fim_suffix|>c<|fim_middle|>"
    body = {"prompt": raw, "max_tokens": 4, "stream": False, "stop": STOPS_OF_CONTINUE}
    response = client.post("/v1/completions", json=body).json()
    assert response["usage"]["prompt_tokens"] == 6, "three marks and three letters"
    assert response["choices"][0]["text"] == "abca"


def test_mistrals_route_answers_like_a_chat(client: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "ab\n", "suffix": "c", "max_tokens": 4, "random_seed": 1, "metadata": {"a": "b"}}
    answer = client.post("/v1/fim/completions", json={**body, "min_tokens": 2, "top_p": 0.9}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"]["content"] == "ab\nc"
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 7
    *chunks, done = events(client.post("/v1/fim/completions", json={**body, "stream": True}))
    assert done == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab\nc"
    without = client.post("/v1/fim/completions", json={"prompt": "ab\n", "max_tokens": 4}).json()
    assert (without["choices"][0]["message"]["content"], without["usage"]["prompt_tokens"]) == ("ab\na", 6)


def test_the_routes_are_described(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/infill", "/v1/fim/completions"):
        operation = paths[path]["post"]
        assert "text/event-stream" in operation["responses"]["200"]["content"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("Request")


def test_a_model_without_marks_says_that_it_fills_no_holes() -> None:
    with FakeServer() as server, httpx.Client(base_url=server.url) as plain:
        for path, body in (("/infill", HOLE), ("/v1/fim/completions", {"prompt": "a"})):
            response = plain.post(path, json=body)
            assert response.status_code == 501
            error = response.json()["error"]
            assert error["code"] == "not_supported"
            assert "fill in the middle" in error["message"]
        response = plain.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")
        assert "/infill" in plain.get("/openapi.json").json()["paths"]


def test_requests_are_counted_by_kind_and_domains_stay_those_of_prompts(client: httpx.Client) -> None:
    """A raw prompt with marks fills a hole too. Kinds are no labels: the learner would take these as domains."""

    def counts() -> tuple[dict[str, tuple[int, ...]], Any]:
        report = client.get("/v1/aurora/status").json()
        fields = ("requests", "generated_tokens", "drafts", "proposed", "accepted")
        kinds = {kind: tuple(each[field] for field in fields) for kind, each in report["kinds"].items()}
        return kinds, report["domains"]["served"].keys()

    before, _ = counts()
    raw = "<|fim_prefix|>abc<|fim_suffix|>xyz<|fim_middle|>"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "n": 2}
    for path, body in (
        ("/infill", HOLE),
        ("/v1/fim/completions", {"prompt": "abc", "max_tokens": 4}),
        ("/v1/completions", {"prompt": "abc", "suffix": "xyz", "max_tokens": 3}),
        ("/v1/completions", {"prompt": raw, "max_tokens": 3}),
        ("/v1/completions", {"prompt": "abc", "max_tokens": 2, "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "n": 1, "prediction": {"type": "content", "content": "hello"}}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
    after, domains = counts()
    grown = {kind: tuple(new - old for new, old in zip(after[kind], before[kind], strict=True)) for kind in after}
    tokens = {kind: each[:2] for kind, each in grown.items()}
    assert tokens == {"fim": (4, 9 + 4 + 3 + 3), "completion": (1, 2), "chat": (2, 10), "edit": (1, 5)}
    drafts, proposed, accepted = grown["fim"][2:]
    assert 0 < drafts < accepted <= proposed <= 2 * drafts, "of every three tokens two are the draft's"
    assert domains <= {"unknown"}
    exported = client.get("/metrics").text
    assert f'aurora_kind_requests_total{{engine="0",kind="fim",model_name="{MODEL}"}} {after["fim"][0]}.0' in exported
