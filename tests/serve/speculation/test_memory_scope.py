"""Two requests share a part of the memory only if scope, salt and client allow it, whatever they are."""

from __future__ import annotations

import itertools
from typing import Literal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.speculation.traffic_memory import MemoryPartition, memory_partition_key

Scope = Literal["domain", "client", "off"]
WORDS = ("", "a", "b", "ab", "0", "é")
"""Few and similar ones, so that two requests often agree in some fields, and fields are equal to each other's."""
NAMES = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
SCOPES: tuple[Scope, ...] = ("domain", "client", "off")
Key = MemoryPartition | None


def request(salt: str = "", client: str = "", *, label: str = "", store: bool = True) -> Request:
    params = SamplingParams(max_tokens=1)
    return Request(
        request_id="r", prompt_ids=(1,), params=params, store=store, domain=label, client=client, cache_salt=salt
    )


REQUESTS = st.builds(request, NAMES, NAMES, label=NAMES, store=st.booleans())


def check_shared_key(one: Request, other: Request, scopes: tuple[Scope, Scope], keys: tuple[Key, Key]) -> None:
    allowed = (
        scopes[0] == scopes[1] != "off"
        and one.cache_salt == other.cache_salt
        and (scopes[0] == "domain" or one.client == other.client != "")
    )
    assert (keys[0] is not None and keys[0] == keys[1]) == allowed, (one, other, scopes)


def test_a_shared_key_means_equal_scope_salt_and_client() -> None:
    """Every pair of requests with the words above as salt and client."""
    every = [
        (asked, scope, memory_partition_key(asked, scope=scope))
        for scope in SCOPES
        for salt, client in itertools.product(WORDS, WORDS)
        for asked in (request(salt, client), request(salt, client, label="a", store=False))
    ]
    for (one, scope, key), (other, other_scope, other_key) in itertools.product(every, every):
        check_shared_key(one, other, (scope, other_scope), (key, other_key))


@settings(deadline=None, max_examples=60)
@given(one=REQUESTS, other=REQUESTS, scopes=st.tuples(st.sampled_from(SCOPES), st.sampled_from(SCOPES)))
@example(one=request("a", "b"), other=request("b", "a"), scopes=("client", "client"))
@example(one=request("", "a"), other=request("a", ""), scopes=("client", "domain"))
@example(one=request("ab", "c"), other=request("a", "bc"), scopes=("client", "client"))
def test_any_other_words_make_keys_likewise(one: Request, other: Request, scopes: tuple[Scope, Scope]) -> None:
    first, second = memory_partition_key(one, scope=scopes[0]), memory_partition_key(other, scope=scopes[1])
    check_shared_key(one, other, scopes, (first, second))


@settings(deadline=None, max_examples=30)
@given(one=REQUESTS, scope=st.sampled_from(SCOPES))
def test_neither_opting_out_nor_the_clients_label_changes_what_may_be_read(one: Request, scope: Scope) -> None:
    """`store` is the writer's to check, and a domain only decides what comes first."""
    plain = request(one.cache_salt, one.client)
    assert memory_partition_key(one, scope=scope) == memory_partition_key(plain, scope=scope)


def test_the_keys_of_each_scope() -> None:
    salted = request("salt", "client")
    assert memory_partition_key(salted, scope="off") is None
    assert memory_partition_key(salted, scope="domain") == MemoryPartition("", "salt")
    assert memory_partition_key(salted, scope="client") == ("client", "salt")


def test_an_unknown_client_has_no_memory_of_its_own() -> None:
    assert memory_partition_key(request("salt", ""), scope="client") is None
    assert memory_partition_key(request("salt", ""), scope="domain") is not None
