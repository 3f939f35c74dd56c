"""Prompts answered by a fake engine whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine, FakeOptions, tiny_tokenizer

from aurora_lit.bench.prompts import (
    BenchPrompt,
    answer_prompts,
    load_prompts,
    params_for,
    repeated_share,
)
from aurora_lit.errors import AuroraError


def _prompt(*token_ids: int, domain: str = "chat") -> BenchPrompt:
    return BenchPrompt(domain=domain, token_ids=token_ids)


def _files(folder: Path) -> list[Path]:
    chat, plain = folder / "chat.jsonl", folder / "poems.txt"
    rows = [{"domain": "chat", "messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(5)]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain.write_text("the world\n\nthe old world\n")
    return [chat, plain]


def test_prompts_of_all_files_are_interleaved_limited_and_short_enough(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prompts = load_prompts(_files(tmp_path), limit=3, tokenizer=tokenizer, max_prompt_tokens=100)
    assert [p.domain for p in prompts] == ["chat", "poems", "chat", "poems", "chat"]
    assert tokenizer.decode(prompts[0].token_ids) == "<|user|>hello 0<|assistant|>"
    with pytest.raises(AuroraError, match="max-tokens"):
        load_prompts(_files(tmp_path), limit=None, tokenizer=tokenizer, max_prompt_tokens=1)


def test_every_prompt_is_answered_and_tokens_after_the_last_first_token_are_counted() -> None:
    engine = FakeEngine(FakeOptions(tokens_per_round=3, max_batch_size=2, round_s=0.01))
    ended: list[None] = []
    run = answer_prompts(
        engine,
        [_prompt(7, 8), _prompt(9), _prompt(5, 6)],
        params_for(0, max_tokens=7),
        on_answer=lambda: ended.append(None),
    )
    assert [a.token_ids for a in run.answers] == [[7, 8, 7, 8, 7, 8, 7], [9] * 7, [5, 6, 5, 6, 5, 6, 5]]
    assert run.num_tokens == 21
    assert run.decode_tokens == 4  # the third prompt began last, when the others had ended
    assert run.seconds >= 0.06 > run.decode_seconds >= 0.02
    assert len(ended) == 3


def test_an_engine_error_ends_the_benchmark() -> None:
    engine = FakeEngine()
    error = tiny_tokenizer().convert_tokens_to_ids("<|error|>")
    with pytest.raises(AuroraError, match="as asked"):
        answer_prompts(engine, [_prompt(error)], params_for(0, max_tokens=4))


def test_repeated_share_counts_repeats_within_an_answer() -> None:
    assert repeated_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 0
    assert repeated_share([[1] * 13]) == 0.9
    assert repeated_share([[1, 2]]) == 0
