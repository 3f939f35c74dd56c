"""What the engine reports about its rounds to an observer, for recording traces.

Left out: what the observer does with it (serve/engine/trace_recorder.py).

Shapes: S slots, L capacity of a slot, F = 3H auxiliary features, B sequences, T positions, K proposals, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from aurora_lit.modules.sampling.distribution import is_greedy, uses_temperature_only
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.tree import first_choices
from aurora_lit.request import Output
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.traces.record import SOURCE_DRAFT, SOURCE_LOOKUP, SOURCE_NONE


class RoundNote(NamedTuple):
    """One round of one sequence, as a trace records it."""

    root: int
    """Position of the last committed token when the round began."""
    version: str
    """The draft's version; "" if the draft proposed nothing."""
    source: int
    """Where the proposals come from: one of traces.record.SOURCE_…"""
    explored: bool
    """True if the proposals were sampled at the exploration temperature."""
    draft_temperature: float
    """By which the draft's logits were divided before sampling; 1 where the proposals are the argmax."""
    proposals: list[int]
    """Without those that the end of the request cut off. Of n-gram lookup, only up to the first rejected one."""
    logprobs: list[float] | None
    """Behaviour log-probabilities of the proposals. None for lookup, and where p differs from the softmax of the
    target's logits at the request's temperature: a learner computes p from these alone, so that it would take wrong
    rewards from such a round."""
    accepted: int


class RoundObserver(Protocol):
    """Receives what the target computed and what each round proposed and accepted."""

    def attach(self, *, tokens_SL: torch.Tensor, aux_SLF: torch.Tensor | None) -> None:
        """Called once by the engine, with its committed tokens and the auxiliary states that the drafter keeps.

        `aux_SLF` None: there is no drafter, so an observer that needs these states keeps them itself.
        """

    def on_forward(
        self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor, last_BTH: torch.Tensor
    ) -> None:
        """The target computed positions start, start + 1, … of each slot. Rejected ones are computed again later."""

    def on_prefix_copy(self, *, source: int, slot: int, length: int) -> None:
        """The first `length` positions of a slot were copied from another, so the target does not compute them."""

    def on_commit(self, sequence: RunningSequence, note: RoundNote, last_TH: torch.Tensor) -> None:
        """A round of a sequence was committed. `last_TH`: the last hidden states of its root and its proposals."""

    def on_finish(self, sequence: RunningSequence) -> None:
        """A request finished or was cancelled; the target has computed all its tokens but the last."""


def notify_forward(
    observer: RoundObserver,
    sequences: Sequence[RunningSequence],
    *,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    aux_BT3H: torch.Tensor,
    last_BTH: torch.Tensor,
) -> None:
    """Report a forward pass of the target, without the requests that may not be stored."""
    stored = [i for i, sequence in enumerate(sequences) if sequence.request.store]
    if len(stored) < len(sequences):
        slots_B, starts_B, aux_BT3H, last_BTH = slots_B[stored], starts_B[stored], aux_BT3H[stored], last_BTH[stored]
    if stored:
        observer.on_forward(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH)


def notify_round(
    observer: RoundObserver,
    sequences: Sequence[RunningSequence],
    outputs: Sequence[Output],
    *,
    proposals: Proposals,
    last_BTH: torch.Tensor,
    version: str,
    explore_temperature: float,
) -> None:
    """Report a committed round, without the requests that may not be stored.

    Of a tree, only the chain of first choices is reported, as if it alone had been proposed: a draft learns from its
    first choices and is evaluated by them.
    """
    proposals, last_BTH = _chains_of_first_choices(proposals, last_BTH)
    tokens = proposals.token_BK.tolist()
    logprobs = None if proposals.logprob_BK is None else proposals.logprob_BK.tolist()
    proposed = proposals.num_proposed_B.tolist()
    for i, (sequence, output) in enumerate(zip(sequences, outputs, strict=True)):
        if not sequence.request.store:
            continue
        params = sequence.params
        accepted, committed = output.chain_accepted, len(output.token_ids)
        # Without a token after the accepted ones the request ended there, and the other proposals were not verified.
        count = proposed[i] if committed > accepted else accepted
        source = SOURCE_NONE if not count else SOURCE_LOOKUP if sequence.uses_lookup else SOURCE_DRAFT
        drafted = source == SOURCE_DRAFT
        if source == SOURCE_LOOKUP:
            count = min(count, accepted + 1)  # nothing is learned from looked-up tokens after a rejected one
        temperature = 1.0
        if drafted and sequence.is_exploring:
            temperature = explore_temperature
        elif drafted and params.seed is None and not is_greedy(params):
            temperature = params.temperature
        note = RoundNote(
            root=sequence.length - committed - 1,
            version=version if drafted else "",
            source=source,
            explored=drafted and sequence.is_exploring,
            draft_temperature=temperature,
            proposals=tokens[i][:count],
            logprobs=logprobs[i][:count] if drafted and logprobs and uses_temperature_only(params) else None,
            accepted=accepted,
        )
        observer.on_commit(sequence, note, last_BTH[i])


def _chains_of_first_choices(proposals: Proposals, last_BTH: torch.Tensor) -> tuple[Proposals, torch.Tensor]:
    """Each sequence's chain of first choices, and the hidden states of the root and of this chain."""
    if proposals.parent_BK is None:
        return proposals, last_BTH
    counts = proposals.num_proposed_B.tolist()
    parents = proposals.parent_BK.tolist()
    chains = [first_choices(nodes[:count]) for nodes, count in zip(parents, counts, strict=True)]
    width = max(map(len, chains))
    column_BK = torch.tensor([chain + [1] * (width - len(chain)) for chain in chains], device=last_BTH.device)
    token_BK = proposals.token_BK.gather(1, column_BK - 1)
    chain = Proposals(
        token_BK=token_BK,
        num_proposed_B=torch.tensor([len(chain) for chain in chains]),
        q_BKD=None,
        logprob_BK=torch.zeros(token_BK.shape),  # the argmax, not sampled
    )
    index_BT = torch.cat([column_BK.new_zeros(len(chains), 1), column_BK], 1)
    return chain, last_BTH[torch.arange(len(chains))[:, None], index_BT]
