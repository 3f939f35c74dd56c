"""The grammar of calls takes just those answers that the request allows."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aurora_lit.grammars.definition import grammar_of
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PLAIN, ToolCall, ToolFormat
from aurora_lit.tool_calls.grammar import grammar_of_calls

FORMATS = (HERMES, MISTRAL, MISTRAL_NAMED, LLAMA3, PLAIN)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SCHEMAS = {"f": SCHEMA, "g": {"type": "object"}}
ONE, TWO = [ToolCall("f", '{"a": 12}')], [ToolCall("g", '{"b": "}"}'), ToolCall("f", '{"a": 3}')]
WRONG = [ToolCall("f", '{"a": "12"}')]


def tokenizer(*special: str) -> Tokenizer:
    """A token for each byte, and special ones."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", *special])
    return made


def takes(grammar: str, text: str, *special: str) -> bool:
    """True if the grammar allows the text, and an end after it."""
    made = tokenizer(*special)
    end = made.token_to_id("<end>")
    tokens = LLTokenizer(made.to_str(), eos_token=[end])
    matcher = LLMatcher(tokens, grammar_of(StructuredOutputsParams(grammar=grammar)), log_level=0)
    token_ids = made.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def grammar(format_: ToolFormat, **how: Any) -> str:
    return grammar_of_calls(format_, SCHEMAS, **{"must_call": True, "only_one": False, **how})


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_a_required_call_has_valid_arguments_and_nothing_around_it(format_: ToolFormat) -> None:
    required = grammar(format_)
    assert takes(required, format_.written(ONE))
    assert takes(required, format_.written(TWO))
    for text in ("", "Hello", format_.written(WRONG), format_.written(ONE) + " so", "So " + format_.written(ONE)):
        assert not takes(required, text), text
    assert not takes(required, format_.written([ToolCall("h", "{}")]))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_only_one_call_is_only_one(format_: ToolFormat) -> None:
    single = grammar(format_, only_one=True)
    assert takes(single, format_.written(ONE))
    assert not takes(single, format_.written(TWO))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_an_answer_that_need_not_call_is_any_text_but_its_calls_are_valid(format_: ToolFormat) -> None:
    free = grammar(format_, must_call=False)
    for text in ("Hello\nthere.", "a < b", format_.written(ONE), format_.written(TWO)):
        assert takes(free, text), text
    assert not takes(free, format_.written(WRONG))
    if format_.marker:
        assert takes(free, "Let me see.\n" + format_.written(ONE))
        assert not takes(free, "Let me see.\n" + format_.written(WRONG))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_with_a_schema_for_content_an_answer_is_of_it_or_calls(format_: ToolFormat) -> None:
    both = grammar(format_, must_call=False, content_schema=SCHEMA)
    assert takes(both, '{"a": 4}')
    assert takes(both, format_.written(ONE))
    for text in ("Hello", '{"a": "4"}', format_.written(WRONG)):
        assert not takes(both, text), text


@pytest.mark.parametrize("format_", [MISTRAL, MISTRAL_NAMED, HERMES], ids=lambda each: each.name)
def test_a_marker_that_is_a_special_token_is_one(format_: ToolFormat) -> None:
    marker = tokenizer(format_.marker).token_to_id(format_.marker)
    for how in ({}, {"must_call": False}):
        special = grammar(format_, marker_token=marker, **how)
        assert takes(special, format_.written(ONE), format_.marker)
        assert takes(special, format_.written(TWO), format_.marker)
        assert not takes(special, format_.written(WRONG), format_.marker)
    assert takes(special, "Hello", format_.marker)
    assert takes(special, "Hello" + format_.written(ONE), format_.marker)
    assert not takes(grammar(format_), format_.written(ONE), format_.marker), "as text it is none"
