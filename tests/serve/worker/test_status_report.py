"""What the engine worker writes into its status page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aurora_lit.serve.worker.status_report import _memory_fields


def test_each_figure_of_the_memory_has_its_own_field() -> None:
    stats = SimpleNamespace(answers=3, look_ups=4, hits=5, proposed=6, accepted=7)
    memory: Any = SimpleNamespace(index=SimpleNamespace(capacity=9, counts=(1, 2)), stats=stats)
    assert _memory_fields(None) == {}
    assert _memory_fields(memory) == {
        "memory_capacity": 9,
        "memory_tokens": 1,
        "memory_evicted": 2,
        "memory_answers": 3,
        "memory_look_ups": 4,
        "memory_hits": 5,
        "memory_proposed": 6,
        "memory_accepted": 7,
    }
