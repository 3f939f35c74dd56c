"""Building an engine: what is taken from the model and its tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aurora_lit.serve.worker.build import eos_token_ids


def test_an_end_token_that_has_no_row_in_the_model_ends_nothing() -> None:
    target: Any = SimpleNamespace(end_of_text_ids=frozenset({2, 99}), vocab_size=50)
    for of_tokenizer, expected in ((7, {2, 7}), (50, {2}), (None, {2})):
        tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
        assert eos_token_ids(target, tokenizer) == expected
