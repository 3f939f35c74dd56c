"""The comparison with other engines: what it counts, runs and writes, with fake servers and a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from aurora_lit.bench.load import Answer
from aurora_lit.errors import AuroraError
from benchmarks.peers.client import Load, summarise
from benchmarks.peers.report import Pair, ServerRun
from benchmarks.peers.report import summarise as ratios


def test_speed_is_over_all_answers_and_pauses_are_between_pieces() -> None:
    first = Answer(sent_s=0.0, pieces_s=(1.0, 1.5, 3.0), ended_s=3.0, tokens=9, text="a")
    second = Answer(sent_s=1.0, pieces_s=(4.0, 4.5), ended_s=5.0, tokens=6, text="b")
    load = summarise([first, second])
    assert load.tokens_per_s == 15 / 5
    assert load.first_token_s == 2.0  # 1 and 3
    assert load.token_s == pytest.approx((2 / 8 + 0.5 / 5) / 2)
    assert load.pause_p50_s == 0.5  # 0.5, 0.5, 1.5
    assert load.pause_p99_s == pytest.approx(1.48)
    assert load.texts == ["a", "b"]
    with pytest.raises(AuroraError, match="without text"):
        summarise([first, replace(second, pieces_s=())])
    with pytest.raises(AuroraError, match="nothing to time"):
        summarise([replace(first, pieces_s=(1.0,))])


def load(tokens_per_s: float, *texts: str) -> Load:
    return Load(
        tokens_per_s=tokens_per_s,
        first_token_s=0.1,
        token_s=1 / tokens_per_s,
        pause_p50_s=0.02,
        pause_p99_s=0.03,
        tokens=128,
        texts=list(texts or ("a",)),
    )


def server_run(loads: dict[int, Load], *, memory_mb: float = 900.0) -> ServerRun:
    return ServerRun(loads=loads, first_answer_s=12.0, memory_mb=memory_mb)


def test_ratios_are_computed_within_a_pair_with_quartiles_over_repeats() -> None:
    speeds = [(100.0, 50.0), (30.0, 10.0), (400.0, 100.0), (90.0, 90.0), (50.0, 10.0)]
    pairs = [
        Pair(
            repeat=i,
            peer="vllm",
            ours=server_run({4: load(ours, "a", "b")}),
            theirs=server_run({4: load(theirs, "a", "x")}, memory_mb=1800.0),
        )
        for i, (ours, theirs) in enumerate(speeds)
    ]
    (row,) = ratios(pairs)
    assert (row["peer"], row["clients"], row["repeats"]) == ("vllm", 4, 5)
    assert row["ratios"]["tokens_per_s"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert row["ratios"]["token_s"]["median"] == pytest.approx(1 / 3)
    assert (row["ratios"]["memory_mb"]["median"], row["ratios"]["first_answer_s"]["median"]) == (0.5, 1.0)
    assert (row["ours"]["tokens_per_s"], row["theirs"]["tokens_per_s"]) == (90.0, 50.0)
    assert row["same_answers"] == 0.5
    assert Pair.from_json(json.loads(json.dumps(pairs[0].to_json()))) == pairs[0]
