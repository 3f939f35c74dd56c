"""`store: false`, the label of the domain and the salt, as a client sends them, reach every request of a call."""

from __future__ import annotations

from typing import Any

import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.errors import RequestError
from aurora_lit.request import Request
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest
from aurora_lit.serve.http.tokenize import Limits, longest_token, prepare_chat, prepare_completion

TURN = [{"role": "user", "content": "hello"}]


def requests(**fields: Any) -> list[Request]:
    """Requests of a chat call and of a completion call with these fields."""
    tokenizer = tiny_tokenizer()
    limits = Limits(max_seq_len=64, vocab_size=len(tokenizer), longest_token=longest_token(tokenizer))
    chat = ChatRequest(model="m", messages=TURN, max_tokens=4, **fields)
    text = CompletionRequest(model="m", prompt=["hello", "a"], max_tokens=4, **fields)
    return [
        *prepare_chat(chat, call_id="c", tokenizer=tokenizer, limits=limits, client="c1").call.requests,
        *prepare_completion(text, call_id="t", tokenizer=tokenizer, limits=limits, client="c1").call.requests,
    ]


@pytest.mark.parametrize(
    ("fields", "store", "domain"),
    [
        ({}, True, ""),
        ({"store": None, "metadata": None}, True, ""),
        ({"store": True, "metadata": {"other": "x"}}, True, ""),
        ({"store": False, "n": 2}, False, ""),
        ({"metadata": {"aurora_domain": "code"}, "n": 2}, True, "code"),
        ({"store": False, "metadata": {"aurora_domain": "ü" * 64}}, False, "ü" * 64),
    ],
)
def test_store_domain_and_client_reach_every_choice(fields: dict[str, Any], store: bool, domain: str) -> None:
    made = requests(**fields)
    assert len(made) == 3 * fields.get("n", 1)
    assert {(r.store, r.domain, r.client) for r in made} == {(store, domain, "c1")}


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


def test_a_requests_name_which_traces_have_is_not_the_id_that_the_client_gets() -> None:
    names = [request.request_id for request in requests(n=2)]
    assert len(set(names)) == 6
    assert not set(names) & {f"{call_id}-{number}" for call_id in "ct" for number in range(4)}
