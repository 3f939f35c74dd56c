"""What tools mean for a request: for its prompt, for the grammar of its answer, and for reading that.

    turns = turns_of(body.messages, tools, tokenizer)    # for the chat template
    use = tool_use(body, tokenizer)              # None: nothing can be called
    use.grammar, use.reader()

Leaves out the fields and their range (tool_fields.py), and how models write calls (tool_calls/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aurora_lit.errors import RequestError
from aurora_lit.grammars.definition import Fault, fault_of
from aurora_lit.models.tokenizer import Tokenizer, added_ids, special_ids
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.serve.http.message_fields import Message
from aurora_lit.serve.http.schema import ChatRequest
from aurora_lit.serve.http.tool_fields import NamedTool, Tool
from aurora_lit.tool_calls.formats import ToolFormat, Turn, format_of, without_template
from aurora_lit.tool_calls.grammar import ANY_OBJECT, grammar_of_calls
from aurora_lit.tool_calls.parser import ToolCallReader

MAX_SCHEMA_CHARACTERS = 1 << 19
"""Of the tools that calls must be valid for, together: 128 schemas of 4,096, or four of the longest. Many properties of
this length take one to two seconds to compile, and several times as many a time that grows faster."""

_COMBINING = ("allOf", "anyOf", "oneOf")
"""Keywords of JSON schemas whose value is a list of schemas for the same value."""


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """How an answer calls tools."""

    format: ToolFormat
    names: frozenset[str]
    only_one: bool
    only_calls: bool
    """The answer is calls and nothing else."""
    reads_bare: bool
    """Calls without the format's marker are read too."""
    grammar: StructuredOutputsParams | None
    """What the answer must be; None: the model decides."""
    shows_special_tokens: bool
    """The answer's text needs them, since one of them begins a call."""

    def reader(self) -> ToolCallReader:
        """For one answer."""
        return ToolCallReader(
            self.format,
            names=self.names,
            only_one=self.only_one,
            only_calls=self.only_calls,
            reads_bare=self.reads_bare,
        )


def turns_of(messages: Sequence[Message], tools: Sequence[Tool], tokenizer: Tokenizer) -> list[Turn]:
    """The conversation as chat templates expect it; with the tools, if the template has none."""
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    turns = [_turn(message, names) for message in messages]
    if _format(tokenizer).is_in_template:
        return turns
    return without_template(turns, template_tools(tools))


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def tool_use(body: ChatRequest, tokenizer: Tokenizer, *, reads_calls: bool = True) -> ToolUse | None:
    """How the answer to a request may call tools.

    reads_calls: see `prepare_chat`. Raises RequestError for a schema that cannot be used, and for calls that cannot be
    read.
    """
    if not body.callable_tools:
        return None
    format_ = _format(tokenizer)
    content = body.structure
    if reads_calls and format_.unread_form and not body.needs_grammar and content is None:
        raise RequestError(
            f"tools: this model writes calls as {format_.unread_form}, which is not read; send "
            'tool_choice="required", with which it writes JSON',
            param="tools",
        )
    only_one = body.may_call_once or format_.one_call
    special_of, added_of = special_ids(tokenizer), added_ids(tokenizer)
    of_tokenizer = {tokenizer.convert_ids_to_tokens(i): i for i in special_of | added_of}
    signs = {sign: of_tokenizer[sign] for sign in format_.signs if sign in of_tokenizer}
    special = {sign: token for sign, token in signs.items() if token in special_of}
    grammar = None
    if body.needs_grammar or content is not None:
        content_schema: Mapping[str, Any] | None = None
        if content is not None:
            content_schema = ANY_OBJECT if content[1].json is None else json.loads(str(content[1].json))
        grammar = StructuredOutputsParams(
            grammar=grammar_of_calls(
                format_,
                _schemas(body),
                must_call=body.must_call,
                only_one=only_one,
                content_schema=content_schema,
                special=special,
                tokens={sign: token for sign, token in signs.items() if sign not in special},
            )
        )
    return ToolUse(
        format=format_,
        names=frozenset(tool.function.name for tool in body.callable_tools),
        only_one=only_one,
        only_calls=body.must_call,
        reads_bare=format_.bare_calls and content is None and not body.must_call,
        grammar=grammar,
        shows_special_tokens=bool(special),
    )


def _format(tokenizer: Tokenizer) -> ToolFormat:
    return format_of(str(tokenizer.chat_template or ""))  # of several templates, as a dictionary, the one with tools


def _arguments(text: str) -> Any:
    """Of a call in an earlier turn: the object that a template expects; text that is none as it is.

    Answers may contain such: a model decides what it writes, and `max_tokens` cuts calls off.
    """
    try:
        arguments = json.loads(text or "{}")  # without text: as some servers stream a call without arguments
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def _turn(message: Message, names: Mapping[str, str]) -> Turn:
    """names: of the functions that were called, by the call's id."""
    role = "system" if message.role == "developer" else message.role
    turn: Turn = {"role": role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.name:
        turn["name"] = message.name
    if message.role == "tool":
        called = message.tool_call_id or ""
        turn |= {"tool_call_id": called, "name": message.name or names.get(called, "")}
    return turn


def _names_more(schema: Mapping[str, Any]) -> bool:
    """True if `required` or other schemas at the root may name arguments that its `properties` do not."""
    known, parts = schema["properties"], [{"required": schema.get("required")}]
    for name in _COMBINING:
        parts += schema[name] if isinstance(schema.get(name), list) else []
    for part in filter(lambda part: isinstance(part, dict), parts):
        if part.keys() & {"$ref", "patternProperties", "additionalProperties", *_COMBINING}:
            return True
        for names in (part.get("properties"), part.get("required")):
            if isinstance(names, (dict, list)) and any(isinstance(name, str) and name not in known for name in names):
                return True
    return "$ref" in schema


def _schemas(body: ChatRequest) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool's arguments; that of any object where none is promised and its own cannot be used."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    schemas: dict[str, Mapping[str, Any]] = {}
    num_characters = 0
    for index, tool in enumerate(body.callable_tools):
        function = tool.function
        if named not in (None, function.name):
            continue
        schema = function.parameters or ANY_OBJECT
        # A function takes the arguments that it names.
        if isinstance(schema.get("properties"), dict) and not _names_more(schema):
            schema = {"additionalProperties": False, **schema}
        kind = schema.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            fault: Fault | None = Fault(".type", 'a function takes an object of arguments; use type "object"')
        else:
            schema = {**schema, "type": "object"}  # not null, nor anything where no type is named
            text = json.dumps(schema)
            num_characters += len(text)
            if num_characters > MAX_SCHEMA_CHARACTERS:  # before they are compiled, one by one and together
                raise RequestError(
                    f"tools: their parameters have more than {MAX_SCHEMA_CHARACTERS} characters together; send fewer "
                    "or shorter ones where calls have to be valid",
                    param="tools",
                    code="invalid_value",
                )
            fault = fault_of(StructuredOutputsParams(json=text))
        if fault is not None and (body.must_call or function.strict):
            where = f"tools[{index}].function.parameters{fault.place}"
            raise RequestError(f"{where} cannot be used: {fault.reason}", param=where, code="invalid_value")
        schemas[function.name] = ANY_OBJECT if fault is not None else schema
    return schemas
