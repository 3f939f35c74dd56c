"""Stream chunks: rounds that are sent together say the same as rounds that are sent one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from support.fake_engine import tiny_tokenizer

from aurora_lit.request import TokenLogprob
from aurora_lit.serve.http.answer_stream import TextDelta, by_token
from aurora_lit.serve.http.detokenizer import TokenDecoder
from aurora_lit.serve.http.responses import ChatResponse, ResponseBuilder, TextResponse, _top_by_text
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest
from aurora_lit.serve.http.tokenize import Limits, longest_token, prepare_chat, prepare_completion

TOKENIZER = tiny_tokenizer()
DECODER = TokenDecoder(TOKENIZER)


def builder(kind: Literal["chat", "text"], **fields: Any) -> ResponseBuilder:
    """For two choices with log-probabilities; the prompt of a text completion is echoed. fields: of its request."""
    limits = Limits(max_seq_len=64, vocab_size=len(TOKENIZER), longest_token=longest_token(TOKENIZER))
    if kind == "chat":
        turns: Any = [{"role": "user", "content": "hello"}]
        chat = ChatRequest(messages=turns, n=2, logprobs=True)
        prepared = prepare_chat(chat, call_id="c", tokenizer=TOKENIZER, limits=limits)
    else:
        text = CompletionRequest(**{"prompt": "hello", "n": 2, "logprobs": 0, "echo": True, **fields})
        prepared = prepare_completion(text, call_id="c", tokenizer=TOKENIZER, limits=limits)
    made = ChatResponse if kind == "chat" else TextResponse
    return made(prepared, created=0, model="m", token_decoder=DECODER, max_draft_tokens=2, started_s=0.0)


def delta(index: int, text: str, *, accepted: int, finish_reason: str | None = None) -> TextDelta:
    ids = tuple(TOKENIZER.encode(text))
    logprobs = tuple(TokenLogprob(token_id=i, logprob=-0.5, top=()) for i in ids)
    return TextDelta(
        index=index,
        text=text,
        token_ids=ids,
        logprobs=logprobs,
        num_proposed=2,
        num_accepted=accepted,
        finish_reason=finish_reason,
    )


ROUNDS = [
    (delta(0, "ab", accepted=1), delta(1, "c", accepted=0)),
    (delta(1, "def", accepted=2),),
    (delta(0, "", accepted=0), delta(1, "g", accepted=0, finish_reason="stop")),
    (delta(0, "hij", accepted=2, finish_reason="length"),),
]


def said(chunks: list[dict[str, Any]], index: int) -> tuple[str, list[Any], list[Any]]:
    """Text, log-probabilities and finish reasons of a choice."""
    text, logprobs, reasons = "", list[Any](), list[Any]()
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if choice["index"] == index:
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            for values in (choice["logprobs"] or {}).values():
                logprobs += values or []
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, logprobs, reasons


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("together", [2, 4])
def test_rounds_sent_together_say_the_same_in_one_chunk_for_each_choice(
    kind: Literal["chat", "text"], together: int
) -> None:
    alone, merged = builder(kind), builder(kind)
    wanted = [chunk for deltas in ROUNDS for chunk in alone.chunks(deltas)]
    groups = [ROUNDS[at : at + together] for at in range(0, len(ROUNDS), together)]
    messages = [merged.chunks([delta for deltas in group for delta in deltas]) for group in groups]
    got = [chunk for message in messages for chunk in message]
    for index in range(2):
        text, logprobs, reasons = said(got, index)
        wanted_text, wanted_logprobs, wanted_reasons = said(wanted, index)
        assert (text, reasons) == (wanted_text, wanted_reasons)
        # Lists side by side (tokens, offsets, …) follow each other otherwise, by chunk.
        assert sorted(map(repr, logprobs)) == sorted(map(repr, wanted_logprobs))
    assert (merged.usage(), merged.metrics()) == (alone.usage(), alone.metrics())
    for message in messages:
        contents = [chunk for chunk in message if chunk["choices"][0].get("delta", {}).get("role") is None]
        indices = [chunk["choices"][0]["index"] for chunk in contents]
        assert len(set(indices)) == len(indices)
    assert len(got) < len(wanted)


def test_a_token_an_event_says_the_same_as_a_round_an_event() -> None:
    by_round, single = builder("text"), builder("text")
    wanted = [chunk for deltas in ROUNDS for chunk in by_round.chunks(deltas)]
    rounds = [[replace(each, token_texts=tuple(each.text)) for each in deltas] for deltas in ROUNDS]
    got = [chunk for deltas in rounds for piece in by_token(deltas) for chunk in single.chunks([piece])]
    for index in range(2):
        text, _, reasons = said(got, index)
        assert (text, reasons) == said(wanted, index)[::2]
    assert (single.usage(), single.metrics()) == (by_round.usage(), by_round.metrics())
    assert all(len(chunk["choices"][0]["logprobs"]["tokens"]) == 1 for chunk in got[2:] if chunk["choices"][0]["text"])
    assert sum(bool(chunk["choices"][0]["text"]) for chunk in got) == len("abcdefghij")


def test_cached_tokens_are_those_of_each_prompts_first_choice() -> None:
    made = builder("text")
    for index, cached in ((0, 3), (1, 4)):
        made.add([replace(delta(index, "a", accepted=0, finish_reason="stop"), num_cached_tokens=cached)])
    assert made.usage()["prompt_tokens_details"] == {"cached_tokens": 3}


PREDICTED = {"type": "content", "content": [{"type": "text", "text": "abc"}, {"type": "text", "text": "defg"}]}


@pytest.mark.parametrize(
    ("said", "accepted"),
    [
        ("abcdefg", 7),
        ("abcdefgh", 7),
        ("abxydefg", 6),  # replaced
        ("abcxyzdefg", 7),  # inserted
        ("abfg", 4),  # removed
        ("", 0),
        ("gfedcba", 1),
        ("abababab", 2),  # no token counts twice
        ("cab", 2),  # the first came too early
    ],
)
def test_the_usage_of_a_prediction_adds_up_to_its_length(said: str, accepted: int) -> None:
    made = builder("text", n=1, echo=False, logprobs=None, prediction=PREDICTED)
    for character in said:
        made.add([delta(0, character, accepted=0)])
    counts = made.usage()["completion_tokens_details"]
    assert counts == {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": 7 - accepted}
    assert "completion_tokens_details" not in builder("text").usage()


def test_the_response_is_compact_json() -> None:
    for kind, fields in (("chat", {}), ("text", {"logprobs": 2, "prompt_logprobs": 1})):
        made = builder(kind, **fields)  # type: ignore[arg-type]
        for deltas in ROUNDS:
            made.add(deltas)
        assert made.has_logprobs
        written = made.full_json()
        assert written == json.dumps(json.loads(written), ensure_ascii=False, separators=(",", ":"))
        assert [choice["finish_reason"] for choice in json.loads(written)["choices"]] == ["length", "stop"]


def test_every_choice_shows_the_prompts_logprobs_that_came_with_the_first() -> None:
    """Although a later choice may answer before it."""
    made = builder("text", prompt=["hi", "to"], prompt_logprobs=0)
    for index in (1, 3, 0, 2):
        known = None
        if index % 2 == 0:
            after = TOKENIZER.encode("hi" if index == 0 else "to")[1]
            known = (None, TokenLogprob(token_id=after, logprob=-1.0 - index, top=()))
        made.add([replace(delta(index, "ab", accepted=0, finish_reason="length"), prompt_logprobs=known)])
    choices = full(made)["choices"]
    for choice, prompt, logprob in zip(choices, ("hi", "hi", "to", "to"), (-1, -1, -3, -3), strict=True):
        assert choice["text"] == f"{prompt}ab"
        assert choice["logprobs"]["tokens"] == [*prompt, "a", "b"]
        assert choice["logprobs"]["token_logprobs"] == [None, logprob, -0.5, -0.5]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
        (shown,) = choice["prompt_logprobs"][1].values()
        assert (choice["prompt_logprobs"][0], shown["logprob"]) == (None, logprob)


def calling() -> ResponseBuilder:
    """For one choice that may call `f`."""
    limits = Limits(max_seq_len=4096, vocab_size=len(TOKENIZER), longest_token=longest_token(TOKENIZER))
    asked: Any = {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    prepared = prepare_chat(ChatRequest(**asked), call_id="c", tokenizer=TOKENIZER, limits=limits)
    return ChatResponse(prepared, created=0, model="m", token_decoder=DECODER, max_draft_tokens=2, started_s=0.0)


def full(made: ResponseBuilder) -> dict[str, Any]:
    """The response to a request without stream."""
    return dict(json.loads(made.full_json()))


CALLS = '{"name": "f", "arguments": {"a": 1}}\n{"name": "f", "arguments": {"a": 2}}'


@pytest.mark.parametrize("step", [3, 17, 200])
@pytest.mark.parametrize("together", [1, 2, 100])
def test_a_stream_has_the_calls_of_the_whole_response(step: int, together: int) -> None:
    parts = [CALLS[at : at + step] for at in range(0, len(CALLS), step)]
    rounds = [delta(0, part, accepted=0) for part in parts] + [delta(0, "", accepted=0, finish_reason="stop")]
    whole, streamed = calling(), calling()
    whole.add(rounds)
    message = full(whole)["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"a": 1}', '{"a": 2}']
    assert full(whole)["choices"][0]["finish_reason"] == "tool_calls"

    calls = list[dict[str, Any]]()
    for at in range(0, len(rounds), together):
        for chunk in streamed.chunks(rounds[at : at + together]):
            (choice,) = chunk["choices"]
            assert not choice["delta"].get("content")
            indices = [part["index"] for part in choice["delta"].get("tool_calls", ())]
            assert len(set(indices)) == len(indices)
            for part in choice["delta"].get("tool_calls", ()):
                if "id" in part:
                    assert part["index"] == len(calls)
                    calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"] for call in calls] == [call["function"] for call in message["tool_calls"]]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize("step", [3, 17, 200])
@pytest.mark.parametrize("with_last", [False, True])
def test_openais_client_is_told_the_end_of_every_call(step: int, with_last: bool) -> None:
    """It misses the end of a call that begins in the chunk with the finish reason."""
    parts = [CALLS[at : at + step] for at in range(0, len(CALLS), step)]
    rounds = [delta(0, part, accepted=0) for part in parts] + [delta(0, "", accepted=0, finish_reason="stop")]
    if with_last:
        rounds[-2:] = [replace(rounds[-2], finish_reason="stop")]
    streamed, client = calling(), ChatCompletionStreamState(input_tools=openai.omit, response_format=openai.omit)
    chunks = [chunk for each in rounds for chunk in streamed.chunks([each])]
    events = [event for chunk in chunks for event in client.handle_chunk(ChatCompletionChunk.model_validate(chunk))]
    ended = [event.arguments for event in events if event.type == "tool_calls.function.arguments.done"]
    assert ended == ['{"a": 1}', '{"a": 2}']
    assert client.get_final_completion().choices[0].finish_reason == "tool_calls"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count("tool_calls") == 1


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_call_that_was_cut_off_says_so(reason: str) -> None:
    """By the number of tokens, or by a stop string in its arguments."""
    made = calling()
    made.add([delta(0, CALLS[:33], accepted=0, finish_reason=reason)])
    (choice,) = full(made)["choices"]
    assert choice["finish_reason"] == reason
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": '}


def test_what_might_have_become_a_call_is_content_in_the_end() -> None:
    made = calling()
    chunks = made.chunks([delta(0, CALLS[:20], accepted=0, finish_reason="length")])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == CALLS[:20]
    (choice,) = full(made)["choices"]
    assert choice["message"] == {"role": "assistant", "content": CALLS[:20], "refusal": None}


def test_of_two_tokens_with_the_same_text_the_likelier_one_stays() -> None:
    first, second = TOKENIZER.encode("ab")
    known = TokenLogprob(token_id=second, logprob=-2.0, top=((first, -0.5), (second, -2.0)))
    decoder = TokenDecoder(TOKENIZER)
    assert _top_by_text(known, decoder) == {decoder.to_text(first): -0.5, decoder.to_text(second): -2.0}
    again = TokenLogprob(token_id=first, logprob=-0.7, top=((first, -0.5),))
    assert _top_by_text(again, decoder) == {decoder.to_text(first): -0.5}
