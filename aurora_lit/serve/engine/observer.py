"""What the engine reports about its rounds to an observer, for recording traces.

Left out: what the observer does with it (serve/engine/trace_recorder.py).

Shapes: S slots, L capacity of a slot, F = 3H auxiliary features, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from aurora_lit.request import Output, Source
from aurora_lit.serve.engine.round_plan import DecodingRow
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.traces.record import RoundNote


class RoundObserver(Protocol):
    """Receives what the target computed and what each round proposed and accepted."""

    def attach(self, *, tokens_SL: torch.Tensor, aux_SLF: torch.Tensor | None) -> None:
        """Called once by the engine, with its committed tokens and the auxiliary states that the drafter keeps.

        `aux_SLF` None: there is no drafter, so an observer that needs these states keeps them itself.
        """

    @property
    def last_SLH(self) -> torch.Tensor:
        """After `attach`, where it keeps last hidden states. Who writes them there need not call `on_forward` beside a
        drafter, which keeps the auxiliary ones.
        """

    @property
    def keeps_prompts(self) -> bool:
        """True if last hidden states are needed of prompts too, beyond the one that gives the first token."""

    def on_forward(self, *, slot: int, start: int, aux_TF: torch.Tensor, last_TH: torch.Tensor) -> None:
        """The target computed positions start, start + 1, … of a slot, which are committed."""

    def on_prefix_copy(self, *, source: int, slot: int, length: int, start: int) -> None:
        """The first `length` positions of a slot were copied from another, so the target does not compute them.

        All but the first `start`, which the slot had.
        """

    def on_commit(self, sequence: RunningSequence, note: RoundNote, last: Callable[[], torch.Tensor]) -> None:
        """A round of a sequence was committed. `last`: returns the last hidden states [T, H] of its root and its
        proposals, until the next round. A call takes 0.1 ms, so it is for rounds that need them.
        """

    def on_finish(self, sequence: RunningSequence) -> None:
        """A request finished or was cancelled; the target has computed all its tokens but the last."""


def notify_round(
    observer: RoundObserver,
    row: DecodingRow,
    output: Output,
    *,
    last: Callable[[], torch.Tensor],
    version: int,
) -> None:
    """Report a committed round of one sequence, in which the draft's version had this number.

    `last`: returns the last hidden states [T, H] of the row's columns.

    Of a tree, only the chain of first choices is reported, as if it alone had been proposed: a draft learns from its
    first choices and is evaluated by them. So of a weighed chain those are reported, proposed or not, of which the
    answer tells whether they were right: a draft that is not sure proposes less, and would seem to be right.
    """
    sequence, proposal = row.sequence, row.proposal
    weighed, committed = (proposal if row.uncut is None else row.uncut.proposal).weighed, len(output.token_ids)
    if weighed is not None and output.tested_choices is not None:
        tested, right = output.tested_choices
        note = RoundNote(
            root=sequence.length - committed - 1,
            version=version if tested else -1,
            source=Source.DRAFT if tested else Source.TARGET,
            proposals=weighed.tokens[:tested],
            accepted=right,
        )
        observer.on_commit(sequence, note, last)
        return
    columns = proposal.first_choices
    accepted = output.chain_accepted
    # Without a token after the accepted ones the request ended there, and the other proposals were not verified.
    count = len(columns) if committed > accepted else accepted
    source = proposal.source if count else Source.TARGET
    drafted = source is Source.DRAFT
    explored = drafted and proposal.explored_at is not None
    if source > Source.DRAFT:
        count = min(count, accepted + 1)  # nothing is learned from copied tokens after a rejected one
    if source is Source.GRAMMAR:
        source = Source.NGRAM  # as a trace records it
    note = RoundNote(
        root=sequence.length - committed - 1,
        version=version if drafted else -1,
        source=source,
        explored=explored,
        draft_temperature=proposal.explored_at if explored and proposal.explored_at is not None else 1.0,
        proposals=[proposal.tokens[column - 1] for column in columns[:count]],
        logprobs=proposal.logprobs[:count] if explored and proposal.logprobs is not None else None,
        accepted=accepted,
    )
    observer.on_commit(sequence, note, last if proposal.parents is None else lambda: last()[[0, *columns]])
