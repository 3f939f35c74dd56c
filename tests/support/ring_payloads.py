"""Payloads for a ring in which every byte depends on the payload's number, so that a wrong or torn one is noticed."""

from __future__ import annotations

LAYOUT = "00c0ffee00c0ffee"


def payload_of(number: int) -> bytes:
    """The payload of a record's number; lengths vary and are seldom whole words."""
    length = 8 + number * 7919 % 300
    return (number.to_bytes(8, "little") * 40)[:length]


def number_of(payload: bytes) -> int:
    """The number of a payload; AssertionError if it is not exactly what `payload_of` gives."""
    number = int.from_bytes(payload[:8], "little")
    assert payload == payload_of(number), "a wrong record"
    return number
