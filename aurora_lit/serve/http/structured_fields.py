"""The fields that ask for structured outputs, in OpenAI's form, in vLLM's, and in vLLM's older one.

Leaves out whether a grammar can be used (grammars/definition.py, which serve/http/tokenize.py asks).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.serve.http.body import Strict, drop_neutral

MAX_CHOICE_TEXTS = 4096
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)]

NEUTRAL_IN_STRUCTURE: Mapping[str, tuple[Any, ...]] = {
    "disable_additional_properties": (None, False),
    "disable_any_whitespace": (None, False),
    "disable_fallback": (None, False, True),
    "structural_tag": (None,),
    "whitespace_pattern": (None,),
}
"""Fields of `structured_outputs` that clients send, with the values that have no effect."""


class JSONSchemaFormat(Strict):
    """A named schema; `strict: false` is served as `true`."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's form of structured outputs."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError(
                'response_format: send json_schema with type="json_schema", and only with it', param="response_format"
            )
        return self


class StructuredOutputs(Strict):
    """vLLM's form of structured outputs."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: Any) -> Any:
        return drop_neutral(body, NEUTRAL_IN_STRUCTURE, inside="structured_outputs")


class Structured(Strict):
    """The fields of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _check_structure(self) -> Structured:
        asked = self._structures()
        if self.structured_outputs is not None and not any(place.startswith("structured_outputs") for place in asked):
            raise RequestError(
                "structured_outputs is empty; send one of json, regex, choice, grammar, json_object",
                param="structured_outputs",
            )
        if len(asked) > 1:
            second = list(asked)[1]
            raise RequestError(
                f"{second} and {next(iter(asked))} ask for two structures; send one of them",
                param=second.split(".")[0],
            )
        return self

    def _structures(self) -> dict[str, StructuredOutputsParams]:
        """What the answer must be, by the field that asks for it."""
        found: dict[str, dict[str, Any]] = {}
        format_, ours = self.response_format, self.structured_outputs
        if format_ is not None and format_.json_schema is not None:
            found["response_format.json_schema.schema"] = {"json": format_.json_schema.schema_}
        elif format_ is not None and format_.type == "json_object":
            found["response_format"] = {"json_object": True}
        for name in ("json", "regex", "choice", "grammar", "json_object"):
            value = None if ours is None else getattr(ours, "json_" if name == "json" else name)
            if value is not None and value is not False:
                found[f"structured_outputs.{name}"] = {name: value}
            value = getattr(self, f"guided_{name}", None)
            if value is not None:
                found[f"guided_{name}"] = {name: value}
        return {place: _structure(**asked) for place, asked in found.items()}

    @cached_property  # a schema becomes text once
    def structure(self) -> tuple[str, StructuredOutputsParams] | None:
        """What the answer must be, and the field that asks for it."""
        return next(iter(self._structures().items()), None)


def _structure(**asked: Any) -> StructuredOutputsParams:
    """As the engine reads it: a schema is text, since JSON has numbers that messages have not."""
    if isinstance(asked.get("json"), dict):
        asked["json"] = json.dumps(asked["json"])
    if "choice" in asked:
        asked["choice"] = tuple(asked["choice"])
    return StructuredOutputsParams(**asked)
