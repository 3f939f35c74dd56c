"""Two requests share a part of the memory only if scope, salt and client allow it, whatever they are."""

from __future__ import annotations

from typing import Literal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aurora_lit.request import Request, SamplingParams
from aurora_lit.serve.sequences.memory_scope import MemoryPartition, memory_partition_key

Scope = Literal["domain", "client", "off"]
WORDS = st.sampled_from(["", "a", "b", "ab", "0", "é"])
"""Few and similar ones, so that two requests often agree in some fields, and fields are equal to each other's."""
NAMES = st.one_of(WORDS, st.text(max_size=8))
SCOPES: st.SearchStrategy[Scope] = st.sampled_from(["domain", "client", "off"])


def request(salt: str = "", client: str = "", *, label: str = "", store: bool = True) -> Request:
    params = SamplingParams(max_tokens=1)
    return Request(
        request_id="r", prompt_ids=(1,), params=params, store=store, domain=label, client=client, cache_salt=salt
    )


REQUESTS = st.builds(request, NAMES, NAMES, label=NAMES, store=st.booleans())


@settings(deadline=None, max_examples=2000)
@given(one=REQUESTS, other=REQUESTS, scopes=st.tuples(SCOPES, SCOPES))
@example(one=request("a", "b"), other=request("b", "a"), scopes=("client", "client"))
@example(one=request("", "a"), other=request("a", ""), scopes=("client", "domain"))
@example(one=request("ab", "c"), other=request("a", "bc"), scopes=("client", "client"))
def test_a_shared_key_means_equal_scope_salt_and_client(
    one: Request, other: Request, scopes: tuple[Scope, Scope]
) -> None:
    first, second = (
        memory_partition_key(request, scope=scope) for request, scope in zip((one, other), scopes, strict=True)
    )
    allowed = (
        scopes[0] == scopes[1] != "off"
        and one.cache_salt == other.cache_salt
        and (scopes[0] == "domain" or one.client == other.client != "")
    )
    assert (first is not None and first == second) == allowed


@given(one=REQUESTS, scope=SCOPES)
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
