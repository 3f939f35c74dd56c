"""The adaptive draft vocabulary: tokens that traffic uses enter, unused ones leave, and its size stays.

Use is counted by domain, with forgetting within a domain only, so that the tokens of one that is away stay. A token
enters in the place of one that is used at most half as often, so that two of like use do not take turns; among unused
ones the highest ids leave first, since tokenizers number their tokens by frequency. What is left out: when that happens
(learn/online/loop.py).

Shapes: V target vocabulary, D draft vocabulary, N new tokens, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aurora_lit.learn.data.reservoir import MAX_DOMAINS
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.modules.draft.eagle3 import Draft
from aurora_lit.traces.record import Trace

FEWEST_USES = 4
"""Uses with which a token may enter."""
USES_A_TRACE = 2
"""Uses of a token that count of one trace: no single request brings a token in."""
_AHEAD = 2.0
"""By so much a token must be used more than the one that it replaces."""
_MOST_SHARE = 1 / 16
"""Of the vocabulary that is replaced at once."""
_MEMORY_USES = 100_000
"""Uses remembered of a domain, about; beyond them all count half."""
_READ_AT_ONCE = 32
"""Answers whose ends wait to be read together."""
_RIDGE = 1e-3
"""Of the map's regression, as a share of the mean square of what it maps from."""


class VocabularyUse:
    """How often the target said each token lately, and which should be the draft's.

    >>> use = VocabularyUse(ends)
    >>> use.add(trace)
    >>> ids_D = use.better_ids(draft.draft_token_ids)       # None: those it has are fine
    """

    def __init__(self, ends: TargetHead) -> None:
        self._ends = ends
        self._uses: dict[str, Tensor] = {}
        """By domain, fp32 [V]."""
        self._unread: list[tuple[str, Tensor]] = []
        """Domains and last hidden states [1, H] of answers whose ends are not counted yet."""

    def add(self, trace: Trace) -> None:
        """Count an answer's tokens, and the target's first choice behind the last: an end is part of no trace."""
        if trace.answer_start == len(trace.token_ids_T):
            return
        domain = trace.domain if trace.domain in self._uses or len(self._uses) < MAX_DOMAINS else ""
        times_V = torch.bincount(trace.token_ids_T[trace.answer_start :].long(), minlength=self._ends.vocab_size)
        uses_V = self._uses.setdefault(domain, torch.zeros(self._ends.vocab_size))
        uses_V += times_V.clamp_max(USES_A_TRACE)
        if float(uses_V.sum()) > _MEMORY_USES:
            uses_V *= 0.5
        self._unread.append((domain, trace.last_TH[-1:].clone()))
        if len(self._unread) == _READ_AT_ONCE:
            self._count_ends()

    def _count_ends(self) -> None:
        """Many at once: the head is as long read for one row as for all of them."""
        if not self._unread:
            return
        last_NH = torch.cat([last_1H for _, last_1H in self._unread])
        ends_N = self._ends.read(last_NH, temperature=0.0).top_N.tolist()
        for (domain, _), token in zip(self._unread, ends_N, strict=True):
            self._uses[domain][token] += 1
        self._unread.clear()

    @property
    def uses_V(self) -> Tensor:
        """Of every token, all domains together."""
        self._count_ends()
        return sum(self._uses.values(), torch.zeros(self._ends.vocab_size))

    def coverage(self, ids_D: Tensor) -> float:
        """Share of the uses that a vocabulary has; 1 before any."""
        uses_V = self.uses_V
        return float(uses_V[ids_D.cpu()].sum() / uses_V.sum()) if float(uses_V.sum()) else 1.0

    def better_ids(self, ids_D: Tensor) -> Tensor | None:
        """The vocabulary, as sorted ids, with the tokens that should enter; None when none should."""
        uses_V, ids_D = self.uses_V, ids_D.cpu()
        outside_V = torch.ones(len(uses_V), dtype=torch.bool)
        outside_V[ids_D] = False
        coming = (outside_V & (uses_V >= FEWEST_USES)).nonzero()[:, 0]
        coming = coming[uses_V[coming].argsort(descending=True, stable=True)]
        leaving = ids_D.flip(0)
        leaving = leaving[uses_V[leaving].argsort(stable=True)]
        most = min(len(coming), max(1, int(_MOST_SHARE * len(ids_D))))
        coming, leaving = coming[:most], leaving[:most]
        # Both are sorted, so the pairs that are better come first.
        count = int((uses_V[coming] >= _AHEAD * uses_V[leaving]).sum())
        if not count:
            return None
        kept = ids_D[~torch.isin(ids_D, leaving[:count])]
        return torch.cat([kept, coming[:count]]).sort().values

    def state_dict(self) -> dict[str, Any]:
        """Tensors by domain."""
        self._count_ends()
        return {"uses": dict(self._uses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._unread.clear()
        self._uses = {domain: uses_V.float().cpu() for domain, uses_V in state["uses"].items()}


@torch.no_grad()
def change_vocabulary(draft: Draft, ids_D: Tensor, head_VH: Tensor, *, per_row: list[Tensor]) -> int:
    """Give a draft another vocabulary of the same size, in place; how many tokens are new.

    Rows of tokens that stay move along. Those of new ones are predicted from the target's head, by the linear map that
    best tells the draft's rows from the target's. Measured on tokens taken from a trained draft and brought back:
    accepted length 1.67 with the map, 1.61 without the tokens, 1.20 with the target's rows as they are.
    `per_row`: tensors that have a row a token too, such as an optimiser's moments; rows of new tokens become 0.
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
    """The matrix [H, G] that maps rows to rows with the least squares (ridge regression)."""
    from_DH, to_DG = from_DH.float(), to_DG.float()
    gram_HH = from_DH.T @ from_DH
    gram_HH.diagonal().add_(_RIDGE * float(gram_HH.diagonal().mean()))
    solved: Tensor = torch.linalg.solve(gram_HH, from_DH.T @ to_DG)
    return solved
