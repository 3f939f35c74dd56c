"""The fields of a conversation: its messages, and how its prompt is rendered.

Leaves out the chat template (serve/http/tokenize.py) and what calls in a message mean for it (serve/http/tool_use.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, drop_neutral, shorten
from aurora_lit.serve.http.tool_fields import CalledTool

MAX_MESSAGES = 4096
NEUTRAL_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "type": (None, "text"),
}
"""Fields of other servers, with the values that have no effect: clients send back messages as they received them, and
lm_eval adds a type to each."""

_RESERVED_VARIABLES = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length")
    + ("messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize")
    + ("tokenizer_kwargs", "tools", "truncation")
)
"""Names in `chat_template_kwargs` that are no variables of a template, or are set by other fields."""


class TextPart(Strict):
    """One text part of a message."""

    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    content: Annotated[str | TextParts | None, Field(validate_default=True)] = None
    parsed: Any = None
    """What openai's parse() read from an answer. It has no effect: the client sends it back with the answer."""
    provider_specific_fields: Any = None
    """LiteLLM's, likewise."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, body: Any) -> Any:
        drop_neutral(body, {"reasoning_effort": (None, "none")})  # other efforts are refused as those fields are
        return drop_neutral(body, NEUTRAL_IN_MESSAGE, inside="messages")

    @field_validator("tool_calls", "tool_call_id")
    @classmethod
    def _check_role(cls, value: Any, info: ValidationInfo) -> Any:
        role = "assistant" if info.field_name == "tool_calls" else "tool"
        if value and info.data.get("role") != role:
            raise ValueError(f"is only for role {role}; leave it out")
        return value

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("may be left out only where an assistant has tool_calls; send a text")
        return value

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by line breaks."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


def _drop_neutral_in_each(messages: Any) -> Any:
    """As each message does itself, but a fault has the number of its message."""
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        return messages
    return [
        drop_neutral(message, NEUTRAL_IN_MESSAGE, inside=f"messages[{index}]") for index, message in enumerate(messages)
    ]


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_drop_neutral_in_each),
]


class Templated(Strict):
    """The fields of a conversation that say how its prompt is rendered."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_template_fields(self) -> Templated:
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise RequestError(
                "continue_final_message=true needs add_generation_prompt=false, since no new turn begins",
                param="continue_final_message",
            )
        for name in self.chat_template_kwargs or ():
            if name in _RESERVED_VARIABLES or not name.isidentifier():
                raise RequestError(
                    f"chat_template_kwargs: {shorten(name)} is no variable that may be set; leave it out",
                    param="chat_template_kwargs",
                )
        return self

    @property
    def template_options(self) -> dict[str, Any]:
        """Arguments of `Tokenizer.apply_chat_template`."""
        return {
            **(self.chat_template_kwargs or {}),
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": bool(self.continue_final_message),
        }
