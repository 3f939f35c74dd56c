"""The batches that the draft learns from: padded traces, and for online learning what was proposed along them.

Leaves out where they come from (learn/data/), and the losses (modules/losses/draft_module.py).

Shapes: B traces, T positions, H target hidden size, 3H three hidden states side by side, P proposals of all rounds, K
proposals of the longest round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TraceBatch:
    """Traces of several sequences, right-padded together."""

    token_ids_BT: Tensor
    """int64."""
    aux_BT3H: Tensor
    """The target's three hidden states that the draft reads."""
    last_BTH: Tensor
    """The target's last hidden states after the final norm: the input of its LM head."""
    weight_BT: Tensor
    """fp32. Weight of the target's distribution at this position in the loss; 0 on padding."""
    domains: tuple[str, ...]
    """The domain of each trace."""
    lse_BT: Tensor | None = None
    """Log-sum-exp of the target's logits over its whole vocabulary. Online steps do not need it."""

    def to(self, device: torch.device | str) -> TraceBatch:
        """The batch with its tensors on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in _tensors(self).items()})

    def select(self, row_P: Tensor) -> TraceBatch:
        """The batch of some of the traces; `row_P`: their indices, int64."""
        tensors = {name: tensor[row_P] for name, tensor in _tensors(self).items()}
        return replace(self, **tensors, domains=tuple(self.domains[row] for row in row_P.tolist()))


@dataclass(frozen=True, kw_only=True)
class OnlineBatch:
    """Live and replayed traces, and what the draft proposed in the rounds of the live ones."""

    traces: TraceBatch
    live_B: Tensor
    """bool. True: new traffic; False: replay."""
    proposed_P: Tensor
    """int64. Target ids of all proposals, in any order and number."""
    tested_K: Tensor
    """int64. Rounds in which proposal i was tested: those before it were accepted."""
    accepted_K: Tensor
    """int64. Rounds in which it was accepted: with `tested_K`, acceptance by position as it was served."""

    at_rest: bool = False
    """True: nothing in the whole batch is new, since traffic rests."""
    live_fraction: float = 1.0
    """Of the live traces' summed weights in the whole batch, how much is in this shard (see `shard`)."""
    replay_fraction: float = 1.0
    """The same for the replayed traces."""

    @staticmethod
    def without_rounds(traces: TraceBatch) -> OnlineBatch:
        """Traces that are all new, and none of whose rounds are known."""
        live_B, none = torch.ones(len(traces.token_ids_BT), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
        return OnlineBatch(traces=traces, live_B=live_B, proposed_P=none, tested_K=none, accepted_K=none)

    def shard(self, rank: int, *, world_size: int) -> OnlineBatch:
        """The part of the batch that one process of a data-parallel step learns from: every `world_size`-th trace.

        The shards' losses add up to the whole batch's. A process with no trace gets one of weight 0, since all
        processes must take the step.
        """
        if world_size == 1:
            return self
        num_traces = len(self.live_B)
        row_P = torch.arange(rank, num_traces, world_size)
        has_traces = len(row_P) > 0
        row_P = row_P if has_traces else torch.zeros(1, dtype=torch.int64)
        in_shard_B = torch.isin(torch.arange(num_traces), row_P) & has_traces
        traces = self.traces.select(row_P)
        weight_B = self.traces.weight_BT[:, 1:].sum(1)  # no token before the first proposes it
        return replace(
            self,
            traces=replace(traces, weight_BT=traces.weight_BT * has_traces),
            live_B=self.live_B[row_P],
            live_fraction=_fraction(weight_B * self.live_B, in_shard_B),
            replay_fraction=_fraction(weight_B * ~self.live_B, in_shard_B),
        )

    def to(self, device: torch.device | str) -> OnlineBatch:
        """The batch with its tensors on another device."""
        return replace(
            self, traces=self.traces.to(device), **{name: each.to(device) for name, each in _tensors(self).items()}
        )


def _tensors(record: TraceBatch | OnlineBatch) -> dict[str, Any]:
    """The fields that are tensors."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def _fraction(weight_N: Tensor, in_shard_N: Tensor) -> float:
    """Of the summed weights, the fraction in the shard; 0 if the sum is 0."""
    total = float(weight_N.sum())
    return float((weight_N * in_shard_N).sum()) / total if total else 0.0
