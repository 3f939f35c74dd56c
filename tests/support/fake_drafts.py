"""Drafts for a server on the engine without a model, which loads no more of them than their configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aurora_lit.drafts.store import DraftStore
from aurora_lit.modules.draft.eagle3 import Eagle3Config, Eagle3Draft

SMALL_SHAPE: dict[str, Any] = {
    "hidden_size": 8,
    "target_hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 11,
    "draft_vocab_size": 7,
    "aux_layer_ids": (1, 2, 3),
}


def publish_draft(folder: Path) -> DraftStore:
    """Publish the next version in the run folder `live` of `folder`, the checkpoints of a FakeServer."""
    store = DraftStore(folder / "live", keep=5)
    store.publish(Eagle3Draft(Eagle3Config(**SMALL_SHAPE)), record={})
    return store
