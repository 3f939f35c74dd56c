"""Arms in one process: they share a target, answer alike, and are compared turn by turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fake_engine import tiny_tokenizer
from support.tiny_models import random_draft, save_model

from aurora_lit.drafts.checkpoint import save_draft
from aurora_lit.errors import ConfigError
from aurora_lit.models.loading import load_target
from aurora_lit.request import PLANS
from benchmarks.one_process import Turn, build_arms, parse_arm, row


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Settings of a tiny target and a draft of random weights."""
    folder = save_model("llama", tmp_path / "target", num_hidden_layers=4, vocab_size=len(tiny_tokenizer()))
    tiny_tokenizer().save_pretrained(folder)
    save_draft(random_draft(load_target(folder, precision="fp32")), tmp_path / "draft", dtype=torch.float32)
    return [
        f"target.source={folder}",
        "target.precision=fp32",
        f"draft.checkpoint={tmp_path / 'draft'}",
        "engine.max_seq_len=64",
        "engine.adaptive=false",
        "engine.threads=1",
    ]


def turn(tokens_per_s: float, *, rounds: int, token: int = 1) -> Turn:
    return Turn([[token] * 60], 60 / tokens_per_s, [rounds] + [0] * (len(PLANS) - 1))


def test_a_row_compares_with_the_first_arm_turn_by_turn() -> None:
    """A machine that is twice as fast in the second turn changes no ratio."""
    turns = [{"first": turn(100 * speed, rounds=30), "b": turn(110 * speed, rounds=20)} for speed in (1, 2)]
    found = row(turns, "b")
    assert found["ratio"] == pytest.approx((1.1, 1.1, 1.1))
    assert (found["tokens_a_round"], row(turns, "first")["tokens_a_round"]) == (3.0, 2.0)
    assert (found["plans"]["plain"], found["unequal"], found["turns"]) == (1.0, 0, 2)


def test_answers_that_differ_are_counted() -> None:
    turns = [{"first": turn(100, rounds=30), "b": turn(100, rounds=30, token=token)} for token in (1, 1, 2)]
    assert row(turns, "b")["unequal"] == 1


def test_an_arm_is_a_name_and_settings() -> None:
    assert parse_arm("default=") == ("default", [])
    assert parse_arm("a=engine.lookup=false,draft.checkpoint=x") == ("a", ["engine.lookup=false", "draft.checkpoint=x"])


def test_arms_share_one_target(overrides: list[str]) -> None:
    engines, _ = build_arms({"a": [], "b": ["engine.max_draft_tokens=2"]}, overrides)
    assert engines["a"].target is engines["b"].target
    with pytest.raises(ConfigError, match="--arm b: arms share one target"):
        build_arms({"a": [], "b": ["target.precision=bf16"]}, overrides)
