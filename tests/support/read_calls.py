"""What a reader of tool calls makes of an answer that arrives in parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from aurora_lit.tool_calls.parser import Arguments, CallBegin, Content, ToolCallReader


def read_calls(reader: ToolCallReader, parts: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and names and arguments of the calls."""
    content, calls = "", list[tuple[str, str]]()
    for piece in [*itertools.chain.from_iterable(map(reader.push, parts)), *reader.finish()]:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallBegin):
            assert piece.number == len(calls)
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, Arguments)
            assert piece.number == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls
