"""An answer's text, as it arrives, to content and tool calls.

    reader = ToolCallReader(HERMES, names={"get_weather"})
    for text in texts:
        for piece in reader.push(text):      # Content, CallBegin, Arguments
            ...
    reader.finish()                          # what was held back

Nothing is lost: what looks like a call and is none (no JSON, an unknown name) is content. A call whose name comes first
is passed on while its arguments are written; any other when it is complete.

A bare call, without the format's marker, is an object of a known name and then `arguments`, another object. It begins a
line, alone or in a list, or a code block: so llama.cpp reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from aurora_lit.tool_calls.formats import ToolFormat

_ARGUMENTS_KEYS = ("arguments", "parameters")
_NAME_FIRST = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"')
_HEAD = re.compile(_NAME_FIRST.pattern + r'\s*,\s*"(arguments|parameters)"\s*:\s*\{')
_NO_KEY = re.compile(r'\{\s*[^"}\s]')
_FIRST_KEY = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"')
_SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS_KEYS})
_LONGEST_NAME = 128
"""Text of this length in which no name has ended is no call."""
_FENCE = "```"
_BARE_OPENING = re.compile(rf"^(?:[ \t]*{_FENCE}\w*\s*)?(?=[\[{{])", re.MULTILINE)
_PART_OF_OPENING = re.compile(rf"^[ \t]*(?:`{{1,2}}|{_FENCE}\w*\s*)\Z", re.MULTILINE)


@dataclass(frozen=True)
class Content:
    """More of the text around calls."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call begins; its number is that of its place in the answer."""

    number: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments: together a JSON object, unless the answer was cut off."""

    number: int
    text: str


Piece = Content | CallBegin | Arguments


class ToolCallReader:
    """Reads one answer; see the file's example."""

    def __init__(
        self,
        format_: ToolFormat,
        *,
        names: AbstractSet[str],
        only_one: bool = False,
        only_calls: bool = False,
        reads_bare: bool = False,
    ) -> None:
        """names: of the tools. only_one: further calls are dropped. only_calls: the answer was to be calls and nothing
        else, so what might have become one when it was cut off is dropped too. reads_bare: bare calls too.
        """
        self._format, self._names, self._only_one, self._only_calls = format_, names, only_one, only_calls
        self._reads_bare = reads_bare
        self._read = self._in_content if format_.marker else self._at_start
        self._pending = ""
        """Text that has not been read."""
        self._doubtful = ""
        """Text read since the last piece: content, unless a call follows."""
        self._after_call = False
        self._in_list = False
        """A bracket has been opened around calls."""
        self._is_bare = self._in_fence = False
        """The calls began without the marker; a code block has been opened around them."""
        self._begins_line = True
        """The pending text does."""
        self._braces, self._num_scanned = _Braces(), 0
        self._pieces: list[Piece] = []
        self.num_calls = 0

    @property
    def is_in_call(self) -> bool:
        """True if a call has begun whose arguments have not ended."""
        return self._read == self._in_arguments

    @property
    def _fillers(self) -> tuple[str, ...]:
        return (*self._format.fillers, _FENCE) if self._in_fence else self._format.fillers

    def push(self, text: str) -> list[Piece]:
        """Read more of the answer."""
        self._pending += text
        while self._read():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """The answer has ended: return what was held back."""
        held = self._doubtful + self._pending
        is_rest_of_call = self._after_call and any(filler.startswith(held.strip()) for filler in self._fillers)
        if self._read == self._after_arguments:
            is_rest_of_call |= held.lstrip().startswith((",", "}"))
        if not self._only_calls and not is_rest_of_call:
            self._add_content(held)
        return self._take()

    # Each of these reads some of the pending text, and returns True if there may be more to read now.

    def _in_content(self) -> bool:
        """Up to the format's marker, or to what may begin a bare call."""
        begin, end = self._opening()
        before, opening = self._pending[:begin], self._pending[begin:end]
        text = before.rstrip()  # white space before a call is no content
        self._add_content(text)
        self._pending = self._pending[len(text) :]
        if end is None:
            return False
        self._doubtful, self._pending = before[len(text) :] + opening, self._pending[end - len(text) :]
        self._is_bare, self._in_fence = opening != self._format.marker, _FENCE in opening
        self._after_call = False
        self._read = self._in_name if self._format.name_end else self._between_calls
        return True

    def _opening(self) -> tuple[int, int | None]:
        """Where the first opening of calls begins and ends; without one, where a part of it may begin, and None."""
        text, marker = self._pending, self._format.marker
        at = text.find(marker)
        found = [] if at < 0 else [(at, at + len(marker))]
        part = next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
        parts = [len(text) - part]
        if self._reads_bare:
            found += [match.span() for match in _BARE_OPENING.finditer(text) if match.start() or self._begins_line][:1]
            parts += [match.start() for match in _PART_OF_OPENING.finditer(text)]
        return min(found) if found else (min(parts), None)

    def _at_start(self) -> bool:
        """Without a marker, a call is what the answer begins with."""
        begun = self._pending.lstrip()
        openings = ("{", "[", *(filler for filler in self._format.fillers if len(filler) > 1))
        if not begun.startswith(openings):
            if any(opening.startswith(begun) for opening in openings):
                return False
            self._read = self._in_rest
        else:
            self._read = self._between_calls
        return True

    def _in_rest(self) -> bool:
        """Without a marker, nothing is a call after other text."""
        self._add_content(self._pending)
        self._pending = ""
        return False

    def _between_calls(self) -> bool:
        """Fillers, up to the next brace."""
        text = self._pending.lstrip()
        self._doubtful += self._pending[: len(self._pending) - len(text)]
        self._pending = text
        fillers = self._fillers
        if any(filler.startswith(text) and filler != text for filler in fillers):
            return False  # it may become the longer one
        for filler in fillers:
            if text.startswith(filler):
                if filler == self._format.marker:
                    self._after_call = self._is_bare = False
                self._in_fence &= filler != _FENCE
                is_end = self._after_call and (len(filler) > 1 or (filler == "]" and self._in_list))
                # Signs that may separate calls are content if no call follows.
                self._doubtful = "" if is_end else self._doubtful + filler
                if filler in "[]":
                    self._in_list = filler == "["
                self._pending = text[len(filler) :]
                if self._format.name_end:
                    self._read = self._in_name
                return True
        if text.startswith("{") and not self._format.name_end:
            self._begin_scan(self._in_object)
            return True
        return self._refuse(0) if text else False

    def _in_name(self) -> bool:
        """A name that stands before its arguments."""
        before, found, after = self._pending.partition(self._format.name_end)
        if not found:
            return self._refuse(0) if len(before) > _LONGEST_NAME else False
        name = before.partition(self._format.id_begin)[0].strip()
        arguments = after.lstrip()
        if not arguments:
            return False
        if name not in self._names or not arguments.startswith("{"):
            return self._refuse(0)
        self._pending = arguments
        self._begin_call(name)
        return True

    def _in_object(self) -> bool:
        """An object that may be a call, whole or up to its arguments."""
        head, name = _HEAD.match(self._pending), _NAME_FIRST.match(self._pending)
        if head is not None and head[1] in self._names and not (self._is_bare and head[2] != "arguments"):
            self._pending = self._pending[head.end() - 1 :]
            self._begin_call(head[1])
            return True
        first_key = _FIRST_KEY.match(self._pending)
        is_other = first_key is not None and first_key[1] not in (("name",) if self._is_bare else _KEYS)
        is_other |= name is not None and name[1] not in self._names
        if is_other or _NO_KEY.match(self._pending):
            return self._refuse(1)  # at once: an answer may be code
        end = self._braces.end(self._pending[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._pending)
            return False
        end += self._num_scanned
        call = None if self._is_bare else _call_in(self._pending[:end])
        if call is None or call[0] not in self._names:
            return self._refuse(end)
        self._pending = self._pending[end:]
        self._begin_call(call[0])
        self._add(Arguments(self.num_calls - 1, call[1]))
        self._read, self._after_call = self._between_calls, True
        return True

    def _in_arguments(self) -> bool:
        """Arguments, passed on as they come."""
        end = self._braces.end(self._pending)
        text = self._pending[:end]
        if text:
            self._add(Arguments(self.num_calls - 1, text))
        self._pending = self._pending[len(text) :]
        if end is None:
            return False
        self._after_call = True
        if self._format.name_end:
            self._read = self._between_calls
        else:
            self._begin_scan(self._after_arguments, depth=1)
        return True

    def _after_arguments(self) -> bool:
        """What a call has after its arguments: its closing brace, which some models forget, as a rule."""
        if not self._num_scanned:
            text, marks = self._pending.lstrip(), [filler for filler in self._fillers if len(filler) > 1]
            if any(mark.startswith(text) and mark != text for mark in marks):
                return False
            if text.startswith(tuple(marks)):
                self._read = self._between_calls
                return True
        end = self._braces.end(self._pending[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._pending)
            return False
        self._pending, self._read = self._pending[self._num_scanned + end :], self._between_calls
        return True

    def _refuse(self, num_characters: int) -> bool:
        """The doubtful text and so many characters are content, and no call."""
        if not num_characters and self._doubtful.isspace():  # before content, or before a further opening
            self._pending, self._doubtful = self._doubtful + self._pending, ""
        self._add_content(self._doubtful + self._pending[:num_characters])
        self._pending, self._after_call, self._in_list = self._pending[num_characters:], False, False
        self._read = self._in_content if self._format.marker else self._in_rest
        return True

    def _begin_call(self, name: str) -> None:
        self._add(CallBegin(self.num_calls, name))
        self.num_calls += 1
        self._doubtful, self._begins_line = "", False
        self._begin_scan(self._in_arguments)

    def _begin_scan(self, read: Any, *, depth: int = 0) -> None:
        self._read, self._braces, self._num_scanned = read, _Braces(depth), 0

    def _add_content(self, text: str) -> None:
        self._doubtful = ""
        if text:
            self._begins_line = text.endswith("\n")
            self._add(Content(text))

    def _add(self, piece: Piece) -> None:
        if isinstance(piece, Content) or not (self._only_one and piece.number):
            self._pieces.append(piece)

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


class _Braces:
    """Finds the end of a JSON object in text that comes in parts; braces in strings do not count."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._is_escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """Where the object ends in the next part: after its last brace; None: not in this part."""
        for at, character in enumerate(text):
            if self._in_string:
                self._in_string = self._is_escaped or character != '"'
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def _call_in(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole object; None if it is no call."""
    try:
        call = json.loads(text)
        arguments: Any = next((call[key] for key in _ARGUMENTS_KEYS if key in call), {})
        if isinstance(arguments, str):  # JSON inside JSON, as some models write it
            arguments = json.loads(arguments)
        arguments = {} if arguments is None else arguments
    except (ValueError, RecursionError):
        return None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return None
    return call["name"], _json_text(arguments)


def _json_text(value: Any) -> str:
    """JSON as it is written by hand; half of a surrogate pair stays escaped, since it is no text."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or not _SURROGATE.search(text) else json.dumps(value)
