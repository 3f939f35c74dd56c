"""When copies are looked for: the more rarely the longer none were found, for all sequences in the same rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_engine, request, save_model

from aurora_lit.kernels.suffix_index import NO_COPIES, Copies, LookUp
from aurora_lit.models.target import Target
from aurora_lit.serve.speculation import proposer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder: Path = save_model("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return Target.load(folder, precision="fp32")


@pytest.mark.parametrize(("rounds", "expected"), [(slice(0, 8), 8), (slice(8, 56), 24), (slice(56, 88), 8)])
def test_sequences_without_copies_are_looked_up_ever_more_rarely_and_together(
    target: Target, monkeypatch: pytest.MonkeyPatch, rounds: slice, expected: int
) -> None:
    asked = list[int]()
    """In each round, for how many of three sequences copies were looked for."""

    def find_nothing(_tokens_SL: torch.Tensor, rows: LookUp, **_how: Any) -> list[Copies]:
        asked[-1] += len(rows.slots)
        return [NO_COPIES] * len(rows.slots)

    monkeypatch.setattr(proposer, "look_up_copies", find_nothing)
    engine = make_engine(target, None, adaptive=True, copied_tokens=8)
    monkeypatch.setattr(engine.floor, "allows", lambda *_args, **_how: True)
    for number in range(3):
        engine.submit(request(str(number), (3,) * (3 + number), max_tokens=120))
    while engine.has_work and len(asked) < 101:
        asked.append(0)
        engine.round()
    decoding = asked[asked.index(3) :][:88]
    assert set(decoding) == {0, 3}, "all of them or none"
    assert decoding[rounds].count(3) == expected
