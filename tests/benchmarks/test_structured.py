"""The schemas of benchmarks/structured.py can be followed, whatever the model, to texts that jsonschema takes."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.fake_engine import tiny_tokenizer

from aurora_lit.grammars.definition import fault_of as fault_of_schema
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.request import StructuredOutputsParams
from benchmarks.structured import fault_of, report
from benchmarks.structured_schemas import SCHEMAS

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(
    lambda: tokenizer_json(TOKENIZER.backend_tokenizer), vocab_size=len(TOKENIZER), eos_token_ids=frozenset([END])
)


def random_text(asked: StructuredOutputsParams, seed: int) -> str | None:
    """What a model would write to which all allowed tokens are equally likely; None: it did not end."""
    grammar, rng, written = (
        COMPILER.compile(asked, end_tokens=frozenset([END])).result(),
        random.Random(seed),
        list[int](),
    )
    while len(written) < 400:
        token = rng.choice(np.unpackbits(grammar.allowed, bitorder="little").nonzero()[0].tolist())
        if token == END:
            return str(TOKENIZER.decode(written))
        written.append(token)
        grammar.advance([token])
    return None


def test_whatever_ends_is_valid() -> None:
    assert len(SCHEMAS) >= 50
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        asked = StructuredOutputsParams(json=schema)
        assert fault_of_schema(asked) is None, name
        texts = [random_text(asked, seed) for seed in range(8)]
        ended = [text for text in texts if text is not None]
        assert len(ended) >= 4, name
        assert [fault_of(text, schema) for text in ended] == [""] * len(ended), name


def test_a_number_too_large_for_a_decimal_is_judged_all_the_same() -> None:
    number = "1" + "E" + "9" * 30
    assert fault_of(number, {"type": "number"}) == ""
    assert "maximum" in fault_of(number, {"type": "number", "maximum": 5})


def test_the_report_fails_for_an_answer_that_ended_and_is_not_valid(capsys: pytest.CaptureFixture[str]) -> None:
    def record(way: str, reason: str, text: str) -> dict[str, Any]:
        how = {"name": "a verdict", "way": way, "temperature": 0.0, "tokens": 5, "seconds": 0.5}
        return {**how, "reason": reason, "text": text, "fault": fault_of(text, SCHEMAS["a verdict"])}

    good = [
        record("schema", "stop", '"yes"'),
        record("schema", "length", '"ye'),
        record("free", "stop", "Yes, of course"),
    ]
    assert report(good)
    assert "| 0 | schema | 2 | 1 | 1 | 1 | 10.0 | 0.50 | 1.00 |" in capsys.readouterr().out
    assert not report([*good, record("schema, plain", "stop", '"perhaps"')])
    assert "not valid: a verdict" in capsys.readouterr().out
