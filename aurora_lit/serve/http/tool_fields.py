"""The fields of OpenAI's API for tools: those that a request may call, and calls and results in a conversation.

Leaves out how a model writes calls (tool_calls/) and what tools mean for prompt and answer (serve/http/tool_use.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict, shorten

MAX_TOOLS = 128
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that a model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None: any object."""
    strict: bool | None = None
    """True: calls of it are valid whatever `tool_choice` is."""


class Tool(Strict):
    """A tool; there are none but functions."""

    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionName(Strict):
    """The name of a function."""

    name: ToolName


class NamedTool(Strict):
    """A `tool_choice` that names the function to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """A call in an earlier turn: a function and its arguments."""

    name: str
    arguments: str
    """The text of a JSON object, unless an answer's call was broken or cut off."""
    parsed_arguments: Any = None
    """What openai's parse() read from them, and sends back; without effect."""


class CalledTool(Strict):
    """A call in an earlier turn, as answers have it."""

    id: str
    type: Literal["function"] | None = None
    function: CalledFunction
    index: int | None = None
    """Of a streamed call; some clients send it back."""


class ToolChoosing(Strict):
    """The fields of a request that say which tools may, and which must, be called."""

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> ToolChoosing:
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if twice is not None:
            raise RequestError(f"tools has {twice} twice; give each function its own name", param="tools")
        if self.must_call and not names:
            raise RequestError("tool_choice asks for a call, but there are no tools; send tools", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise RequestError(
                f"tool_choice: {shorten(self.tool_choice.function.name)} is none of the tools; use one of "
                f"{', '.join(names)}",
                param="tool_choice",
            )
        return self

    @property
    def must_call(self) -> bool:
        """True if an answer has to call a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call; none with `tool_choice: none`."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def may_call_once(self) -> bool:
        """True if an answer has at most one call."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    @property
    def needs_grammar(self) -> bool:
        """True if calls have to be valid: one is required, or a tool is strict."""
        return self.must_call or any(tool.function.strict for tool in self.callable_tools)
