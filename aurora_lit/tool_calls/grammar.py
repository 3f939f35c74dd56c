"""The grammar of an answer that must call tools, or whose calls must be valid, in llguidance's Lark dialect.

    grammar = grammar_of_calls(HERMES, tools, must_call=True, only_one=False, content_schema=None, special={})
    StructuredOutputsParams(grammar=grammar)

Leaves out when a request needs one (serve/http/tool_fields.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from aurora_lit.grammars.definition import WRITTEN_AS, without_idle_keywords
from aurora_lit.tool_calls.formats import ToolFormat

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
_JSON_PIECES = re.compile(r'"[^"]*"|[{}]|[:,] ')
_TEXT = r"(.|\n)*"
MAX_CALLS = 16
"""Of an answer: a small model that may go on with another call does so until its tokens are used up."""


def grammar_of_calls(
    format_: ToolFormat,
    schemas: Mapping[str, Schema],
    *,
    must_call: bool,
    only_one: bool,
    content_schema: Schema | None = None,
    special: Mapping[str, int] = MappingProxyType({}),
    tokens: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """The grammar of an answer.

    schemas: of the arguments, by the tool's name. must_call: an answer without a call is none. only_one: at most one
    call. content_schema: of an answer without calls; None: any text. special: ids of the special tokens among the
    format's signs, by their texts; the other signs are text. tokens: of signs that are a token each, but text too: the
    model chooses, since Qwen2.5-Coder repeats calls for ever after a `</tool_call>` that was not trained.
    """
    signs = re.compile("|".join(f"({re.escape(sign)})" for sign in (*special, *tokens)) or "(?!)")

    def literal(text: str) -> str:
        """Text in which tokens stand for their signs."""
        made = ""
        for piece in filter(None, signs.split(text)):
            if piece in special:
                made += f"<[{special[piece]}]> "
            else:
                made += f"(<[{tokens[piece]}]> | {json.dumps(piece)}) " if piece in tokens else f"{json.dumps(piece)} "
        return made

    rules, names = [], []
    for number, (name, schema) in enumerate(schemas.items()):
        head, tail = format_.call_parts(name)
        # In the pieces that JSON schemas are made of: llguidance cannot tell a longer one from content that is JSON.
        begin = " ".join(map(literal, [head] if format_.name_end else _JSON_PIECES.findall(head)))
        rules.append(f"call_{number}: {begin} %json {_as_json(schema)} {literal(tail)}")
        names.append(f"call_{number}")
    more = "" if only_one else f" ({literal(format_.between)} call){{0,{MAX_CALLS - 1}}}"
    calls = f"call{more} {literal(format_.after)}"
    rules += [f"call: {' | '.join(names)}", f"calls: {literal(format_.before)} {calls}"]
    if must_call:
        start = "calls"
    elif content_schema is not None:
        rules.append(f"content: %json {_as_json(content_schema)}")
        start = "calls | content"
    elif not format_.marker:
        rules.append(r"CONTENT: /\s*[^\s{\[](.|\n)*/")
        start = "calls | CONTENT?"
    else:
        if format_.marker in special:
            rules.append(r"CONTENT: /(.|\n)+/")
            start = "CONTENT? calls?"
        else:
            found = re.escape(format_.marker).replace("/", r"\/")
            # The lazy rule ends at the first marker, and content then too.
            rules += [f"CONTENT: /{_TEXT}/", f"head[lazy]: /{_TEXT}{found}/"]
            rules.append(f"rest: {literal(format_.before.removeprefix(format_.marker))} {calls}")
            start = "CONTENT | head rest"
        if format_.bare_calls:
            rules += _rules_of_bare_calls(schemas)
            rules.append(f"answer: {start} | bare answer")
            start = "answer"
    return "\n".join([f"start: {start}", *rules])


def _rules_of_bare_calls(schemas: Mapping[str, Schema]) -> list[str]:
    """`bare`: text up to a call without the marker, wherever it begins, and that call."""
    rules = [
        f"bare: {' | '.join(f'bare_{number}' for number in range(len(schemas)))}",
        r"BLANK: /\s+/",
        r"CLOSE: /\s*\}/",
    ]
    for number, (name, schema) in enumerate(schemas.items()):
        head = rf'\{{\s*"name"\s*:\s*"{name}"\s*,\s*"arguments"\s*:'
        rules += [
            f"head_{number}[lazy]: /{_TEXT}{head}/",
            f"bare_{number}: head_{number} BLANK? %json {_as_json(schema)} CLOSE",
        ]
    return rules


def _as_json(schema: Schema) -> str:
    """A schema for `%json`, which takes no defaults beside it."""
    own = schema.get("x-guidance")
    written_as = {**WRITTEN_AS, **own} if isinstance(own, dict) else WRITTEN_AS
    return json.dumps({**without_idle_keywords(schema), "x-guidance": written_as})
