"""Three servers in turn: which rows a phase comes to."""

from __future__ import annotations

import pytest

from benchmarks.live_learning import row
from benchmarks.paired import Outcome


def outcome(tokens_per_s: float, *, rounds: int, text: str = "a") -> Outcome:
    return Outcome(tokens=60, tokens_per_s=tokens_per_s, texts=[text], rounds=rounds, speculating_rounds=rounds)


def test_a_row_compares_with_the_frozen_server_turn_by_turn() -> None:
    """A machine that is twice as fast in the second turn changes no ratio."""
    turns = [
        {
            "learning": outcome(110 * speed, rounds=20),
            "frozen": outcome(100 * speed, rounds=30),
            "both": outcome(125 * speed, rounds=15),
        }
        for speed in (1, 2)
    ]
    found = row(turns)
    assert found["learning"] == pytest.approx((1.1, 1.1, 1.1))
    assert found["both"] == pytest.approx((1.25, 1.25, 1.25))
    assert [found[f"{name}_tokens_a_round"] for name in ("learning", "frozen", "both")] == [3.0, 2.0, 4.0]
    assert (found["turns"], found["unequal"]) == (2, 0)


def test_answers_that_differ_are_counted() -> None:
    same = {name: outcome(100, rounds=20) for name in ("learning", "frozen", "both")}
    assert row([same, {**same, "both": outcome(100, rounds=20, text="b")}])["unequal"] == 1
