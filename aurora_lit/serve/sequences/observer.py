"""Watching rounds: what an observer of the engine is told, for recording traces.

Left out: what is made of it (serve/engine/trace_recorder.py).

Shapes: S slots, L capacity, F auxiliary features, B rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from aurora_lit.modules.sampling.distribution import is_greedy, is_plain
from aurora_lit.modules.sampling.tree import first_choices
from aurora_lit.modules.sampling.verification import Proposals
from aurora_lit.request import Output
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.traces.record import SOURCE_DRAFT, SOURCE_LOOKUP, SOURCE_NOBODY


class RoundNote(NamedTuple):
    """One round of one row, as a trace tells it."""

    root: int
    """Position of the last committed token when the round began."""
    version: str
    """The draft's version; "" when the draft proposed nothing."""
    source: int
    """trace.SOURCE_…"""
    explored: bool
    draft_temperature: float
    proposals: list[int]
    """Without those that the request's end cut off, or that stand behind the first refused one of a copy."""
    logprobs: list[float] | None
    """Their behaviour log-probabilities. None for lookup, and where p is more than the target's softmax: a learner has
    only that, and would take wrong rewards from such rounds."""
    accepted: int


class RoundObserver(Protocol):
    """Sees what the target computed: for recording traces."""

    def attach(self, *, tokens_SL: torch.Tensor, aux_SLF: torch.Tensor | None) -> None:
        """Once, by the engine: its committed tokens by slot, and the auxiliary states that the drafter keeps by slot.

        None: there is no drafter, so the observer must keep them itself if it wants them.
        """

    def on_pass(
        self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor, last_BTH: torch.Tensor
    ) -> None:
        """A target pass over positions start, start + 1, … of some slots; rejected ones are passed again later."""

    def on_copy(self, *, source: int, slot: int, length: int) -> None:
        """A slot begins with the first positions of another, which the target does not run again."""

    def on_commit(self, row: RunningSequence, note: RoundNote, last_TH: torch.Tensor) -> None:
        """A round of a row was committed; `last_TH` is what the target computed behind its root and its proposals."""

    def on_finish(self, row: RunningSequence) -> None:
        """A request ended or was cancelled; the target has run all its tokens but the last."""


def notify_forward(
    observer: RoundObserver,
    rows: Sequence[RunningSequence],
    *,
    slots_B: torch.Tensor,
    starts_B: torch.Tensor,
    aux_BT3H: torch.Tensor,
    last_BTH: torch.Tensor,
) -> None:
    """Tell the observer what the target computed, but for requests that nothing may be kept of."""
    kept = [i for i, row in enumerate(rows) if row.request.store]
    if len(kept) < len(rows):
        slots_B, starts_B, aux_BT3H, last_BTH = slots_B[kept], starts_B[kept], aux_BT3H[kept], last_BTH[kept]
    if kept:
        observer.on_pass(slots_B=slots_B, starts_B=starts_B, aux_BT3H=aux_BT3H, last_BTH=last_BTH)


def tell(
    observer: RoundObserver,
    rows: Sequence[RunningSequence],
    outputs: Sequence[Output],
    *,
    proposals: Proposals,
    last_BTH: torch.Tensor,
    version: str,
    explore_temperature: float,
) -> None:
    """Tell the observer what a committed round was, but for requests that nothing may be kept of.

    Of a tree the chain of first choices is told, as if it alone had been proposed: what a draft learns from, and is
    judged by, is what it would say first.
    """
    proposals, last_BTH = _first_chain(proposals, last_BTH)
    tokens = proposals.token_BK.tolist()
    logprobs = None if proposals.logprob_BK is None else proposals.logprob_BK.tolist()
    proposed = proposals.num_B.tolist()
    for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        if not row.request.store:
            continue
        accepted, committed = output.chain_accepted, len(output.token_ids)
        # Without a token behind the accepted ones the request ended there: nobody judged the other proposals.
        count = proposed[i] if committed > accepted else accepted
        source = SOURCE_NOBODY if not count else SOURCE_LOOKUP if row.looked_up else SOURCE_DRAFT
        drafted = source == SOURCE_DRAFT
        if source == SOURCE_LOOKUP:
            count = min(count, accepted + 1)  # nobody learns from what a copy would have gone on with
        temperature = 1.0
        if drafted and row.explored:
            temperature = explore_temperature
        elif drafted and row.params.seed is None and not is_greedy(row.params):
            temperature = row.params.temperature
        note = RoundNote(
            root=row.length - committed - 1,
            version=version if drafted else "",
            source=source,
            explored=drafted and row.explored,
            draft_temperature=temperature,
            proposals=tokens[i][:count],
            logprobs=logprobs[i][:count] if drafted and logprobs is not None and is_plain(row.params) else None,
            accepted=accepted,
        )
        observer.on_commit(row, note, last_BTH[i])


def _first_chain(proposals: Proposals, last_BTH: torch.Tensor) -> tuple[Proposals, torch.Tensor]:
    """Proposals, and the states behind root and proposals, along each row's chain of first choices."""
    if proposals.parent_BK is None:
        return proposals, last_BTH
    counts = proposals.num_B.tolist()
    chains = [first_choices(row[:count]) for row, count in zip(proposals.parent_BK.tolist(), counts, strict=True)]
    width = max(map(len, chains))
    column_BK = torch.tensor([chain + [1] * (width - len(chain)) for chain in chains], device=last_BTH.device)
    token_BK = proposals.token_BK.gather(1, column_BK - 1)
    chain = Proposals(
        token_BK=token_BK,
        num_B=torch.tensor([len(chain) for chain in chains]),
        q_BKD=None,
        logprob_BK=torch.zeros(token_BK.shape),  # chosen, not drawn
    )
    index_BT = torch.cat([column_BK.new_zeros(len(chains), 1), column_BK], 1)
    return chain, last_BTH[torch.arange(len(chains))[:, None], index_BT]
