"""What a client asked for as one grammar for llguidance, and what is wrong with it.

The HTTP process checks a grammar before a request is sent to the engine worker, which makes the same grammar of the
same record. Contains neither torch nor numpy. Left out: which tokens a grammar allows (matcher.py).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from aurora_lit.grammars.endless import endless_place, has_id, has_inner_root, target_of
from aurora_lit.request import StructuredOutputsParams

WRITTEN_AS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON is written as by json.dumps, and so without white space that a model could repeat for ever. A schema may change
that by llguidance's own key "x-guidance"."""
LONGEST_GRAMMAR = 1 << 17
"""Characters of a grammar for llguidance, which compiles some in a time that grows with their square."""
MOST_GBNF_RULES = 1000
"""Rules of a grammar in GBNF: its conversion, in Python, may take a time that grows with their square."""
STACK_BYTES = 512 << 20
"""Of threads in which llguidance reads a grammar: it calls itself for each rule of a chain, and on a usual stack a
chain of a thousand ends the process. Memory is taken as it is used."""
LIMITS = LLParserLimits(max_lexer_states=20_000, step_lexer_fuel=100_000, max_grammar_size=LONGEST_GRAMMAR)
"""Of one compiled grammar: about 30 MB, and 7 ms a mask; llguidance's own are twelve times and twice that."""
_LARGEST_INTEGER = 1 << 63
"""Above all integers that llguidance has, which reads numbers as doubles."""
_LEAST_BOUND = 1024 - (1 << 63)
"""The double after -2^63: for a range of that one integer llguidance calls itself without end, and the process ends."""
_BOUNDS = ("const", "enum", "maximum", "exclusiveMaximum")
"""Keywords that may be the upper end of such a range."""
_NEGATIVE_NUMBER = re.compile(r"-\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_SCHEMAS_BY_KEY = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE_SCHEMAS = ("items", "additionalItems", "additionalProperties")
_FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid")
"""Values of `format` that llguidance has."""
_DRAFTS = re.compile(
    r"http://json-schema\.org/draft-0[3-7]/schema#?|https://json-schema\.org/draft/(2019-09|2020-12|next)/schema#?"
)
"""Values of `$schema` that llguidance has."""
_LARK_START = re.compile(r"(?m)^\s*(?:%llguidance\b|\??start\s*:(?!:=))")
_setting_stack_size = threading.Lock()
_MOST_COMPILED = 32
"""Parts of a schema that are compiled alone to find the place of its fault."""
_PLACE_S = 0.2
"""For how long the place is looked for; one compilation may exceed it."""
_MOST_CHARACTERS = 240
"""Of llguidance's reason in an error message."""


class Fault(NamedTuple):
    """Why a grammar cannot be used."""

    place: str
    """The keys of a JSON schema that lead to the fault, such as ".properties.age.type"; "" elsewhere."""
    reason: str


def grammar_of(asked: StructuredOutputsParams) -> str:
    """The grammar for llguidance. Raises ValueError for a GBNF grammar that cannot be read or is too long, and for a
    schema that is no JSON.
    """
    if asked.json_object:
        return _of_schema({"type": "object"})
    if asked.json is not None:
        return _of_schema(json.loads(asked.json) if isinstance(asked.json, str) else asked.json)
    if asked.begins_with is not None:
        return LLMatcher.grammar_from_regex(rf"{re.escape(asked.begins_with)}[\s\S]*")
    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        # As one terminal: as a rule llguidance takes no more than 2,000 alternatives.
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, asked.choice)))
    assert asked.grammar is not None
    is_gbnf = "::=" in asked.grammar and not _LARK_START.search(asked.grammar)  # a text in Lark may contain it
    return LLMatcher.grammar_from_lark(_from_gbnf(asked.grammar) if is_gbnf else asked.grammar)


def _from_gbnf(grammar: str) -> str:
    rules = grammar.count("::=")
    if rules > MOST_GBNF_RULES or len(grammar) > LONGEST_GRAMMAR:
        raise ValueError(
            f"it has {rules} rules and {len(grammar)} characters in GBNF, and may have {MOST_GBNF_RULES} and "
            f"{LONGEST_GRAMMAR}; write it in Lark"
        )
    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # the library raises no other
        raise ValueError(str(error)) from error


def _of_schema(schema: Any) -> str:
    text = json.dumps(without_idle_keywords(schema))
    return LLMatcher.grammar_from_json_schema(text, defaults=WRITTEN_AS)  # type: ignore[arg-type]


def without_idle_keywords(schema: Any) -> Any:
    """A JSON schema without the keywords that llguidance refuses though they constrain nothing."""
    return _without_idle_keywords(schema, {id(part) for _, part in _schemas(schema)})


def _without_idle_keywords(value: Any, schemas: Collection[int]) -> Any:
    """`schemas`: the ids of the objects that are schemas."""
    if isinstance(value, list):
        return [_without_idle_keywords(part, schemas) for part in value]
    if not isinstance(value, dict):
        return value
    if id(value) not in schemas:
        return {name: _without_idle_keywords(part, schemas) for name, part in value.items()}
    kept = dict[str, Any]()
    for name, part in value.items():
        if name == "format" and isinstance(part, str) and re.fullmatch("uuid[1-8]", part):  # pydantic's names
            part = "uuid"
        elif name not in ("const", "enum"):
            part = _without_idle_keywords(part, schemas)
        if not _is_idle(name, part):
            kept[name] = part
    return kept


def _is_idle(name: str, value: Any) -> bool:
    if name == "format":  # by the standard an unknown one is a note
        return isinstance(value, str) and value not in _FORMATS
    if name == "$schema":
        return isinstance(value, str) and not _DRAFTS.fullmatch(value)
    return (name == "uniqueItems" and value is False) or (name == "propertyNames" and value in ({}, {"type": "string"}))


def fault_of(asked: StructuredOutputsParams, tokenizer: LLTokenizer | None = None) -> Fault | None:
    """Why the grammar cannot be used; None: it can be.

    Without a tokenizer, special tokens that a grammar names are not looked up: see `names_special_tokens`.
    """
    try:
        grammar = grammar_of(asked)
    except (ValueError, RecursionError) as error:
        return Fault("", _shorten(str(error)))
    if len(grammar) > LONGEST_GRAMMAR:
        return Fault("", f"it has {len(grammar)} characters as a grammar, and may have {LONGEST_GRAMMAR}")
    if asked.json is None:
        if "%json" in grammar and any(float(n) <= _LEAST_BOUND for n in _NEGATIVE_NUMBER.findall(asked.grammar or "")):
            return Fault("", f"numbers up to {_LEAST_BOUND} cannot be read in %json; leave them out")
        reason = _reason(grammar, tokenizer)
        return Fault("", _shorten(reason)) if reason else None
    schema = without_idle_keywords(json.loads(asked.json) if isinstance(asked.json, str) else asked.json)
    if (fault := _misread(schema)) is not None:
        return fault
    reason = _reason(grammar, tokenizer)
    if not reason:
        if (place := endless_place(schema)) is not None:
            return Fault(place, "no answer can follow the grammar: it requires itself without end; make this optional")
        return None
    return Fault(_Search(schema, reason).place(), _shorten(reason))


def names_special_tokens(asked: StructuredOutputsParams) -> bool:
    """True if a grammar without a fault can only be checked with the tokenizer, since it names tokens of that."""
    return bool(asked.grammar) and bool(_validate(grammar_of(asked))[1])


def _validate(grammar: str, tokenizer: LLTokenizer | None = None) -> tuple[bool, list[str]]:
    with grammar_thread() as thread:
        return thread.submit(LLMatcher.validate_grammar_with_warnings, grammar, tokenizer, limits=LIMITS).result()


def grammar_thread() -> ThreadPoolExecutor:
    """One thread of STACK_BYTES."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
    with _setting_stack_size:  # it is the whole process's
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.submit(int)  # starts the thread
        finally:
            threading.stack_size(before)
    return thread


def _reason(grammar: str, tokenizer: LLTokenizer | None = None) -> str:
    is_error, messages = _validate(grammar, tokenizer)
    return messages[0].partition("\n  while processing ")[0] if is_error else ""


class _Search:
    """Looks for the innermost part of a schema that is refused for the same reason as the whole."""

    def __init__(self, root: Any, reason: str) -> None:
        self._root, self._reason = root, reason
        self._ends, self._left = time.monotonic() + _PLACE_S, _MOST_COMPILED

    def place(self) -> str:
        """The keys that lead there; "" if all parts are right alone, or the search took too long."""
        keys = self._below(self._root)
        return "" if self._is_over else keys

    @property
    def _is_over(self) -> bool:
        return self._left < 0 or time.monotonic() > self._ends

    def _below(self, schema: Any) -> str:
        root = self._root
        for keys, part in _parts(schema):
            self._left -= 1
            if self._is_over:
                return ""
            alone = {"$ref": "#/part", "part": part}
            if isinstance(root, dict):
                names = (name for name in ("$defs", "definitions") if name in root and root[name] is not part)
                alone |= {name: root[name] for name in names}
            # Alone it may mean another thing: a reference may lead into "part".
            if _misread(alone) is None and _reason(_of_schema(alone)) == self._reason:
                return keys + self._below(part)
        return ""


def _misread(schema: Any) -> Fault | None:
    """The fault of a number that llguidance changes, or which ends the process; None: there is none."""
    leads_anywhere = has_id(schema) or has_inner_root(schema)  # a fragment as id makes a part the root
    for keys, part in _schemas(schema):
        for name in ("const", "enum"):
            if _has_inexact(part.get(name)):
                return Fault(f"{keys}.{name}", "an integer beyond 2^53 would be rounded; use a string")
        for name in _BOUNDS:
            if _has_least(part.get(name)):
                return Fault(f"{keys}.{name}", f"numbers up to {_LEAST_BOUND} cannot be read; use greater ones")
        reference = part.get("$ref")
        leads_anywhere |= isinstance(reference, str) and target_of(schema, reference) is None
    if leads_anywhere and any(map(_has_least, _all_bounds(schema))):
        return Fault("", f"it has a number that cannot be read; use one above {_LEAST_BOUND}")
    return None


def _all_bounds(schema: Any) -> Iterator[Any]:
    """The values of _BOUNDS in all of a schema, also where no reference leads that we know; each is looked at once."""
    found = [schema]
    while found:
        part = found.pop()
        if isinstance(part, dict):
            yield from (value for name, value in part.items() if name in _BOUNDS)
            found += (value for name, value in part.items() if name not in _BOUNDS)
        elif isinstance(part, list):
            found += part


def _has_least(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_least, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (int, float)) and value <= _LEAST_BOUND


def _has_inexact(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_inexact, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and (abs(value) >= _LARGEST_INTEGER or int(float(value)) != value)


def _schemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema inside a schema, itself first, and each that a reference leads to, with the keys that lead to it."""
    found, seen = deque([("", schema)]), set[int]()
    while found:
        keys, part = found.popleft()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        yield keys, part
        found.extend((keys + more, inner) for more, inner in _parts(part))
        reference = part.get("$ref")
        if isinstance(reference, str):
            found.append((reference.removeprefix("#").replace("/", "."), target_of(schema, reference)))


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with the keys that lead to them."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        if name in _SCHEMAS_BY_KEY and isinstance(value, Mapping):
            yield from ((f".{name}.{key}", part) for key, part in value.items())
        elif name in _LISTS_OF_SCHEMAS and isinstance(value, list):
            yield from ((f".{name}[{index}]", part) for index, part in enumerate(value))
        elif name in _SINGLE_SCHEMAS:
            yield f".{name}", value


def _shorten(reason: str) -> str:
    """On one line, without the drawing that shows the place again."""
    line = " ".join(reason.split())
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS - 3]}..."
