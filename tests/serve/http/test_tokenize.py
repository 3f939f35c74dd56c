"""Requests to calls: what is refused and how; `store: false`, domain, client and salt reach every request."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from support.fake_engine import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aurora_lit.errors import RequestError
from aurora_lit.ipc.messages import Delta
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.request import Client, Request
from aurora_lit.serve.http import structure_check, tokenize
from aurora_lit.serve.http.answer_stream import AnswerStream
from aurora_lit.serve.http.message_fields import MAX_MESSAGES, Message
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from aurora_lit.serve.http.structured_fields import StructuredOutputs
from aurora_lit.serve.http.tokenize import Limits, Prepared, longest_token, prepare_chat, prepare_completion, render
from aurora_lit.serve.http.tool_fields import Tool

TOKENIZER = tiny_tokenizer()
LIMITS = Limits(max_seq_len=64, vocab_size=len(TOKENIZER), longest_token=longest_token(TOKENIZER))
TURN: Any = [{"role": "user", "content": "hello"}]


def prepare(body: ChatRequest | CompletionRequest, *, limits: Limits = LIMITS, **how: Any) -> Prepared:
    how = {"call_id": "c", "tokenizer": TOKENIZER, "limits": limits, **how}
    return prepare_chat(body, **how) if isinstance(body, ChatRequest) else prepare_completion(body, **how)


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ({}, True),
        ({"stream": False, "stop": []}, True),
        ({"stop_token_ids": [3]}, True),
        ({"stream": True}, False),
        ({"stop": "b"}, False),
        ({"stop": ["b"], "n": 2}, False),
    ],
)
def test_a_stream_and_a_stop_string_need_each_rounds_tokens_at_once(fields: dict[str, Any], whole: bool) -> None:
    chat = ChatRequest(messages=TURN, **fields)
    text = CompletionRequest(prompt="hello", **fields)
    assert prepare(chat).call.is_answered_whole == whole
    assert prepare(text).call.is_answered_whole == whole


@pytest.mark.parametrize(("fields", "asking"), [({}, [1, None, 1, None]), ({"stream": True}, [1, 1, 1, 1])])
def test_only_the_first_choice_reads_a_whole_prompt_for_its_logprobs(
    fields: dict[str, Any], asking: list[int | None]
) -> None:
    text = CompletionRequest(prompt=["hello", "world"], n=2, echo=True, logprobs=1, **fields)
    call = prepare(text).call
    assert [request.params.prompt_logprobs for request in call.requests] == asking
    assert {request.params.logprobs for request in call.requests} == {1}


@pytest.mark.parametrize(
    ("fields", "total", "field"),
    [
        ({"max_tokens": 50, "logprobs": True}, 50, ""),
        ({"max_tokens": 51, "logprobs": True}, 51, "logprobs"),
        ({"max_tokens": 5, "logprobs": True, "top_logprobs": 9}, 50, ""),
        ({"max_tokens": 5, "logprobs": True, "top_logprobs": 9, "n": 2}, 100, "top_logprobs"),
        ({"max_tokens": 5, "prompt_logprobs": 20, "logprobs": True}, 1 * 21 * 3 + 5, "prompt_logprobs"),
        ({"max_tokens": 5, "prompt_logprobs": 10, "n": 2}, 33, ""),
        ({"max_tokens": 1000}, 0, ""),
        ({"logprobs": True}, 50, ""),
    ],
)
def test_log_probabilities_of_a_chat_are_limited(
    fields: dict[str, Any], total: int, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer whose length is left open counts as 50 tokens here, and a chat's prompt once."""
    monkeypatch.setattr(tokenize, "MAX_LOGPROBS_OF_CALL", 50)
    monkeypatch.setattr(tokenize, "_TOKENS_OF_OPEN_ANSWER", 50)
    chat = ChatRequest(messages=TURN, **fields)
    limits = replace(LIMITS, max_seq_len=1100)
    prepared = prepare(chat, limits=limits)
    assert prepared.num_prompt_tokens == 3
    if not field:
        tokenize.check_logprobs(chat, prepared)
        return
    with pytest.raises(RequestError, match=f"^{field}: the response may have {total} log-probabilities") as refused:
        tokenize.check_logprobs(chat, prepared)
    assert refused.value.param == field


def test_reasoning_effort_none_turns_thinking_off_in_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ enable_thinking is defined and enable_thinking is false }} {{ reasoning_effort }}"
    for fields, text in (
        ({}, "False "),
        ({"reasoning_effort": None}, "False "),
        ({"reasoning_effort": "none"}, "True none"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "False none"),
    ):
        chat = ChatRequest(messages=TURN, **fields)  # type: ignore[arg-type]
        assert render(chat.messages, chat, tokenizer=tokenizer) == text
    with pytest.raises(RequestError, match="reasoning_effort='low' is not supported; leave it out") as refused:
        ChatRequest(messages=TURN, reasoning_effort="low")
    assert refused.value.code == "unsupported_parameter"
    assert CompletionRequest(prompt="hello", reasoning_effort="none")


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeRequest])
def test_calls_of_a_message_cannot_be_continued(kind: type[ChatRequest | TokenizeRequest]) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = {"role": "assistant", "content": "is", "tool_calls": [call]}
    body = kind(messages=[last], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="^continue_final_message: the last message has tool_calls") as refused:
        render(body.messages or [], body, tokenizer=TOKENIZER)
    assert refused.value.param == "continue_final_message"


def test_log_probabilities_of_echoed_prompts_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_LOGPROBS_OF_CALL", 99)
    for echo in (False, True):
        text = CompletionRequest(prompt=[[1] * 9] * 5, echo=echo, logprobs=1, max_tokens=1)
        prepared = prepare(text)
        if not echo:
            tokenize.check_logprobs(text, prepared)
            continue
        with pytest.raises(RequestError, match="^logprobs: the response may have 100 ") as refused:
            tokenize.check_logprobs(text, prepared)
        assert refused.value.param == "logprobs"


@pytest.mark.parametrize(("seed", "expected"), [(7, [7, 8]), (-2, [2**63 - 2, 2**63 - 1]), (-1, [None, None])])
def test_a_seed_of_minus_one_is_none(seed: int, expected: list[int | None]) -> None:
    text = CompletionRequest(prompt="hello", n=2, seed=seed)
    call = prepare(text).call
    assert [request.params.seed for request in call.requests] == expected


def test_text_that_is_a_token_without_a_row_in_the_model_is_refused() -> None:
    """Tokenizers may have more tokens than their model: one for images, one for padding."""
    limits = replace(LIMITS, vocab_size=TOKENIZER.convert_tokens_to_ids("<|toolong|>"))
    for prompt in ("hello <|toolong|>", ["hello", "<|toolong|> world"]):
        with pytest.raises(RequestError, match=r"prompt: this model has no token .<\|toolong\|>") as refused:
            prepare(CompletionRequest(prompt=prompt), limits=limits)
        assert refused.value.param == "prompt"
    chat = ChatRequest(messages=[{"role": "user", "content": "<|toolong|>"}])
    with pytest.raises(RequestError, match="messages: this model has no token"):
        prepare(chat, limits=limits)
    prepare(chat)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_too_many_tokens_are_told_under_the_name_that_was_sent(name: str) -> None:
    chat = ChatRequest(messages=TURN, **{name: 1000})
    with pytest.raises(RequestError, match=f"^{name}=1000 is too many") as refused:
        prepare(chat)
    assert refused.value.param == name


@pytest.mark.parametrize(("num_words", "fields"), [(100, {}), (10_000, {}), (1, {"max_tokens": 1000})])
def test_too_long_is_said_in_the_words_by_which_litellm_knows_it(num_words: int, fields: dict[str, Any]) -> None:
    said = f"this model's maximum context length is {LIMITS.max_seq_len} tokens"
    content = "hello " * num_words
    chat = ChatRequest(messages=[{"role": "user", "content": content}], **fields)
    with pytest.raises(RequestError, match=said) as refused:
        prepare(chat)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match=said):
        prepare(CompletionRequest(prompt=content, **fields))


def test_a_long_list_of_what_is_no_prompt_is_refused_at_its_first_mistake() -> None:
    for prompt in ([None] * 1000, [1] * 999 + [-1], [[1], [-1] * 999]):
        with pytest.raises(ValidationError) as refused:
            CompletionRequest.model_validate({"prompt": prompt})
        assert refused.value.error_count() <= 4, "one for each form that a prompt may have"


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"n": 3, "best_of": 3}, True),
        ({"n": 3, "best_of": 4}, False),
        ({"best_of": 3}, False),
        ({"n": 1, "best_of": True}, False),
        ({"n": 2, "best_of": 2.0}, False),
    ],
)
def test_as_many_choices_as_are_asked_for_need_no_best_of(fields: dict[str, Any], accepted: bool) -> None:
    if accepted:
        assert CompletionRequest.model_validate({"prompt": "a", **fields}).choices == ("n", fields["n"])
    else:
        with pytest.raises(RequestError, match="best_of"):
            CompletionRequest.model_validate({"prompt": "a", **fields})
    with pytest.raises(RequestError, match="best_of"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ChatRequest, "messages"),
        (ChatRequest, "tools"),
        (ChatRequest, "stop"),
        (ChatRequest, "stop_token_ids"),
        (ChatRequest, "guided_choice"),
        (Message, "tool_calls"),
        (Message, "content"),
        (StructuredOutputs, "choice"),
        (TokenizeRequest, "messages"),
        (TokenizeRequest, "tools"),
        (DetokenizeRequest, "tokens"),
    ],
)
def test_every_other_list_is_refused_at_its_first_mistake_too(kind: type[BaseModel], name: str) -> None:
    """Validation runs on the event loop, and millions of members fit into a body."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate({"role": "user", name: [None] * 10_000})
    of_list = [error for error in refused.value.errors() if error["loc"][0] == name]
    assert 1 <= len(of_list) <= 3, "one for each form that the field may have"


@pytest.mark.parametrize("kind", [ChatRequest, TokenizeRequest])
def test_a_conversation_has_a_limit(kind: type[BaseModel]) -> None:
    turn = {"role": "user", "content": "a"}
    assert kind.model_validate({"messages": [turn] * MAX_MESSAGES})
    with pytest.raises(ValidationError, match=f"at most {MAX_MESSAGES} items"):
        kind.model_validate({"messages": [turn] * (MAX_MESSAGES + 1)})


@pytest.mark.parametrize("inside", [False, True])
def test_an_object_of_too_many_fields_is_refused_by_their_number(inside: bool) -> None:
    """Not field by field, each with an error of its own."""
    turn: dict[str, Any] = {"role": "user", "content": "a"}
    body: dict[str, Any] = {"messages": [turn]}
    (turn if inside else body).update(dict.fromkeys(map(str, range(10_000)), 0))
    with pytest.raises(RequestError, match="an object has 1000[12] fields") as refused:
        ChatRequest.model_validate(body)
    assert refused.value.param == "body"


def test_an_object_may_have_256_fields() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        ChatRequest.model_validate({"messages": [], **dict.fromkeys(map(str, range(255)), 0)})
    with pytest.raises(RequestError, match="an object has 257 fields"):
        ChatRequest.model_validate({"messages": [], **dict.fromkeys(map(str, range(256)), 0)})


@pytest.mark.parametrize("name", ["metadata", "logit_bias"])
def test_a_map_of_too_many_entries_is_refused_by_their_number(name: str) -> None:
    with pytest.raises(ValidationError, match="at most .* items after validation, not 10000") as refused:
        ChatRequest.model_validate({"messages": [], name: dict.fromkeys(map(str, range(10_000)))})
    assert sum(error["loc"][0] == name for error in refused.value.errors()) == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"continue_final_message": True}, " Paris"),
        ({"structured_outputs": {"choice": [" Paris", " Rome"]}}, " Paris"),
        ({"guided_regex": " [A-Z][a-z]*"}, " Paris"),
        ({}, "Paris"),
    ],
)
def test_a_space_that_a_final_message_or_a_grammar_asks_for_is_not_lost(fields: dict[str, Any], text: str) -> None:
    """Decoders of SentencePiece leave out the space at the beginning of a text."""
    backend = Tokenizer(models.WordLevel({"\u2581is": 0, "\u2581Paris": 1}, unk_token="\u2581is"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    chat = ChatRequest(messages=[{"role": "assistant", "content": "is"}], add_generation_prompt=False, **fields)
    prepared = prepare_chat(chat, call_id="c", tokenizer=tokenizer, limits=replace(LIMITS, vocab_size=2))
    answer = AnswerStream(tokenizer, prepared.call.requests, prepared.options)
    assert answer.add([Delta(index=0, token_ids=(1,))]).deltas[0].text == text


def test_grammars_that_name_special_tokens_are_checked_with_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it holds the interpreter's lock, so that the whole process stands still."""
    made = list[int]()

    def counted(backend: Tokenizer, **options: int) -> str:
        made.append(1)
        time.sleep(0.05)  # another request comes meanwhile
        return tokenizer_json(backend, **options)

    def prepare(name: str) -> None:
        body = CompletionRequest(prompt="hello", structured_outputs={"grammar": f'start: "a" {name}'})
        prepare_completion(body, call_id="c", tokenizer=tokenizer, limits=LIMITS)

    monkeypatch.setattr(structure_check, "tokenizer_json", counted)
    tokenizer = tiny_tokenizer()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(prepare, ["<|end|>", "<|user|>"]))
    with pytest.raises(RequestError, match="nothing"):
        prepare("<|nothing|>")
    assert len(made) == 1
    tokenizer = tiny_tokenizer()
    prepare("<|end|>")
    assert len(made) == 2, "another model has its own"


def test_grammars_may_name_special_tokens_though_the_model_lacks_one_of_the_tokenizers() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<|image|>"])

    def prepare(name: str) -> None:
        body = CompletionRequest(prompt="hello", structured_outputs={"grammar": f'start: "a" {name}'})
        prepare_completion(body, call_id="c", tokenizer=tokenizer, limits=LIMITS)

    prepare("<|end|>")
    with pytest.raises(RequestError, match="image"):
        prepare("<|image|>")


_NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)


def test_tools_reach_a_template_that_knows_no_system_role() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _NO_SYSTEM
    tools: Any = [Tool(type="function", function={"name": "weather"})]  # type: ignore[arg-type]
    asked = ChatRequest(messages=[{"role": "user", "content": "Is it warm?"}])
    text = render(asked.messages, asked, tools=tools, tokenizer=tokenizer)
    assert text.startswith("<|user|>You may call functions")
    assert text.endswith("\n\nIs it warm?")
    assert '"weather"' in text
    own = ChatRequest(messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}])
    for given in (tools, ()):
        with pytest.raises(RequestError, match="messages: the chat template refuses them: no system role"):
            render(own.messages, own, tools=given, tokenizer=tokenizer)


def requests(**fields: Any) -> list[Request]:
    """Requests of a chat call and of a completion call with these fields."""
    how: Any = {"tokenizer": TOKENIZER, "limits": LIMITS, "client": Client("c1")}
    chat = ChatRequest(model="m", messages=TURN, max_tokens=4, **fields)
    text = CompletionRequest(model="m", prompt=["hello", "a"], max_tokens=4, **fields)
    return [
        *prepare_chat(chat, call_id="c", **how).call.requests,
        *prepare_completion(text, call_id="t", **how).call.requests,
    ]


@pytest.mark.parametrize(
    ("fields", "store", "domain"),
    [
        ({}, True, ""),
        ({"store": None, "metadata": None}, True, ""),
        ({"store": True, "metadata": {"other": "x"}}, True, ""),
        ({"store": False, "n": 2}, False, ""),
        ({"metadata": {"aurora_domain": "code"}, "n": 2}, True, "code"),
        ({"metadata": {"aurora_domain": "ü" * 64}}, True, "ü" * 64),
        ({"store": False, "metadata": {"aurora_domain": "code"}}, False, ""),  # status and metrics would name it
    ],
)
def test_store_domain_and_client_reach_every_choice(fields: dict[str, Any], store: bool, domain: str) -> None:
    made = requests(**fields)
    assert len(made) == 3 * fields.get("n", 1)
    assert {(r.store, r.domain, r.client.name) for r in made} == {(store, domain, "c1")}


@pytest.mark.parametrize("domain", ["", "x" * 65, "two\nlines", "\x1b[31mred"])
def test_a_domain_that_is_no_label_is_refused_by_name(domain: str) -> None:
    with pytest.raises(RequestError, match=r"metadata\.aurora_domain") as caught:
        ChatRequest(model="m", messages=TURN, metadata={"aurora_domain": domain})
    assert caught.value.param == "metadata.aurora_domain"


@pytest.mark.parametrize(
    ("sent", "arrives"), [({}, ""), ({"cache_salt": None}, ""), ({"cache_salt": "ü" * 256}, "ü" * 256)]
)
def test_the_salt_reaches_every_choice(sent: dict[str, Any], arrives: str) -> None:
    made = requests(n=2, **sent)
    assert len(made) == 6
    assert {request.cache_salt for request in made} == {arrives}


def test_the_choices_of_a_call_name_it_and_no_other_does() -> None:
    calls = [request.call for request in requests(n=2)]
    assert [calls.count(call) for call in calls] == [2, 2, 4, 4, 4, 4], "a chat, and two prompts of a completion"
    assert "" not in calls


def test_a_requests_name_which_traces_have_is_not_the_id_that_the_client_gets() -> None:
    names = [request.request_id for request in requests(n=2)]
    assert len(set(names)) == 6
    assert not set(names) & {f"{call_id}-{number}" for call_id in "ct" for number in range(4)}
