"""What all request bodies share: unknown fields are refused, known ones whose value means "not used" are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticKnownError

from aurora_lit.errors import RequestError

MAX_FIELDS = 256
"""Of one object, known or not. A body may have millions, and each unknown one would be an error of its own."""


class Strict(BaseModel):
    """A body, or a part of one: no unknown fields, no values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise RequestError(
                f"body: an object has {len(body)} fields; send at most {MAX_FIELDS}, and none that is not supported",
                param="body",
            )
        return body


def is_text(value: str) -> bool:
    """False for half of a surrogate pair, which JSON may hold and no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


NO_TEXT = "half of a surrogate pair is no text; send whole characters"


def _check_text(value: str) -> str:
    if not is_text(value):
        raise ValueError(NO_TEXT)
    return value


WholeText = Annotated[str, AfterValidator(_check_text)]
"""A text that a tokenizer can read."""


def at_most(num_entries: int) -> BeforeValidator:
    """For a map whose keys are the client's: pydantic checks all entries before it counts them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > num_entries:
            raise PydanticKnownError(
                "too_long", {"field_type": "Dictionary", "max_length": num_entries, "actual_length": len(value)}
            )
        return value

    return BeforeValidator(check)


def drop_neutral(body: Any, neutral: Mapping[str, tuple[Any, ...]], *, inside: str = "") -> Any:
    """`body` without the fields in `neutral`. Raises RequestError if one of them has a value with an effect."""
    if not isinstance(body, dict) or len(body) > MAX_FIELDS:  # refused by `Strict`, which looks at it later
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
