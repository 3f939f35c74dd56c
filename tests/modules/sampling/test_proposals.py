"""What one draft step proposes, and the draft's reduced vocabulary."""

from dataclasses import replace

import torch
from support.toy_sampling import BASE, GREEDY

from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.modules.sampling.proposals import DraftVocabulary, propose


def test_unseeded_sequences_propose_by_drawing_and_all_others_by_the_argmax() -> None:
    logits = torch.zeros(3, 4)
    logits[:, 2] = 0.5
    options = LogitOptions.from_params([GREEDY, replace(BASE, seed=1), BASE])
    last = torch.full((3,), 0.999, dtype=torch.float64)
    tokens, q = propose(logits, options=options, uniform_B=last)
    assert tokens.tolist() == [2, 2, 3]
    assert q is not None
    torch.testing.assert_close(q[2], logits[2].softmax(-1))
    tokens, q = propose(
        logits, options=LogitOptions.from_params([GREEDY, GREEDY, replace(BASE, seed=1)]), uniform_B=last
    )
    assert q is None
    assert tokens.tolist() == [2, 2, 2]


def test_a_vocabulary_from_offsets_maps_in_both_directions() -> None:
    ids = torch.tensor([1, 4, 6, 2])
    vocabulary = DraftVocabulary.from_offsets(ids - torch.arange(4), vocab_size=8)
    assert vocabulary.target_id_D.tolist() == ids.tolist()
    assert vocabulary.draft_id_V.tolist() == [-1, 0, 3, -1, 1, -1, 2, -1]
