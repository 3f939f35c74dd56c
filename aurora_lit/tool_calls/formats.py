"""How models write tool calls, and how a model whose chat template has no tools is told of them.

    format_ = format_of(chat_template)
    if not format_.is_in_template:
        turns = without_template(turns, tools)        # for the template, which knows plain turns only
    format_.written([ToolCall("get_weather", '{"city": "Rome"}')])

Turns and tools are those of OpenAI's API, as dictionaries. Leaves out reading an answer (parser.py).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

Turn = dict[str, Any]


class ToolCall(NamedTuple):
    """One call."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls: before + call + between + call … + after."""

    name: str
    before: str = ""
    between: str = "\n"
    after: str = ""
    arguments_key: str = "arguments"
    marker: str = ""
    """What `before` begins with and no other text has, so that calls may follow content; "": an answer whose first
    character is a brace is a call."""
    fillers: tuple[str, ...] = ()
    """What stands around calls besides white space."""
    name_end: str = ""
    """Where the name stands before the arguments instead of inside an object: what ends it."""
    id_begin: str = ""
    """What may follow such a name: the model's own id of the call, begun by this, which is not used."""
    is_in_template: bool = True
    unread_form: str = ""
    """How calls look that the template teaches instead, and that are not read; "": there are none."""
    one_call: bool = False
    """A turn has at most one call: the template refuses more."""
    short_ids: bool = False
    """Ids of calls have nine letters and digits, the only ones that the template takes."""
    bare_calls: bool = False
    """Calls are read without the marker too, if the answer has no grammar: Qwen2.5-Coder leaves it out or writes a code
    block instead."""

    def call_parts(self, name: str) -> tuple[str, str]:
        """What a call has before its arguments, and after them."""
        if self.name_end:
            return name + self.name_end, ""
        return f'{{"name": {json.dumps(name)}, "{self.arguments_key}": ', "}"

    @property
    def signs(self) -> tuple[str, ...]:
        """What may be special tokens in some tokenizers."""
        return tuple(filter(None, (self.marker, self.name_end, *self.fillers)))

    def new_id(self) -> str:
        """The id of a new call."""
        return secrets.token_hex(5)[:9] if self.short_ids else f"call_{secrets.token_hex(12)}"

    def written(self, calls: Sequence[ToolCall]) -> str:
        """The calls as the model writes them."""
        texts = []
        for call in calls:
            head, tail = self.call_parts(call.name)
            texts.append(head + call.arguments + tail)
        return self.before + self.between.join(texts) + self.after


HERMES = ToolFormat(
    name="hermes",
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
    marker="<tool_call>",
    fillers=("</tool_call>", "<tool_call>", "[", "]", ","),
    bare_calls=True,
)
MISTRAL = ToolFormat(
    name="mistral",
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
    marker="[TOOL_CALLS]",
    fillers=("[TOOL_CALLS]", "[", "]", ","),
    short_ids=True,
)
MISTRAL_NAMED = ToolFormat(
    name="mistral-named",
    before="[TOOL_CALLS]",
    between="[TOOL_CALLS]",
    marker="[TOOL_CALLS]",
    fillers=("[TOOL_CALLS]",),
    name_end="[ARGS]",
    id_begin="[CALL_ID]",
    short_ids=True,
)
LLAMA3 = ToolFormat(
    name="llama3", between="; ", arguments_key="parameters", fillers=("<|python_tag|>", "[", "]", ",", ";")
)
PLAIN = ToolFormat(name="plain", fillers=("[", "]", ",", ";"), is_in_template=False)

_UNREAD_FORMS = (
    *("<function=", "<arg_key>", "<invoke name=", "<|channel|>commentary", "to=functions", "<|tool_call>call:"),
    *("<｜tool▁call▁begin｜>", "<|tool_call_begin|>", "<|tool_call_start|>"),
    *("<TOOLCALL>", "<tool_calls>", "<|START_ACTION|>"),
)
"""What begins calls that are not read. No template whose calls are read contains any of these."""

_REFUSES_MORE_CALLS = "only supports single tool-calls at once"
"""In templates of Llama 3.1 to 3.3, the error for a turn with several calls."""


@lru_cache(maxsize=8)
def format_of(chat_template: str) -> ToolFormat:
    """The format that a chat template teaches."""
    if not re.search(r"\btools\b", chat_template):
        return PLAIN
    unread = next((form for form in _UNREAD_FORMS if form in chat_template), "")
    return replace(_nearest_format(chat_template), unread_form=unread, one_call=_REFUSES_MORE_CALLS in chat_template)


def _nearest_format(chat_template: str) -> ToolFormat:
    """The format of a template with tools; the one that comes nearest, if its own is not read."""
    if "[TOOL_CALLS]" in chat_template:
        return MISTRAL_NAMED if "[ARGS]" in chat_template else MISTRAL
    if "<tool_call>" in chat_template:
        return HERMES
    if "<|python_tag|>" in chat_template or '"parameters"' in chat_template:
        return LLAMA3
    return replace(PLAIN, is_in_template=True)


def in_first_user_turn(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation without its system turn, whose text begins the first user's: for templates that know none.

    As it is if it has no system turn, or none of a user after it.
    """
    if len(turns) < 2 or [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return list(turns)
    system, user, *rest = turns
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _text(arguments: Any) -> str:
    """As the model wrote them, or nearly so; those that are no object are text already."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def without_template(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The conversation in turns of system, user and assistant: tools in the first one, calls and results as text."""
    plain: list[Turn] = []
    for turn in turns:
        content, calls, is_result = turn["content"], turn.get("tool_calls"), turn["role"] == "tool"
        if calls:
            functions = [call["function"] for call in calls]
            written = PLAIN.written([ToolCall(each["name"], _text(each["arguments"])) for each in functions])
            content = f"{content}\n{written}" if content else written
        elif is_result:
            content = f"Result of {turn.get('name') or 'the function'}: {content}"
        if is_result and plain and plain[-1]["role"] == "user":
            plain[-1]["content"] += f"\n{content}"  # of parallel calls: templates may refuse two turns of one role
        else:
            named = {"name": turn["name"]} if "name" in turn and not is_result else {}
            plain.append({"role": "user" if is_result else turn["role"], "content": content, **named})
    if not tools:
        return plain
    told = _told(tools)
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _told(tools: Sequence[Mapping[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = '{"name": <name of the function>, "arguments": <JSON object of its arguments>}'
    return (
        f"You may call functions to help the user. These are the functions:\n{listed}\n"
        f"To call one, answer with nothing but {example}, one such line for each call. "
        "Their results are sent to you by the user. If no function is needed, answer as usual."
    )
