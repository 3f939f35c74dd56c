"""The prompt of a hole in a file: laid out as the model's family has learned it, and cut to what fits.

What stays while a person types comes first, so that the prefix cache has it: the repository's name, other files in the
order in which they are sent (oldest first), the file, what is before the hole, what is after it. The last lines before
the hole, in which a person types, come after that, as the beginning of what the model fills in: so a key costs a few
tokens, and not all of what is after the hole again. The word at the cursor is left to the answer, which must begin with
it, since a prompt that ends within a word has other tokens than the model has learned. Families that have learned it
the other way round have what is after the hole first, and what is before it last anyway.

What is before the hole keeps its end, what is after it its beginning, and of the other files the newest are kept. A cut
stays where it is while a person types, or nothing of the next prompt would be known: a text may begin with any line
between three quarters of the limit and the limit, and begins with the one whose hash is smallest. That line is found
again in the next request, also if the client itself has cut the text at another place, until it is beyond the limit.
Other files are cut likewise.

Leaves out the marks (models/fim.py), and the request that the prompt becomes part of (serve/http/tokenize.py).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_lit.models.fim import FimMarks

_REPOSITORY = "myproject"
"""Clients do not send its name; llama.cpp's server writes this one."""
_CHARACTERS_OF_TOKEN = 16
"""No more of a text is tokenized than so many characters for each token that fits."""
_HASHED_TOKENS = 16
_TYPED_LINES = 8
"""At most so many lines before the hole stand after what is after it. On HumanEval-Infilling as many holes are filled
right with eight as with one or none (docs/results/editors.md)."""
_WORD = re.compile(r"(?:\w+|[^\S\n]+|[^\w\s\ufffd]+)\Z")
"""What may go on after the cursor: a name, spaces, or signs."""
_LONGEST_WORD = 64
"""Characters in which it is looked for: the time grows with their square."""
_PARTS = 4
"""What is after the hole has a quarter of the limit if what is before it fills the rest, and a cut is up to a quarter
deeper than it must be."""


class OtherFile(NamedTuple):
    """A part of another file."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A hole to be filled."""

    prefix: str
    """What is before it."""
    suffix: str
    """What is after it."""
    file_name: str = ""
    """"": the prompt names neither the file nor the repository."""
    others: tuple[OtherFile, ...] = ()
    """Newest last; only with a file name."""
    most_around: int | None = None
    """Tokens of prefix and suffix together; None: as many as fit."""


class HolePrompt(NamedTuple):
    """A laid out prompt."""

    token_ids: tuple[int, ...]
    was_cut: bool
    """Not all that was sent is part of it."""
    begins_with: str = ""
    """The end of what is before the hole, where the answer must begin with it."""


def lay_out(hole: Hole, marks: FimMarks, *, num_tokens: int, may_begin: bool = True) -> HolePrompt:
    """The prompt, of at most so many tokens; if they are too few, of the marks and names alone.

    may_begin: the answer can be made to begin with a text. False: a word at the cursor, and the lines of it, stand
    before the hole.
    """
    head, name = list[int](), list[int]()
    if hole.file_name and marks.repository is not None:
        head = [marks.repository, *marks.encode(f"{_REPOSITORY}\n")]
    if hole.others or (hole.file_name and marks.file is not None):
        name = _file_name(hole.file_name, marks)
    room = max(0, num_tokens - len(marks.begins) - len(head) - len(name) - 3)
    around = room if hole.most_around is None else min(room, hole.most_around)

    num_characters = around * _CHARACTERS_OF_TOKEN
    at = max(0, len(hole.prefix) - num_characters)
    length = len(hole.prefix)
    is_prefix_first = marks.middle is not None and not marks.suffix_first
    typed_at = max(at, _typed_at(hole.prefix)) if is_prefix_first else length
    found = _WORD.search(hole.prefix, max(typed_at, length - _LONGEST_WORD))
    word = found[0] if found else ""
    typed = marks.encode(hole.prefix[typed_at : length - len(word)], continues=True)
    if (word and not may_begin) or len(typed) > around // _PARTS:  # the latter if lines are long
        typed_at, typed, word = length, [], ""
    reserved = _in_steps(len(typed), around, parts=4 * _PARTS)
    room, around = room - reserved, around - reserved

    before = marks.encode(hole.prefix[at:typed_at])
    after = marks.encode(hole.suffix[:num_characters], continues=True)
    kept_after = after[: max(around // _PARTS, around - _in_steps(len(before), around))]
    kept_before = before[_first_kept_token(before, around - len(kept_after), marks) :]

    others = _others(hole.others, marks, most=room - min(around, _in_steps(len(before) + len(after), around)))
    was_cut = (
        max(len(hole.prefix), len(hole.suffix)) > num_characters
        or len(kept_before) + len(kept_after) < len(before) + len(after)
        or len(others) < len(hole.others)
    )
    files = [*(token for other in others for token in other), *name]
    if marks.file is None:  # their names are text, and with the files a part of what is before the hole
        kept_before, files = [*files, *kept_before], []
    parts = [[marks.prefix, *kept_before], [marks.suffix, *kept_after]]
    first, second = reversed(parts) if marks.suffix_first else parts
    end = [] if marks.middle is None else [marks.middle]
    return HolePrompt((*marks.begins, *head, *files, *first, *second, *end, *typed), was_cut, word)


def _typed_at(prefix: str) -> int:
    """Where the last lines begin: after one of the last line breaks, the same one while a person types."""
    starts, at = list[int](), len(prefix)
    while len(starts) < _TYPED_LINES and (at := prefix.rfind("\n", 0, at)) >= 0:
        starts.append(at + 1)
    return min(reversed(starts), key=lambda start: _hash(prefix[max(0, start - _HASHED_TOKENS) : start]), default=0)


def _file_name(name: str, marks: FimMarks) -> list[int]:
    """As the family marks it; one without a mark gets a line as Codestral has learned it."""
    return marks.encode(f"+++++ {name}\n") if marks.file is None else [marks.file, *marks.encode(f"{name}\n")]


def _others(files: Sequence[OtherFile], marks: FimMarks, *, most: int) -> list[list[int]]:
    """The tokens of each file that is kept: the newest, of at most so many tokens in all."""
    newest_first, totals = list[list[int]](), list[int]()
    num_characters = 0
    for file in reversed(files):
        num_characters += len(file.text)
        if num_characters > most * _CHARACTERS_OF_TOKEN:
            break
        ids = [*_file_name(file.name, marks), *marks.encode(file.text)]
        total = len(ids) + (totals[-1] if totals else 0)
        if total > most:
            break
        newest_first.append(ids)
        totals.append(total)
    num_kept = len(totals)
    if 0 < num_kept < len(files):
        numbers = [number for number, total in enumerate(totals, start=1) if total > most - most // _PARTS]
        num_kept = min(numbers or [num_kept], key=lambda number: _hash(newest_first[number - 1]))
    return newest_first[:num_kept][::-1]


def _in_steps(number: int, limit: int, *, parts: int = _PARTS) -> int:
    """`number`, rounded up to a part of the limit: so that what depends on it seldom changes."""
    step = max(1, limit // parts)
    return -(-number // step) * step


def _first_kept_token(ids: Sequence[int], most: int, marks: FimMarks) -> int:
    """Where to cut, so that at most so many tokens are left; see the file's docstring."""
    if len(ids) <= most:
        return 0
    window = range(len(ids) - most, len(ids) - most + most // _PARTS + 1)
    lines = [at for at in window if marks.ends_line(ids[at - 1])]
    return min(lines or window, key=lambda at: _hash(ids[at : at + _HASHED_TOKENS]))


def _hash(part: Sequence[object]) -> int:
    return zlib.crc32(repr(list(part)).encode())
