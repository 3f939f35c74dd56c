"""Two requests share prefixes and remembered answers only if scope, salt and client allow it, whatever they are."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from aurora_lit.request import Client, Request, SamplingParams, Scope, SharedBy

WORDS = ("", "a", "b", "ab", "0", "é")
"""Few and similar ones, so that two requests often agree in some fields, and fields are equal to each other's."""
NAMES = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
SHARED_BY: tuple[SharedBy, ...] = ("domain", "client")


def request(salt: str = "", client: str = "", *, label: str = "", store: bool = True) -> Request:
    params = SamplingParams(max_tokens=1)
    return Request(
        request_id="r",
        prompt_ids=(1,),
        params=params,
        store=store,
        domain=label,
        client=Client(client, "source"),
        cache_salt=salt,
    )


REQUESTS = st.builds(request, NAMES, NAMES, label=NAMES, store=st.booleans())


def check_scopes(one: Request, other: Request, shared_by: SharedBy) -> None:
    scope, allowed = one.scope(shared_by), one.cache_salt == other.cache_salt
    if shared_by == "client":
        allowed = allowed and one.client.name == other.client.name != ""
    assert (scope is not None and scope == other.scope(shared_by)) == allowed, (one, other, shared_by)


def test_one_scope_means_equal_salt_and_client() -> None:
    """Every pair of requests with the words above as salt and client, under one setting."""
    every = [
        asked
        for salt, client in itertools.product(WORDS, WORDS)
        for asked in (request(salt, client), request(salt, client, label="a", store=False))
    ]
    for (one, other), by in itertools.product(itertools.product(every, every), SHARED_BY):
        check_scopes(one, other, by)


@settings(deadline=None, max_examples=60)
@given(one=REQUESTS, other=REQUESTS, shared_by=st.sampled_from(SHARED_BY))
@example(one=request("a", "b"), other=request("b", "a"), shared_by="client")
@example(one=request("ab", "c"), other=request("a", "bc"), shared_by="client")
def test_any_other_words_make_scopes_likewise(one: Request, other: Request, shared_by: SharedBy) -> None:
    check_scopes(one, other, shared_by)


@settings(deadline=None, max_examples=30)
@given(one=REQUESTS, shared_by=st.sampled_from(SHARED_BY))
def test_neither_opting_out_nor_the_clients_label_changes_what_may_be_read(one: Request, shared_by: SharedBy) -> None:
    """`store` is the writer's to check, and a domain only decides what comes first."""
    assert one.scope(shared_by) == request(one.cache_salt, one.client.name).scope(shared_by)


def test_the_scopes_of_a_request() -> None:
    salted = request("salt", "client")
    assert salted.scope("domain") == Scope(client="", salt="salt")
    assert salted.scope("client") == ("client", "salt")


def test_an_unknown_client_shares_nothing_by_client() -> None:
    assert request("salt", "").scope("client") is None
    assert request("salt", "").scope("domain") is not None
