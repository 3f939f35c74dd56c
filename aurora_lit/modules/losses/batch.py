"""The batches that the draft learns from: padded traces, and for online learning the rounds served along them.

Leaves out where they come from (learn/data/), and the losses (modules/losses/draft_module.py).

Shapes: B traces, T positions, H target hidden size, 3H three hidden states side by side, Q rounds of all traces, K
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
class Rounds:
    """Rounds in which the draft proposed. Every field has one row for each round; there may be none (Q = 0).

    Proposal 0 of a round is for the token after the root. The target's distribution that verifies proposal i is the one
    after the root and the proposals 0 … i − 1, whether these were accepted or not.

    Rounds of n-gram lookup are left out, and so are rounds with root 0: there is no token before such a root, so the
    draft has no position to propose from.
    """

    row_Q: Tensor
    """int64. Index of the trace in the batch."""
    root_Q: Tensor
    """int64, ≥ 1. Position in that trace of the last token that was committed when the round began."""
    proposal_QK: Tensor
    """int64 target ids; −1 after a round's last proposal."""
    num_proposed_Q: Tensor
    """int64, 1 … K."""
    num_accepted_Q: Tensor
    """int64."""
    behaviour_logprob_QK: Tensor
    """fp32. Log-probability of the proposal under the distribution that it was drawn from to explore. NaN after a
    round's last proposal, and in rounds that do not explore: these have no policy ratio."""
    temperature_Q: Tensor
    """fp32. The request's; 0 is greedy."""
    draft_temperature_Q: Tensor
    """fp32. The temperature that proposals were drawn at to explore; 1 in other rounds."""
    path_last_QKH: Tensor
    """The target's last hidden state whose distribution verifies proposal i; zeros after a round's last proposal."""
    path_lse_QK: Tensor
    """fp32. Log-sum-exp, over the target's whole vocabulary, of that distribution's logits divided by the request's
    temperature (of the logits themselves if it is 0); 0 after a round's last proposal."""
    path_top_QK: Tensor
    """int64. Target id of that distribution's largest logit over the whole vocabulary; −1 after a round's last
    proposal."""
    fresh_Q: Tensor
    """bool. True if the draft that proposed is recent enough for a policy gradient."""

    @staticmethod
    def none(target_hidden: int) -> Rounds:
        """No rounds; `target_hidden`: the target's hidden size."""
        ints, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return Rounds(
            row_Q=ints,
            root_Q=ints,
            proposal_QK=ints[:, None],
            num_proposed_Q=ints,
            num_accepted_Q=ints,
            behaviour_logprob_QK=floats[:, None],
            temperature_Q=floats,
            draft_temperature_Q=floats,
            path_last_QKH=torch.zeros(0, 1, target_hidden, dtype=torch.bfloat16),
            path_lse_QK=floats[:, None],
            path_top_QK=ints[:, None],
            fresh_Q=torch.zeros(0, dtype=torch.bool),
        )

    def __len__(self) -> int:
        """The number of rounds Q."""
        return len(self.row_Q)

    @property
    def is_proposal_QK(self) -> Tensor:
        """bool. False after a round's last proposal."""
        step_K = torch.arange(self.proposal_QK.shape[1], device=self.proposal_QK.device)
        return step_K < self.num_proposed_Q[:, None]

    def to(self, device: torch.device | str) -> Rounds:
        """The rounds with their tensors on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in _tensors(self).items()})

    def select(self, index: Tensor) -> Rounds:
        """Some of the rounds; `index`: their int64 indices, or a mask of all rounds, bool."""
        return replace(self, **{name: tensor[index] for name, tensor in _tensors(self).items()})


@dataclass(frozen=True, kw_only=True)
class OnlineBatch:
    """Live and replayed traces, with the rounds of the live ones."""

    traces: TraceBatch
    live_B: Tensor
    """bool. True: new traffic; False: replay."""
    rounds: Rounds

    live_fraction: float = 1.0
    """Of the live traces' summed weights in the whole batch, how much is in this shard (see `shard`)."""
    replay_fraction: float = 1.0
    """The same for the replayed traces."""
    rounds_fraction: float = 1.0
    """Of the rounds with a policy ratio in the whole batch, how many are in this shard."""

    @staticmethod
    def without_rounds(traces: TraceBatch) -> OnlineBatch:
        """Traces that are all new, and none of whose rounds are known."""
        live_B = torch.ones(len(traces.token_ids_BT), dtype=torch.bool)
        return OnlineBatch(traces=traces, live_B=live_B, rounds=Rounds.none(traces.last_BTH.shape[2]))

    def shard(self, rank: int, *, world_size: int) -> OnlineBatch:
        """The part of the batch that one process of a data-parallel step learns from.

        It has every `world_size`-th trace, with its rounds. The shards' supervised losses add up to the whole batch's.
        A process with no trace gets one of weight 0, since all processes must take the step.
        """
        if world_size == 1:
            return self
        num_traces = len(self.live_B)
        row_P = torch.arange(rank, num_traces, world_size)
        has_traces = len(row_P) > 0
        row_P = row_P if has_traces else torch.zeros(1, dtype=torch.int64)
        in_shard_B = torch.isin(torch.arange(num_traces), row_P) & has_traces
        in_shard_Q = torch.isin(self.rounds.row_Q, row_P) & has_traces
        traces, rounds = self.traces.select(row_P), self.rounds.select(in_shard_Q)
        weight_B = self.traces.weight_BT[:, 1:].sum(1)  # no token before the first proposes it
        has_ratio_Q = self.rounds.fresh_Q & self.rounds.behaviour_logprob_QK.isfinite().any(-1)
        return OnlineBatch(
            traces=replace(traces, weight_BT=traces.weight_BT * has_traces),
            live_B=self.live_B[row_P],
            rounds=replace(rounds, row_Q=torch.searchsorted(row_P, rounds.row_Q)),
            live_fraction=_fraction(weight_B * self.live_B, in_shard_B),
            replay_fraction=_fraction(weight_B * ~self.live_B, in_shard_B),
            rounds_fraction=_fraction(has_ratio_Q, in_shard_Q),
        )

    def to(self, device: torch.device | str) -> OnlineBatch:
        """The batch with its tensors on another device."""
        return replace(
            self, traces=self.traces.to(device), live_B=self.live_B.to(device), rounds=self.rounds.to(device)
        )


def _tensors(record: TraceBatch | Rounds) -> dict[str, Any]:
    """The fields that are tensors."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def _fraction(weight_N: Tensor, in_shard_N: Tensor) -> float:
    """Of the summed weights, the fraction in the shard; 0 if the sum is 0."""
    total = float(weight_N.sum())
    return float((weight_N * in_shard_N).sum()) / total if total else 0.0
