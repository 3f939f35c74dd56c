"""What a call says of its answer: whether anybody looks at it before it ends."""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest
from aurora_lit.serve.http.tokenize import Limits, longest_token, prepare_chat, prepare_completion

TOKENIZER = tiny_tokenizer()
LIMITS = Limits(max_seq_len=64, vocab_size=len(TOKENIZER), longest_token=longest_token(TOKENIZER))


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
    chat = ChatRequest(messages=[{"role": "user", "content": "hello"}], **fields)
    text = CompletionRequest(prompt="hello", **fields)
    assert prepare_chat(chat, call_id="c", tokenizer=TOKENIZER, limits=LIMITS).call.is_answered_whole == whole
    assert prepare_completion(text, call_id="c", tokenizer=TOKENIZER, limits=LIMITS).call.is_answered_whole == whole
