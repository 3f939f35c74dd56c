"""What the draft learns from: traces padded together, and the rounds that were served along them.

What is left out: where they come from (learn/), and the losses (modules/losses/draft_module.py).

Shapes: B rows, T positions, H target hidden, Q rounds of all rows, K proposals of the widest round.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

_Batch = TypeVar("_Batch", "DraftBatch", "OnlineBatch")


@dataclass(frozen=True, kw_only=True)
class DraftBatch:
    """Traces of several sequences, right-padded together."""

    token_ids_BT: Tensor
    """int64."""
    aux_BT3H: Tensor
    """The target's three hidden states."""
    last_BTH: Tensor
    """What the target's head saw."""
    lse_BT: Tensor
    """Log-sum-exp of the target's logits."""
    weight_BT: Tensor
    """fp32. How much the target distribution at this position counts; 0 on padding."""
    domains: tuple[str, ...]
    """A label a row."""

    def to(self, device: torch.device | str) -> DraftBatch:
        """The same on another device."""
        return _to(self, device)


@dataclass(frozen=True, kw_only=True)
class OnlineBatch:
    """Traces of live traffic and of remembered traffic, with the rounds in which the draft proposed.

    Rounds whose proposals were copied by lookup are left out, and so are rounds with root 0: nothing before their root
    is known, so the draft has no position to propose from. Q may be 0.

    The first proposal of a round stands for the token behind the root, and the target's distribution that judges
    proposal i is the one after the root and the proposals 0 … i − 1, whether these were accepted or not.
    """

    traces: DraftBatch
    live_B: Tensor
    """bool: newest traffic; false: replay."""
    row_Q: Tensor
    """int64: the row of `traces` a round belongs to."""
    root_Q: Tensor
    """int64, ≥ 1: index in that row of the last token committed when the round began."""
    proposal_QK: Tensor
    """int64 target ids; −1 beyond a round's number."""
    num_proposed_Q: Tensor
    """int64, 1..K."""
    num_accepted_Q: Tensor
    """int64."""
    behaviour_logprob_QK: Tensor
    """fp32: log-probability of the proposal under the distribution that it was drawn from. NaN where it was not drawn
    but chosen (the draft's argmax), and beyond a round's number: such a round has no policy ratio."""
    temperature_Q: Tensor
    """fp32: the request's; 0 is greedy."""
    draft_temperature_Q: Tensor
    """fp32: what the draft's logits were divided by to draw the proposals; 1 where they were not drawn."""
    greedy_verify_Q: Tensor
    """bool: a proposal is accepted if it equals the target's own token, which is its argmax (temperature 0) or its
    seeded draw; false: accepted with min(1, p/q)."""
    path_last_QKH: Tensor
    """What the target's head saw at the distribution that judges proposal i; zeros beyond a round's number."""
    path_lse_QK: Tensor
    """fp32: log-sum-exp over the whole target vocabulary of that distribution's logits **divided by the request's
    temperature** (of the logits as they are where it is 0); 0 beyond a round's number."""
    path_top_QK: Tensor
    """int64: target id of that distribution's largest logit over the whole target vocabulary; −1 beyond a round's
    number."""
    fresh_Q: Tensor
    """bool: proposed by a draft recent enough to learn a policy from."""

    live_part: float = 1.0
    """Share that the live rows here have of those of a whole batch, by their weights; see `part`."""
    replay_part: float = 1.0
    """The same of the remembered rows."""
    rounds_part: float = 1.0
    """The same of the rounds with a policy ratio."""

    def part(self, number: int, *, of: int) -> OnlineBatch:
        """What process `number` of so many learns from: every `of`-th row, with its rounds.

        The parts' supervised losses add up to the whole batch's. A part without rows gets one that counts nothing,
        since all processes must take the step.
        """
        if of == 1:
            return self
        traces, num_rows = self.traces, len(self.live_B)
        row_P = torch.arange(number, num_rows, of)
        counts = len(row_P) > 0
        row_P = row_P if counts else torch.zeros(1, dtype=torch.int64)
        drawn_Q = self.fresh_Q & self.behaviour_logprob_QK.isfinite().any(-1)
        kept_Q = torch.isin(self.row_Q, row_P) & counts
        weight_B = traces.weight_BT.sum(1)
        of_tensors = {name: value[row_P] for name, value in vars(traces).items() if isinstance(value, Tensor)}
        of_rounds = {name: value[kept_Q] for name, value in vars(self).items() if name.endswith(("_Q", "_QK", "_QKH"))}
        of_tensors["weight_BT"] = of_tensors["weight_BT"] * counts
        of_rounds["row_Q"] = torch.searchsorted(row_P, of_rounds["row_Q"])
        mine_B = torch.isin(torch.arange(num_rows), row_P) & counts
        return replace(
            self,
            traces=replace(traces, **of_tensors, domains=tuple(traces.domains[row] for row in row_P.tolist())),
            live_B=self.live_B[row_P],
            live_part=_share(weight_B * self.live_B, mine_B),
            replay_part=_share(weight_B * ~self.live_B, mine_B),
            rounds_part=_share(drawn_Q, kept_Q),
            **of_rounds,
        )

    def to(self, device: torch.device | str) -> OnlineBatch:
        """The same on another device."""
        return _to(self, device)


def _share(weight_N: Tensor, mine_N: Tensor) -> float:
    """Of the summed weights, how much is mine; 0 of nothing."""
    total = float(weight_N.sum())
    return float((weight_N * mine_N).sum()) / total if total else 0.0


def _to(batch: _Batch, device: torch.device | str) -> _Batch:
    moved: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor | DraftBatch):
            moved[field.name] = value.to(device)
    return replace(batch, **moved)
