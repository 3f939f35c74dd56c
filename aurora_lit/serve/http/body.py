"""What all request bodies share: unknown fields are refused, known ones whose value means "not used" are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from aurora_lit.errors import RequestError


class Strict(BaseModel):
    """A body, or a part of one: no unknown fields, no values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def drop_neutral(body: Any, neutral: Mapping[str, tuple[Any, ...]], *, inside: str = "") -> Any:
    """`body` without the fields in `neutral`. Raises RequestError if one of them has a value with an effect."""
    if not isinstance(body, dict):
        return body
    for name in neutral.keys() & body.keys():
        allowed = neutral[name]
        # Compare types too: in Python, 1 == True and 0 == False.
        if not any(type(body[name]) is type(value) and body[name] == value for value in allowed):
            where = f"{inside}.{name}" if inside else name
            raise RequestError(
                f"{where}={shorten(body[name])} is not supported; leave it out",
                param=where,
                code="unsupported_parameter",
            )
    return {name: value for name, value in body.items() if name not in neutral}


def shorten(value: object) -> str:
    """A value for an error message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
