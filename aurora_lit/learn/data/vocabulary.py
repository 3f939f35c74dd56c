"""The adaptive draft vocabulary: tokens that traffic uses enter, unused tokens leave, the size stays the same.

Uses are counted by domain and old ones are discounted within a domain only, so that a domain without current traffic
keeps its tokens. A token replaces one that is used at most half as often, so that two tokens of similar use do not
alternate. Among unused tokens the highest ids leave first, since tokenizers number tokens by frequency.
Leaves out when the vocabulary is changed (learn/online/loop.py).

Shapes: V target vocabulary, D draft vocabulary, N new tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.traces.record import Trace

FEWEST_USES = 4
"""Uses a token needs to enter."""
USES_A_TRACE = 2
"""At most so many uses of a token count per trace, so that no single request brings a token in."""
_AHEAD = 2.0
"""A token must be used at least so many times as often as the one it replaces."""
_MOST_SHARE = 1 / 16
"""Largest share of the vocabulary that is replaced at once."""
_MEMORY_USES = 100_000
"""When a domain's uses exceed this number, all of them are halved."""
_LAST_STATES_PER_PASS = 32
"""Last hidden states of answers that the head evaluates together."""
_RIDGE = 1e-3
"""Ridge parameter of the linear map, as a share of the mean diagonal of the Gram matrix."""


class VocabularyUse:
    """Counts how often the target generated each token, and proposes a better draft vocabulary.

    >>> use = VocabularyUse(target_head)
    >>> use.add(trace)
    >>> ids_D = use.better_ids(draft.draft_token_ids)       # None: no token should enter
    """

    def __init__(self, target_head: TargetHead) -> None:
        self._target_head = target_head
        self._uses: dict[str, Tensor] = {}
        """By domain, fp32 [V]."""
        self._pending: list[tuple[str, Tensor]] = []
        """Domains and last hidden states [1, H] of answers whose final token is not counted yet."""

    def add(self, trace: Trace) -> None:
        """Count an answer's tokens, and the target's first choice after the last one: traces do not hold end tokens."""
        if trace.answer_start == len(trace.token_ids_T):
            return
        domain = trace.domain if trace.domain in self._uses or len(self._uses) < MAX_DOMAINS else ""
        times_V = torch.bincount(trace.token_ids_T[trace.answer_start :].long(), minlength=self._target_head.vocab_size)
        uses_V = self._uses.setdefault(domain, torch.zeros(self._target_head.vocab_size))
        uses_V += times_V.clamp_max(USES_A_TRACE)
        if float(uses_V.sum()) > _MEMORY_USES:
            uses_V *= 0.5
        self._pending.append((domain, trace.last_TH[-1:].clone()))
        if len(self._pending) == _LAST_STATES_PER_PASS:
            self._count_final_tokens()

    def _count_final_tokens(self) -> None:
        """Count the pending answers' final tokens together, since the head takes as long for one state as for all."""
        if not self._pending:
            return
        last_NH = torch.cat([last_1H for _, last_1H in self._pending])
        final_N = self._target_head.evaluate(last_NH, temperature=0.0).top_N.tolist()
        for (domain, _), token in zip(self._pending, final_N, strict=True):
            self._uses[domain][token] += 1
        self._pending.clear()

    @property
    def uses_V(self) -> Tensor:
        """Uses of every token, all domains together."""
        self._count_final_tokens()
        return sum(self._uses.values(), torch.zeros(self._target_head.vocab_size))

    def coverage(self, ids_D: Tensor) -> float:
        """Share of all uses that are of tokens in a vocabulary; 1 before any use."""
        uses_V = self.uses_V
        return float(uses_V[ids_D.cpu()].sum() / uses_V.sum()) if float(uses_V.sum()) else 1.0

    def better_ids(self, ids_D: Tensor) -> Tensor | None:
        """The vocabulary, as sorted ids, with the tokens that should enter; None if none should."""
        uses_V, ids_D = self.uses_V, ids_D.cpu()
        outside_V = torch.ones(len(uses_V), dtype=torch.bool)
        outside_V[ids_D] = False
        coming = (outside_V & (uses_V >= FEWEST_USES)).nonzero()[:, 0]
        coming = coming[uses_V[coming].argsort(descending=True, stable=True)]
        leaving = ids_D.flip(0)
        leaving = leaving[uses_V[leaving].argsort(stable=True)]
        most = min(len(coming), max(1, int(_MOST_SHARE * len(ids_D))))
        coming, leaving = coming[:most], leaving[:most]
        # Both are sorted, so the pairs to replace come first.
        count = int((uses_V[coming] >= _AHEAD * uses_V[leaving]).sum())
        if not count:
            return None
        kept = ids_D[~torch.isin(ids_D, leaving[:count])]
        return torch.cat([kept, coming[:count]]).sort().values

    def state_dict(self) -> dict[str, Any]:
        """Uses by domain."""
        self._count_final_tokens()
        return {"uses": dict(self._uses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._pending.clear()
        self._uses = {domain: uses_V.float().cpu() for domain, uses_V in state["uses"].items()}


@torch.no_grad()
def change_vocabulary(draft: Eagle3Draft, ids_D: Tensor, head_VH: Tensor, *, per_row: list[Tensor]) -> int:
    """Give a draft another vocabulary of the same size, in place; returns how many tokens are new.

    Tokens that stay keep their rows of the draft's head. Rows of new tokens are predicted from the target's head by the
    linear map that best predicts the draft's rows from the target's. Measured on tokens that were removed from a
    trained draft and added again: accepted length 1.67 with the map, 1.61 without the tokens, 1.20 with the target's
    own rows.
    `per_row`: other tensors with one row a token, such as an optimiser's moments; rows of new tokens become 0.
    """
    weight_DH, had_D, ids_D = draft.lm_head.weight, draft.draft_token_ids, ids_D.to(draft.d2t.device)
    assert len(ids_D) == len(had_D)
    place_D = torch.searchsorted(had_D, ids_D).clamp_max(len(had_D) - 1)
    new_D = had_D[place_D] != ids_D
    map_HH = linear_map(head_VH[had_D], weight_DH)
    predicted_NH = head_VH[ids_D[new_D]].to(weight_DH) @ map_HH
    for rows in (weight_DH, *per_row):
        rows.copy_(rows[place_D])
        rows[new_D] = 0
    weight_DH[new_D] = predicted_NH
    draft.set_vocabulary(ids_D)
    return int(new_D.sum())


def linear_map(from_DH: Tensor, to_DG: Tensor) -> Tensor:
    """The matrix [H, G] that maps the rows of one matrix to those of the other (ridge regression)."""
    from_DH, to_DG = from_DH.float(), to_DG.float()
    gram_HH = from_DH.T @ from_DH
    gram_HH.diagonal().add_(_RIDGE * float(gram_HH.diagonal().mean()))
    solved: Tensor = torch.linalg.solve(gram_HH, from_DH.T @ to_DG)
    return solved
