"""Makes a round's proposals: for each sequence one tree of what is copied and what the draft proposes, or none.

Where a sequence's grammar leaves no choice, what it forces is proposed, and nothing else is looked for. Copies cost no
pass of the draft: where they promise as much as the draft would, they are proposed alone. The draft runs for the other
sequences, and copies that are worth their columns join its tree. Every sequence accepts what equals the target's own
token (serve/engine/round_plan.py), so that all sources serve greedy and sampled sequences alike.

Left out: the sources (serve/speculation/sources/), what is worth its column (serve/speculation/weigh.py), and which
proposals are accepted (serve/engine/round_plan.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, Proposal, ProposedRound
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.draft import DraftSource
from aurora_lit.serve.speculation.sources.grammar import forced_proposal
from aurora_lit.serve.speculation.sources.ngram import NgramSource
from aurora_lit.serve.speculation.weigh import LEAST_SURVIVAL, Weigher, copied, with_copies

_TRY_COPIES_EVERY = 64
"""Rounds without copied proposals after which the most probable copy is tried, whatever it promises. Only what is
proposed is measured: without this, copies that were wrong for a while would never be proposed again."""


class Proposer:
    """Makes the proposals of a batch, and reports their outcome to the sources.

    >>> proposed = proposer.propose(sequences)                          # one for each sequence
    >>> proposer.observe(sequence, proposed.proposals[0], path=[0, 1], tokens=[5, 6], finished=False)
    """

    def __init__(self, weigher: Weigher, *, ngram: NgramSource, draft: DraftSource) -> None:
        self.weigher, self.ngram, self.draft = weigher, ngram, draft
        self._rounds_without_copies = 0
        """That might have copied, since one did."""

    def propose(
        self, sequences: Sequence[RunningSequence], *, copies: bool = True, drafts: bool = True
    ) -> ProposedRound:
        """A proposal for each sequence, of what is allowed; what a grammar forces always is."""
        started, limits = time.perf_counter(), self.weigher.limits
        most_forced = max(limits.draft_tokens, limits.copied_tokens)
        proposed = ProposedRound(
            [
                NO_PROPOSAL if sequence.grammar is None else forced_proposal(sequence, most=most_forced)
                for sequence in sequences
            ]
        )
        if copies or drafts:
            self._speculate(sequences, proposed, copies=copies, drafts=drafts)
            proposed.all_s = time.perf_counter() - started
        return proposed

    def observe(
        self,
        sequence: RunningSequence,
        proposal: Proposal,
        *,
        path: Sequence[int],
        finished: bool,
        tokens: Sequence[int] = (),
    ) -> None:
        """Report a round's outcome.

        `path`: the columns that were accepted, column 0 first. `tokens`: what the sequence got. `finished`: the request
        ended in this round, maybe before its last correct proposal.
        """
        if not finished:
            self.ngram.observe(proposal, path=path)
        self.draft.observe(sequence, proposal, path=path, tokens=tokens, finished=finished)

    def _speculate(
        self, sequences: Sequence[RunningSequence], proposed: ProposedRound, *, copies: bool, drafts: bool
    ) -> None:
        """Fill in the proposals of sequences that have none."""
        proposals, batch_size = proposed.proposals, len(sequences)
        asked = [
            i
            for i, sequence in enumerate(sequences)
            if sequence.speculates and sequence.num_remaining > 1 and proposals[i] is NO_PROPOSAL
        ]
        found = {}
        if copies and asked and self.weigher.limits.copied_tokens:
            started, limits = time.perf_counter(), self.weigher.limits
            self._rounds_without_copies += 1
            is_trial = self._rounds_without_copies >= _TRY_COPIES_EVERY
            found = self.ngram.candidates(
                sequences,
                asked,
                most=limits.copied_tokens,
                least=LEAST_SURVIVAL if is_trial or not limits.adaptive else self.weigher.least_survival(batch_size),
                branches=self.weigher.costs.ragged,
                in_every_round=not limits.adaptive,
            )
            proposed.looking_s = time.perf_counter() - started
        if found:
            counts = self.weigher.copies(
                [each.survivals for each in found.values()],
                [self.draft.rates.rate_of(sequences[i]) if drafts else 0.0 for i in found],
                batch_size=batch_size,
                at_least_one=is_trial,
            )
            for (i, each), count in zip(found.items(), counts, strict=True):
                table = self.ngram.reliability.table(sampled=sequences[i].temperature > 0)
                proposals[i] = copied(each, count, table=table)
        if drafts:
            rest = [i for i in asked if proposals[i] is NO_PROPOSAL]
            drafted, proposed.drafting_s, proposed.catching_up_s = self.draft.candidates(sequences, rest)
            for i, proposal in drafted.items():
                proposals[i] = proposal
            self._merge(sequences, proposals, {i: found[i] for i in drafted if i in found})
        if any(proposal.copies for proposal in proposals):
            self._rounds_without_copies = 0

    def _merge(
        self, sequences: Sequence[RunningSequence], proposals: list[Proposal], copies: dict[int, Copies]
    ) -> None:
        """Add to the draft's proposals the copies that are worth a column."""
        weigher = self.weigher
        if not (copies and weigher.costs.ragged and weigher.limits.adaptive):
            return
        least = weigher.column_tokens(len(sequences), sum(len(proposal.tokens) for proposal in proposals))
        for i, each in copies.items():
            proposals[i] = with_copies(
                proposals[i],
                each,
                reliability=self.ngram.reliability,
                sampled=sequences[i].temperature > 0,
                least=least,
                most=weigher.limits.copied_tokens,
            )
