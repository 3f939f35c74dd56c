"""Inputs of fuzzers that are almost right: bytes with bytes changed, JSON with a value changed, both in one file."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

_NUMBERS = [0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
DEEP: Any = json.loads(400 * "[" + 400 * "]")
ODD: list[Any] = [
    *(None, True, False, -1, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -(2**63), 10**400, *_NUMBERS),
    *("", " ", "x", "\0", "é", "\ud800", "1e999", "9" * 30, "../x", "[]", "null", "NaN", "F32", "BF16", "I8"),
    *([], {}, [0], [None], [-1, 2**63], [[[]]], {"": 0}, {"x": []}, DEEP),
]
_NAMES = ["x", "", "type", "__metadata__", "\ud800", "a.b", "n" * 3000]


def odd_values() -> st.SearchStrategy[Any]:
    """Values that a field is replaced by; their own copies, which may be changed."""
    return st.sampled_from(ODD).map(lambda value: json.loads(json.dumps(value)))


def _positions(length: int) -> st.SearchStrategy[int]:
    """Of a byte; half of them in a header, where most can go wrong."""
    return st.one_of(st.integers(0, max(0, min(length, 256) - 1)), st.integers(0, max(0, length - 1)))


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes, with one to four changes: a byte, a number, some bytes more or fewer, or the end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(_positions(len(changed)))
        kind = draw(st.sampled_from(["byte", "number", "more", "fewer", "copy", "end"]))
        if kind == "byte":
            changed[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            size = draw(st.sampled_from([2, 4, 8]))
            changed[at : at + size] = (draw(st.sampled_from(_NUMBERS)) % 256**size).to_bytes(size, "little")
        elif kind == "more":
            changed[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "fewer":
            del changed[at : at + draw(st.integers(1, 32))]
        elif kind == "copy":
            start = draw(_positions(len(changed)))
            changed[at:at] = changed[start : start + draw(st.integers(1, 64))]
        else:
            del changed[at:]
    return bytes(changed)


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> Any:
    """The value, with one to three of its parts replaced, left out or added."""
    whole = {"": json.loads(json.dumps(value))}
    for _ in range(draw(st.integers(1, 3))):
        places = _places(whole)
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "leave out", "add", "as text"]))
        if kind == "leave out" and parent is not whole:
            del parent[key]
        elif kind == "add" and isinstance(parent[key], (dict, list)):
            new = draw(odd_values())
            if isinstance(parent[key], dict):
                parent[key][draw(st.sampled_from(_NAMES))] = new
            else:
                parent[key].append(new)
        elif kind == "as text":
            parent[key] = json.dumps(draw(odd_values()))
        else:
            parent[key] = draw(odd_values())
    return whole[""]


def _places(whole: Any) -> list[tuple[Any, Any]]:
    """Every part of a JSON value, as the container that holds it and its key there; not far down."""
    found, level = list[tuple[Any, Any]](), [whole]
    for _ in range(6):
        inner = []
        for container in level:
            keys = list(container) if isinstance(container, dict) else range(len(container))
            found += [(container, key) for key in keys]
            inner += [container[key] for key in keys if isinstance(container[key], (dict, list))]
        level = inner
    return found


def mutated_header(content: bytes) -> st.SearchStrategy[bytes]:
    """A file in the format of safetensors with a part of its header replaced, or bytes anywhere."""
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    def joined(changed: Any) -> bytes:
        text = json.dumps(changed).encode(errors="surrogatepass")
        return len(text).to_bytes(8, "little") + text + rest

    return st.one_of(mutated_json(header).map(joined), mutated_bytes(content))
