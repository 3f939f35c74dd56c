"""Makes a round's proposals: by n-gram lookup where it promises more, else by the draft, else none.

Lookup serves sequences that accept what equals the target's own token (greedy and seeded ones). For an unseeded one,
the ratio test accepts a proposal that was drawn from the draft's q with probability min(1, p/q), but a looked-up token
(q one-hot) only with its probability p(token); these sequences are left to the draft. The draft does not run if no
sequence needs it.

Exploration: in a share of its drafted rounds a sequence, also a greedy or seeded one, samples its proposals from the
draft at a separate temperature, so that a learner sees what else the draft could have proposed, and how probable it
was. Verification does not change, so the output stays exact, but fewer of these proposals are accepted. Such rounds
propose chains, as do rounds with unseeded sampling or penalties: a tree needs sequences that accept what equals the
target's own token.

Left out: the draft's work (serve/speculation/drafter.py), proposal lengths and costs (serve/speculation/planner.py,
serve/speculation/ngram_planner.py), and verification (modules/sampling/verification.py).

Shapes: B sequences, K proposals, D draft vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from aurora_lit.modules.sampling.distribution import LogitOptions, is_greedy
from aurora_lit.modules.sampling.proposals import Proposals, behaviour_logprobs
from aurora_lit.request import SamplingParams
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.ngram_planner import NgramPlanner
from aurora_lit.serve.speculation.planner import MAX_REMAINING_TOKENS, SpeculationPlanner

_MAX_PADDED_LOOKUP_TOKENS = 4
"""Most tokens of a lookup where all sequences of a round compute the longest query length, and its logits."""


class Proposer:
    """Makes the proposals of a batch, and reports their outcome to the planners.

    >>> proposals = proposer.propose(sequences)
    >>> proposer.observe(sequence, proposed=4, accepted=2, finished=False)    # for each sequence, after the round
    """

    def __init__(
        self,
        drafter: Drafter | None,
        planner: SpeculationPlanner,
        *,
        ngram_planner: NgramPlanner | None,
        device: torch.device,
        explore_share: float = 0.0,
        explore_temperature: float = 1.0,
        explore_seed: int = 0,
        record_logprobs: bool = False,
    ) -> None:
        """`drafter` None: only lookup proposes; `ngram_planner` None: only the draft does.

        `record_logprobs`: also compute the proposals' behaviour log-probabilities (`Proposals.logprob_BK`).
        """
        self._drafter = drafter
        self._planner = planner
        self._ngram_planner = ngram_planner
        self._device = device
        self.explore_share, self.explore_temperature = explore_share, explore_temperature
        self._rng = random.Random(explore_seed)
        self._record_logprobs = record_logprobs
        self._options_sequences: list[RunningSequence] = []
        self._options = LogitOptions.from_params([])

    def propose(self, sequences: Sequence[RunningSequence], *, ragged: bool = False) -> Proposals:
        """Proposals for each sequence. Sets `uses_lookup` and `is_exploring` of each, which `observe` relies on.

        `ragged`: the target computes each sequence's own query length, so numbers of proposals may differ widely.
        """
        self._planner.ragged = ragged
        speculating = [i for i, sequence in enumerate(sequences) if sequence.params.speculate]
        looked_up = self._look_up(sequences, speculating)
        for i, sequence in enumerate(sequences):
            sequence.uses_lookup, sequence.is_exploring = i in looked_up, False
        draft_proposals, drafting_indices = self._draft(sequences, [i for i in speculating if i not in looked_up])
        return self._merge(len(sequences), looked_up, drafting_indices, draft_proposals)

    def observe(self, sequence: RunningSequence, *, proposed: int, accepted: int, finished: bool) -> None:
        """Report a round's outcome. `finished`: the request ended in it, maybe before its last correct proposal."""
        if not sequence.uses_lookup:
            self._planner.observe(sequence, proposed=proposed, accepted=accepted)
        elif self._ngram_planner is not None and not finished:
            self._ngram_planner.acceptance.observe(sequence.ngram_match, proposed=proposed, accepted=accepted)

    # -- n-gram lookup -------------------------------------------------------------------------------------------------

    def _look_up(self, sequences: Sequence[RunningSequence], speculating: list[int]) -> dict[int, list[int]]:
        """Tokens found by lookup, by index of the sequence, where they promise more than the draft."""
        planner = self._ngram_planner
        if planner is None:
            return {}
        longest = planner.max_tokens if self._planner.ragged else min(planner.max_tokens, _MAX_PADDED_LOOKUP_TOKENS)
        positions, survivals = {}, []
        for i in speculating:
            sequence = sequences[i]
            count = min(longest, sequence.num_remaining - 1)
            if count > 0 and (is_greedy(sequence.params) or sequence.params.seed is not None):
                sequence.ngram_match, position = sequence.ngrams.find_longest_match()
                if sequence.ngram_match:
                    positions[i] = position
                    survivals.append(planner.acceptance.survival(sequence.ngram_match, count))
        if not positions:
            return {}
        rates = [sequences[i].acceptance_rate for i in positions]
        counts = planner.choose(survivals, rates, num_others=len(sequences) - len(positions))
        chosen = zip(positions.items(), counts, strict=True)
        return {i: sequences[i].ngrams.continuation(position, count) for (i, position), count in chosen if count}

    # -- the draft -----------------------------------------------------------------------------------------------------

    def _draft(
        self, all_sequences: Sequence[RunningSequence], candidates: list[int]
    ) -> tuple[Proposals | None, list[int]]:
        """The draft's proposals, and the indices of their sequences, among those at `candidates`."""
        sequences = [all_sequences[i] for i in candidates]
        num_steps = self._planner.choose(
            [sequence.acceptance_rate for sequence in sequences], num_not_drafting=len(all_sequences) - len(sequences)
        )
        if self._drafter is None or not (num_steps or self._planner.tree_sizes):
            return None, []
        uncached = [self._drafter.num_uncached(sequence.slot, sequence.length) for sequence in sequences]
        if self._planner.probing:
            least = min(range(len(sequences)), key=uncached.__getitem__)
            candidates, sequences, uncached = [candidates[least]], [sequences[least]], [uncached[least]]
        rates = [sequence.acceptance_rate for sequence in sequences]
        num_not_drafting, num_uncached = len(all_sequences) - len(sequences), sum(uncached)
        options, num_nodes = self._options_for(sequences), 0
        if not (options.num_unseeded or options.penalty_rows.numel() or self._planner.probing):
            num_steps, num_nodes = self._planner.choose_tree(num_steps, rates, num_not_drafting=num_not_drafting)
        remaining = sum(min(MAX_REMAINING_TOKENS, sequence.num_remaining) for sequence in all_sequences)
        if not num_steps or not self._planner.should_draft(
            num_steps, num_nodes, rates, num_not_drafting=num_not_drafting, uncached=num_uncached, remaining=remaining
        ):
            for sequence in sequences:
                sequence.is_exploring = False
            return None, []
        if num_nodes:
            return self._draft_trees(sequences, rates, num_steps, num_nodes, num_not_drafting, num_uncached), candidates
        return self._draft_chains(sequences, options, num_steps, num_not_drafting, num_uncached), candidates

    def _draft_chains(
        self,
        sequences: list[RunningSequence],
        options: LogitOptions,
        num_steps: int,
        num_not_drafting: int,
        num_uncached: int,
    ) -> Proposals:
        assert self._drafter is not None
        B, uniform_BK = len(sequences), None
        started = time.perf_counter()
        if options.num_unseeded:
            uniform_BK = torch.rand(B, num_steps, dtype=torch.float64, device=self._device)
        drafted, _ = self._drafter.propose(
            self._draft_inputs(sequences),
            options=options,
            num_steps=num_steps,
            uniform_BK=uniform_BK,
            min_gains=self._planner.min_gains_of_chain(num_steps, B, num_not_drafting=num_not_drafting),
        )
        seconds = time.perf_counter() - started
        self._planner.observe_chain(B, drafted.token_BK.shape[1], seconds, uncached=num_uncached)
        if not self._record_logprobs:
            return drafted
        logprob_BK = behaviour_logprobs(drafted, options=options, vocabulary=self._drafter.vocabulary)
        return replace(drafted, logprob_BK=logprob_BK)

    def _draft_trees(
        self,
        sequences: list[RunningSequence],
        rates: list[float],
        num_steps: int,
        num_nodes: int,
        num_not_drafting: int,
        num_uncached: int,
    ) -> Proposals:
        """A tree per sequence, for sequences without penalties that accept what equals the target's own token."""
        assert self._drafter is not None
        B, started = len(sequences), time.perf_counter()
        drafted, reach_JB = self._drafter.propose_tree(
            self._draft_inputs(sequences),
            num_steps=num_steps,
            num_nodes=num_nodes,
            min_gains=self._planner.min_gains_of_tree(num_steps, B, num_not_drafting=num_not_drafting),
            level_rates=[self._planner.tree_rate(num_nodes, rate) for rate in rates],
        )
        self._planner.observe_levels(B, len(reach_JB), time.perf_counter() - started, uncached=num_uncached)
        return drafted

    def _draft_inputs(self, sequences: Sequence[RunningSequence]) -> DraftInputs:
        slots_B = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        return DraftInputs(slots_B=slots_B, lengths=[sequence.length for sequence in sequences])

    def _options_for(self, sequences: list[RunningSequence]) -> LogitOptions:
        """How each sequence's proposals are sampled: by its own parameters, or to explore."""
        if self.explore_share:
            for sequence in sequences:
                sequence.is_exploring = sequence.request.store and self._rng.random() < self.explore_share
            if any(sequence.is_exploring for sequence in sequences):
                # The draft samples as for an unseeded request; the target's pass keeps to the request's own parameters.
                unseeded = SamplingParams(max_tokens=1, temperature=self.explore_temperature)
                params = [unseeded if sequence.is_exploring else sequence.params for sequence in sequences]
                return LogitOptions.from_params(params, device=self._device)
        if sequences != self._options_sequences:
            self._options_sequences = sequences
            self._options = LogitOptions.from_params([sequence.params for sequence in sequences], device=self._device)
        return self._options

    # -- the batch -----------------------------------------------------------------------------------------------------

    def _merge(
        self,
        batch_size: int,
        looked_up: dict[int, list[int]],
        drafting_indices: list[int],
        draft_proposals: Proposals | None,
    ) -> Proposals:
        """The proposals of the whole batch; a sequence with neither lookup nor draft has none."""
        if draft_proposals is not None and len(drafting_indices) == batch_size:
            return draft_proposals
        steps = 0 if draft_proposals is None else draft_proposals.token_BK.shape[1]
        width = max([steps, *(len(tokens) for tokens in looked_up.values())])
        token_BK = torch.zeros(batch_size, width, dtype=torch.int64, device=self._device)
        num_proposed_B = torch.zeros(batch_size, dtype=torch.int64, device=self._device)
        q_BKD = logprob_BK = parent_BK = None
        if draft_proposals is not None:
            index = torch.tensor(drafting_indices, device=self._device)
            token_BK[index, :steps] = draft_proposals.token_BK
            num_proposed_B[index] = draft_proposals.num_proposed_B
            if draft_proposals.parent_BK is not None:
                # The others' proposals are chains.
                parent_BK = torch.arange(width, device=self._device).repeat(batch_size, 1)
                parent_BK[index, :steps] = draft_proposals.parent_BK
            if draft_proposals.q_BKD is not None:
                q_BKD = draft_proposals.q_BKD.new_zeros(batch_size, width, draft_proposals.q_BKD.shape[2])
                q_BKD[index, :steps] = draft_proposals.q_BKD
            if draft_proposals.logprob_BK is not None:
                logprob_BK = draft_proposals.logprob_BK.new_full((batch_size, width), float("nan"))
                logprob_BK[index, :steps] = draft_proposals.logprob_BK
        for i, tokens in looked_up.items():
            token_BK[i, : len(tokens)] = torch.tensor(tokens, device=self._device)
            num_proposed_B[i] = len(tokens)
        return Proposals(
            token_BK=token_BK, num_proposed_B=num_proposed_B, q_BKD=q_BKD, logprob_BK=logprob_BK, parent_BK=parent_BK
        )
