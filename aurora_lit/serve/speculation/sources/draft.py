"""What the draft proposes in a round: for which sequences it runs, and what it has read of their prompts by then.

The draft does not run for a sequence whose prompt it has not caught up with: it reads `max_catch_up_s` worth of
positions a round until it has. Where it has native steps and the target computes trees, its chains are weighed: of the
tokens of each level, and those beside them, only those are proposed that repay their columns. Elsewhere whole chains
are proposed.

Left out: the draft's passes (drafter.py), and what a column costs (serve/speculation/weigh.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import Proposal, WeighedChain
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.sources.draft_rates import DraftRates
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.weigh import Weigher

_LEAST_CATCH_UP = 32
"""Positions of the draft's prefill that a round computes at least, if any are missing."""


class DraftCandidates(NamedTuple):
    """What the draft proposes in a round, and what that took in seconds."""

    proposals: dict[int, Proposal]
    """By index of the sequence; those that it has not caught up with are left out."""
    drafting_s: float = 0.0
    catching_up_s: float = 0.0
    """The part of that in which it read prompts and what it had missed."""


class DraftSource:
    """Drafts for the sequences of a round.

    >>> found = source.candidates(sequences, [0, 2])                                    # of these two
    >>> source.observe(sequence, proposal, path=[0, 1], tokens=[5, 6], finished=False)  # after the round
    """

    def __init__(self, drafter: Drafter | None, weigher: Weigher, *, max_catch_up_s: float = 1.0) -> None:
        """`drafter` None: there is no draft, and no candidate."""
        self._drafter, self._weigher = drafter, weigher
        self.rates = DraftRates()
        self._max_catch_up_s = max_catch_up_s

    def candidates(self, sequences: Sequence[RunningSequence], asked: Sequence[int]) -> DraftCandidates:
        """What the draft proposes for the sequences at `asked` of those of a round."""
        if self._drafter is None or not asked:
            return DraftCandidates({})
        started, proposals, num_levels = time.perf_counter(), dict[int, Proposal](), 0
        ready, num_read = self._caught_up(sequences, asked)
        if ready:
            drafted = self._run([sequences[i] for i in ready], batch_size=len(sequences))
            num_levels = drafted.num_levels
            proposals = dict(zip(ready, _proposals(drafted), strict=True))
        drafting_s = time.perf_counter() - started
        catching_up_s = min(drafting_s, self._costs.catch_up_s(len(ready), uncached=num_read))
        self._costs.observe_draft(len(ready), num_levels, drafting_s, uncached=num_read)
        return DraftCandidates(proposals, drafting_s, catching_up_s)

    def observe(
        self,
        sequence: RunningSequence,
        proposal: Proposal,
        *,
        path: Sequence[int],
        finished: bool,
        tokens: Sequence[int] = (),
    ) -> None:
        """Learn from a round's outcome; arguments as those of `DraftRates.observe`."""
        if proposal.source is Source.DRAFT or proposal.weighed is not None:
            self.rates.observe(sequence, proposal, path=path, tokens=tokens, finished=finished)

    @property
    def _costs(self) -> Costs:
        return self._weigher.costs

    def _caught_up(self, sequences: Sequence[RunningSequence], asked: Sequence[int]) -> tuple[list[int], int]:
        """Those whose prompt the draft has read or will have when it drafts. For others it reads on, as far as this
        round's time allows.

        Also returns how many positions it reads in all.
        """
        drafter, position_s = self._drafter, self._costs.prefill_position_s
        assert drafter is not None
        uncached = {i: drafter.num_uncached(sequences[i].slot, sequences[i].length) for i in asked}
        room = max(_LEAST_CATCH_UP, int(self._max_catch_up_s / position_s)) if position_s else 1 << 30
        ready, num_read = [], 0
        for i in sorted(asked, key=uncached.__getitem__):
            if uncached[i] <= room:
                count = uncached[i]
                ready.append(i)
            elif room > 0:
                count = drafter.catch_up(sequences[i].slot, sequences[i].length, most=room)
            else:
                break
            room, num_read = room - count, num_read + count
        return sorted(ready), num_read

    def _run(self, sequences: list[RunningSequence], *, batch_size: int) -> Drafted:
        """Draft for some sequences of a round with so many."""
        assert self._drafter is not None
        limits, noise = self._weigher.limits, _shared_noise(sequences)
        inputs = DraftInputs(
            slots=[sequence.slot for sequence in sequences], lengths=[sequence.length for sequence in sequences]
        )
        # A draft that was swapped in may have no native steps.
        if not (limits.sibling_tokens and self._drafter.is_native):
            return self._drafter.propose(inputs, num_steps=limits.draft_tokens, noise=noise)
        rates = [self.rates.rate_of(sequence) for sequence in sequences]
        return self._drafter.propose_weighed(
            inputs,
            num_steps=limits.draft_tokens,
            num_nodes=limits.weighed_tokens,
            num_siblings=limits.sibling_tokens,
            weighing=self._weigher.draft_weighing(rates, self.rates.acceptance_KC, batch_size=batch_size),
            noise=noise,
        )


def _shared_noise(sequences: list[RunningSequence]) -> ColumnDraws | None:
    """The noise that the target draws with; None: all are greedy."""
    if all(sequence.temperature == 0 for sequence in sequences):
        return None
    return ColumnDraws(
        [sequence.temperature for sequence in sequences],
        [sequence.noise_key for sequence in sequences],
        [sequence.length - sequence.prompt_length for sequence in sequences],
    )


def _proposals(drafted: Drafted) -> list[Proposal]:
    if drafted.first_choices is None or drafted.shares is None:
        return [Proposal(tokens=chain, source=Source.DRAFT, num_drafted=len(chain)) for chain in drafted.tokens]
    assert drafted.parents is not None
    weighed = map(WeighedChain, drafted.first_choices, drafted.shares)
    return [
        Proposal(
            tokens=tokens,
            parents=None if parents == list(range(len(tokens))) else parents,
            source=Source.DRAFT if tokens else Source.TARGET,
            num_drafted=len(tokens),
            weighed=chain,
        )
        for tokens, parents, chain in zip(drafted.tokens, drafted.parents, weighed, strict=True)
    ]
