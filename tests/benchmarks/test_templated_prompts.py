"""Templated traffic: repeatable, varied, and readable as prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_lit.learn.pretrain.prompts import read_prompts
from benchmarks.templated_prompts import KINDS, make_prompts, write_prompts


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_and_another_differs(kind: str) -> None:
    assert make_prompts(kind, 20, seed=3) == make_prompts(kind, 40, seed=3)[:20]
    assert not set(make_prompts(kind, 20, seed=3)) & set(make_prompts(kind, 20, seed=4))


@pytest.mark.parametrize(
    ("kind", "shared_before", "shared_after"), [("mails", 1, 0), ("alerts", 1, 1), ("billing", 1, 0), ("support", 1, 0)]
)
def test_prompts_have_the_same_instructions_and_different_contents(
    kind: str, shared_before: int, shared_after: int
) -> None:
    paragraphs = [prompt.split("\n\n") for prompt in make_prompts(kind, 600)]
    contents = {"\n\n".join(each[shared_before : len(each) - shared_after]) for each in paragraphs}
    assert len({tuple(each[:shared_before]) for each in paragraphs}) == 1
    assert len({tuple(each[len(each) - shared_after :]) for each in paragraphs}) == 1
    assert len(contents) == 600
    assert not any("{" in content or "}" in content for content in contents)  # every placeholder is filled in


def test_files_are_prompt_files_of_one_domain_each(tmp_path: Path) -> None:
    for path in write_prompts(tmp_path, 5):
        prompts = read_prompts(path)
        assert [prompt.domain for prompt in prompts] == [path.stem] * 5
        assert [prompt.messages[0] for prompt in prompts] == make_prompts(path.stem, 5)
