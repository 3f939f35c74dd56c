"""How often what the draft proposes is accepted: by the share that it gave it, and for each sequence.

Drafts are not calibrated: in greedy decoding a first choice with a share of 0.4 is accepted in six of ten cases, at a
temperature of 0.7 one with 0.9 in eight. What a drafted token promises (`Weighing` in kernels/draft_steps.py) is read
from here. Other choices are accepted about as often as their shares say, greedy and sampled. Whether a further level is
worth the draft's time depends on the sequence's own rate, since what is easy to draft for stays so.

Left out: what a token must promise (serve/speculation/weigh.py).

Shapes: K kinds of sequences, greedy and sampled; C classes of shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aurora_lit.kernels.draft_steps import SHARE_CLASSES
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.serve.engine.round_plan import Proposal
from aurora_lit.serve.engine.sequence import RunningSequence, VerifiedDrafts

_INITIAL = (
    (0.15, 0.16, 0.27, 0.35, 0.40, 0.53, 0.62, 0.69, 0.71, 0.83, 0.87, 0.87, 0.87, 0.91, 0.95, 0.96),
    (0.06, 0.13, 0.17, 0.27, 0.30, 0.35, 0.43, 0.49, 0.50, 0.52, 0.62, 0.62, 0.65, 0.70, 0.72, 0.83),
)
"""Before any was verified: greedy, and sampled at 0.7 and 1.0; of 5,600 rounds of SmolLM2-135M, made to rise."""
_INITIAL_WEIGHT, _MOST_WEIGHT = 32, 500
"""Tokens that the initial rate counts as, and that a rate remembers."""
_RECORD_DECAY = 0.95
"""Weight of a sequence's earlier proposals when one more is verified."""
_MEAN_WEIGHT = 20.0
"""What the rate over all sequences weighs beside a sequence's own, in proposals. A rate of twenty proposals is off by a
tenth by chance; this weight and decay predict held-out outcomes best."""
_INITIAL_RATE, _INITIAL_RATE_WEIGHT, _MOST_RATE_WEIGHT = 0.5, 40.0, 500.0
"""The rate over all sequences before anything was verified, the proposals that it counts as, which are those of a few
requests, since one request's are alike, and how many it remembers."""


class DraftRates:
    """Learns from every first choice whose outcome is known, whether it was proposed or not.

    >>> rates.observe(sequence, proposal, path=[0, 1, 2], tokens=[5, 6, 9], finished=False)
    >>> rates.rate_of(sequence)
    >>> rates.acceptance_KC[0, 6]
    """

    def __init__(self) -> None:
        self.acceptance_KC = torch.tensor(_INITIAL, dtype=torch.float32)
        """Of first choices by their share. Native calls read it where it is."""
        self._by_share = self.acceptance_KC.numpy()
        self._share_weights = [[_INITIAL_WEIGHT] * SHARE_CLASSES for _ in _INITIAL]
        self._means = [_INITIAL_RATE] * 2
        """Over all sequences, greedy and sampled."""
        self._mean_weights = [_INITIAL_RATE_WEIGHT] * 2

    def mean_rate(self, *, sampled: bool) -> float:
        """The acceptance rate over all sequences, with which a new one starts."""
        return self._means[sampled]

    def rate_of(self, sequence: RunningSequence) -> float:
        """The acceptance rate that a sequence's next proposals are expected to have."""
        record, mean = sequence.verified_drafts, self._means[sequence.temperature > 0]
        return (record.accepted + _MEAN_WEIGHT * mean) / (record.proposed + _MEAN_WEIGHT)

    def observe(
        self,
        sequence: RunningSequence,
        proposal: Proposal,
        *,
        path: Sequence[int],
        finished: bool,
        tokens: Sequence[int] = (),
    ) -> None:
        """Update by the outcome of what the draft proposed for a sequence.

        `path`: the accepted columns, column 0 first; `tokens`: what the sequence got.
        """
        if proposal.weighed is not None:
            # The round's tokens tell of the chain whether it was right, as far as they agree, proposed or not.
            tested, right = proposal.weighed.tested_by(tokens)
            for i, share in enumerate(proposal.weighed.shares[:tested]):
                self._add(sequence, i < right)
                self._add_share(share, i < right, sampled=sequence.temperature > 0)
            return
        chain = proposal.first_choices
        accepted = common_prefix_length(chain, path[1:])
        # The end of a request may cut off what came after the accepted ones, so that it was not verified.
        for i in range(min(accepted + (not finished), len(chain))):
            self._add(sequence, i < accepted)

    def forget(self, sequences: Sequence[RunningSequence]) -> None:
        """Another draft proposes from now on: low acceptance of the last one says nothing about it."""
        for sampled, rate in enumerate(self._means):
            if rate < _INITIAL_RATE:
                self._means[sampled], self._mean_weights[sampled] = _INITIAL_RATE, _INITIAL_RATE_WEIGHT
        for sequence in sequences:
            if self.rate_of(sequence) < _INITIAL_RATE:
                sequence.verified_drafts = VerifiedDrafts()

    def _add(self, sequence: RunningSequence, accepted: bool) -> None:
        sequence.verified_drafts.add(accepted, decay=_RECORD_DECAY)
        kind = int(sequence.temperature > 0)
        self._mean_weights[kind] = min(self._mean_weights[kind] + 1, _MOST_RATE_WEIGHT)
        self._means[kind] += (accepted - self._means[kind]) / self._mean_weights[kind]

    def _add_share(self, share: float, accepted: bool, *, sampled: bool) -> None:
        at = min(SHARE_CLASSES - 1, int(share * SHARE_CLASSES))
        rates, weights = self._by_share[int(sampled)], self._share_weights[int(sampled)]
        weights[at] = min(weights[at] + 1, _MOST_WEIGHT)
        rates[at] += (accepted - rates[at]) / weights[at]
