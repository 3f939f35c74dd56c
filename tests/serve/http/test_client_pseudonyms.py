"""Pseudonyms distinguish clients without revealing their names."""

from __future__ import annotations

from aurora_lit.serve.http.routes import ClientPseudonyms


def test_pseudonyms_distinguish_clients_by_user_then_by_address_and_reveal_nothing() -> None:
    pseudonyms = ClientPseudonyms()
    ann = pseudonyms.of(user="ann@example.org", address="10.0.0.7")
    assert ann == pseudonyms.of(user="ann@example.org", address="10.0.0.8")
    others = [
        pseudonyms.of(user="bob", address="10.0.0.7"),
        pseudonyms.of(user=None, address="10.0.0.7"),
        pseudonyms.of(user="", address="10.0.0.8"),
        pseudonyms.of(user="10.0.0.7", address=None),
    ]
    assert len({ann, *others}) == 5
    assert pseudonyms.of(user=None, address=None) == ""
    assert pseudonyms.of(user="\ud800", address=None)
    assert ann != ClientPseudonyms().of(user="ann@example.org", address=None), "another server, another key"
    assert len(ann) == 16
    assert int(ann, 16) >= 0
