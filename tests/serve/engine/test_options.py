"""EngineOptions, and the capacity of a slot that follows from them."""

from __future__ import annotations

import pytest
from support.tiny_models import make_engine, random_draft

from aurora_lit.models.target import Target
from aurora_lit.serve.engine.options import slot_capacity


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({"max_draft_tokens": 4, "sibling_tokens": 0, "copied_tokens": 0}, 105),
        ({"max_draft_tokens": 4, "sibling_tokens": 3, "copied_tokens": 0}, 109),
        ({"max_draft_tokens": 4, "sibling_tokens": 3, "copied_tokens": 15}, 116),
        ({"max_draft_tokens": 8, "sibling_tokens": 1, "copied_tokens": 0}, 117),
    ],
)
def test_a_slot_has_room_for_the_proposals_of_a_round(options: dict[str, int], capacity: int) -> None:
    assert slot_capacity(max_seq_len=100, **options) == capacity


def test_an_engines_slots_have_that_capacity(target: Target) -> None:
    engine = make_engine(target, random_draft(target), max_seq_len=60, sibling_tokens=3, copied_tokens=7)
    tokens = {"max_draft_tokens": 4, "sibling_tokens": 3, "copied_tokens": 7}
    assert engine.slot_capacity == slot_capacity(max_seq_len=60, **tokens)
