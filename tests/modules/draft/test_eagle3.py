"""The draft's reduced vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from support.tiny_models import random_draft, save_model

from aurora_lit.models.loading import load_target


def test_the_vocabulary_in_a_checkpoints_terms(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), precision="fp32")
    draft = random_draft(target, draft_vocab_size=4)
    draft.set_vocabulary(torch.tensor([2, 3, 30, 60]))
    assert draft.d2t.tolist() == [2, 2, 28, 57]
    assert draft.t2d.nonzero().flatten().tolist() == [2, 3, 30, 60]
    assert draft.draft_token_ids.tolist() == [2, 3, 30, 60]
