"""Makes a round's proposals: by n-gram lookup where it promises more, else by the draft, else none.

Every sequence accepts what equals the target's own token (serve/sequences/round_plan.py), so that both sources, chains
and trees serve greedy and sampled sequences alike. The draft does not run if no sequence needs it, nor for a sequence
whose prompt it has not caught up with: it reads `max_catch_up_s` worth of positions a round until it has.

Exploration: in a share of the rounds that draft, all greedy sequences that may be stored draw their proposals from the
draft at a separate temperature, so that a learner sees what else the draft could have proposed, and how probable it
was. Verification does not change, so the output stays exact, but fewer of these proposals are accepted. Such rounds
propose chains. Sampled sequences do not explore: what is accepted of them depends on the noise that target and draft
share, and a policy rewarded by p(a) alone would learn to propose the likeliest token, which that noise accepts less.

Left out: the draft's work (serve/speculation/drafter.py), proposal lengths and costs (serve/speculation/planner.py,
serve/speculation/ngram_planner.py), and which proposals are accepted (serve/sequences/round_plan.py).

Shapes: B sequences that draft.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch

from aurora_lit.serve.sequences.round_plan import NO_PROPOSAL, Proposal
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.costs import DraftShape
from aurora_lit.serve.speculation.drafter import Drafted, Drafter, DraftInputs, DraftNoise
from aurora_lit.serve.speculation.ngram_planner import NgramPlanner
from aurora_lit.serve.speculation.planner import MAX_REMAINING_TOKENS, SpeculationPlanner
from aurora_lit.traces.record import SOURCE_DRAFT, SOURCE_LOOKUP

_MAX_PADDED_LOOKUP_TOKENS = 4
"""Most tokens of a lookup where all sequences of a round compute the longest query length."""
_LEAST_CATCH_UP = 32
"""Positions of the draft's prefill that a round computes at least, if any are missing."""


class Proposer:
    """Makes the proposals of a batch, and reports their outcome to the planners.

    >>> proposals = proposer.propose(sequences)               # one for each sequence
    >>> proposer.observe(sequence, proposals[0], output)      # for each sequence, after the round
    """

    def __init__(
        self,
        drafter: Drafter | None,
        planner: SpeculationPlanner,
        *,
        device: torch.device,
        max_catch_up_s: float = 1.0,
        explore_share: float = 0.0,
        explore_temperature: float = 1.0,
        explore_seed: int = 0,
    ) -> None:
        """`drafter` None: only lookup proposes; without lookup tokens in the planner's limits only the draft does."""
        self._drafter = drafter
        self._planner = planner
        self._ngram_planner = NgramPlanner(planner) if planner.limits.lookup_tokens else None
        self._device = device
        self._max_catch_up_s = max_catch_up_s
        self.explore_share, self.explore_temperature = explore_share, explore_temperature
        self._rng = random.Random(explore_seed)
        self.draft_seconds = 0.0
        """Time that drafting took in the last round."""

    def propose(self, sequences: Sequence[RunningSequence]) -> list[Proposal]:
        """A proposal for each sequence."""
        self.draft_seconds = 0.0
        proposals = [NO_PROPOSAL] * len(sequences)
        speculating = [i for i, sequence in enumerate(sequences) if sequence.params.speculate]
        if not speculating:
            return proposals
        sampled = 2 * sum(sequences[i].temperature > 0 for i in speculating) > len(speculating)
        for i, proposal in self._look_up(sequences, speculating, sampled=sampled):
            proposals[i] = proposal
        rest = [i for i in speculating if proposals[i] is NO_PROPOSAL and sequences[i].num_remaining > 1]
        for i, proposal in self._draft(sequences, rest, sampled=sampled):
            proposals[i] = proposal
        return proposals

    def observe(
        self, sequence: RunningSequence, proposal: Proposal, *, accepted: int, chain_accepted: int, finished: bool
    ) -> None:
        """Report a round's outcome. `finished`: the request ended in it, maybe before its last correct proposal."""
        if proposal.source == SOURCE_DRAFT:
            self._planner.observe(
                sequence, proposal, accepted=accepted, chain_accepted=chain_accepted, finished=finished
            )
        elif proposal.source == SOURCE_LOOKUP and self._ngram_planner is not None and not finished:
            acceptance = self._ngram_planner.acceptance[sequence.temperature > 0]
            acceptance.observe(proposal.ngram_match, proposed=len(proposal.tokens), accepted=accepted)

    # -- n-gram lookup -------------------------------------------------------------------------------------------------

    def _look_up(
        self, sequences: Sequence[RunningSequence], candidates: Sequence[int], *, sampled: bool
    ) -> list[tuple[int, Proposal]]:
        """What lookup proposes where it promises more than the draft, with the indices of the sequences."""
        planner, limits = self._ngram_planner, self._planner.limits
        if planner is None:
            return []
        longest = limits.lookup_tokens
        if not self._planner.costs.ragged:
            longest = min(longest, _MAX_PADDED_LOOKUP_TOKENS)
        found, survivals, rates = [], [], []
        for i in candidates:
            sequence = sequences[i]
            count = min(longest, sequence.num_remaining - 1)
            match, position = sequence.ngrams.find_longest_match() if count > 0 else (0, 0)
            if match:
                found.append((i, match, position))
                survivals.append(planner.acceptance[sequence.temperature > 0].survival(match, count))
                rates.append(sequence.acceptance_rate)
        if not found:
            return []
        counts = planner.choose(survivals, rates, batch_size=len(sequences), sampled=sampled)
        return [
            (i, Proposal(tokens=sequences[i].ngrams.continuation(at, count), source=SOURCE_LOOKUP, ngram_match=match))
            for (i, match, at), count in zip(found, counts, strict=True)
            if count
        ]

    # -- the draft -----------------------------------------------------------------------------------------------------

    def _draft(
        self, all_sequences: Sequence[RunningSequence], candidates: list[int], *, sampled: bool
    ) -> list[tuple[int, Proposal]]:
        """What the draft proposes for those at `candidates`, with the indices of the sequences."""
        drafter, batch_size = self._drafter, len(all_sequences)
        if drafter is None or not candidates:
            return []
        rates = [all_sequences[i].acceptance_rate for i in candidates]
        shape, is_probe = self._planner.decide(rates, batch_size=batch_size, sampled=sampled)
        if not shape.levels:
            return []
        uncached = {i: drafter.num_uncached(all_sequences[i].slot, all_sequences[i].length) for i in candidates}
        if is_probe:
            candidates = [min(candidates, key=uncached.__getitem__)]
        else:
            remaining = sum(min(MAX_REMAINING_TOKENS, sequence.num_remaining) for sequence in all_sequences)
            missing = sum(uncached[i] for i in candidates)
            if not self._planner.pays_for_catching_up(
                shape, rates, batch_size=batch_size, sampled=sampled, uncached=missing, remaining=remaining
            ):
                return []
        started = time.perf_counter()
        candidates, num_read = self._caught_up(all_sequences, candidates, uncached)
        if candidates:
            sequences = [all_sequences[i] for i in candidates]
            explores = [False] * len(sequences)
            if self.explore_share and not is_probe and self._rng.random() < self.explore_share:
                explores = [sequence.request.store and sequence.temperature == 0 for sequence in sequences]
            drafted = self._run(sequences, shape, explores, batch_size=batch_size, sampled=sampled)
        self.draft_seconds = time.perf_counter() - started
        if not candidates:
            return []
        found = self._proposals(drafted, explores)
        if not any(explores):
            levels = len(drafted.outcome_JB)
            nodes = drafted.token_BK.shape[1] if drafted.parent_BK is not None else 0
            missing = num_read + sum(uncached[i] for i in candidates)
            self._planner.observe_draft(len(found), DraftShape(levels, nodes), self.draft_seconds, uncached=missing)
        return list(zip(candidates, found, strict=True))

    def _caught_up(
        self, sequences: Sequence[RunningSequence], candidates: list[int], uncached: dict[int, int]
    ) -> tuple[list[int], int]:
        """Those whose prompt the draft has read. For others it reads on, as far as this round's time allows.

        Also returns how many positions it has read for others.
        """
        drafter, position_s = self._drafter, self._planner.costs.prefill_position_s
        assert drafter is not None
        room = max(_LEAST_CATCH_UP, int(self._max_catch_up_s / position_s)) if position_s else 1 << 30
        ready, num_read = [], 0
        for i in sorted(candidates, key=uncached.__getitem__):
            if uncached[i] <= room:
                room -= uncached[i]
                ready.append(i)
            elif room > 0:
                count = drafter.catch_up(sequences[i].slot, sequences[i].length, most=room)
                room, num_read = room - count, num_read + count
        return sorted(ready), num_read

    def _run(
        self,
        sequences: list[RunningSequence],
        shape: DraftShape,
        explores: list[bool],
        *,
        batch_size: int,
        sampled: bool,
    ) -> Drafted:
        """Draft a shape for some sequences; chains if any of them explores."""
        assert self._drafter is not None
        slots_B = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        inputs = DraftInputs(slots_B=slots_B, lengths=[sequence.length for sequence in sequences])
        noise = self._noise(sequences, explores)
        if any(explores):
            return self._drafter.propose(inputs, num_steps=shape.levels, noise=noise, with_logprobs=True)
        min_gains = self._planner.min_gains(shape, len(sequences), batch_size=batch_size)
        if not shape.nodes:
            return self._drafter.propose(inputs, num_steps=shape.levels, noise=noise, min_gains=min_gains)
        rates = [sequence.acceptance_rate for sequence in sequences]
        return self._drafter.propose_tree(
            inputs,
            num_steps=shape.levels,
            num_nodes=shape.nodes,
            noise=noise,
            min_gains=min_gains,
            level_rates=self._planner.level_rates(shape, rates, sampled=sampled),
        )

    def _noise(self, sequences: list[RunningSequence], explores: list[bool]) -> DraftNoise | None:
        """The noise that the target draws with; where a sequence explores, noise of its own."""
        if not any(explores) and all(sequence.temperature == 0 for sequence in sequences):
            return None
        temperatures, keys = [], []
        for sequence, explore in zip(sequences, explores, strict=True):
            temperatures.append(self.explore_temperature if explore else sequence.temperature)
            keys.append(self._rng.getrandbits(63) if explore else sequence.noise_key)
        positions = [sequence.length - sequence.prompt_length for sequence in sequences]
        return DraftNoise(
            temperature_B=torch.tensor(temperatures, dtype=torch.float32, device=self._device),
            key_B=torch.tensor(keys, device=self._device),
            position_B=torch.tensor(positions, device=self._device),
        )

    def _proposals(self, drafted: Drafted, explores: list[bool]) -> list[Proposal]:
        tokens = drafted.token_BK.tolist()
        parents = [None] * len(tokens) if drafted.parent_BK is None else drafted.parent_BK.tolist()
        logprobs = drafted.logprob_BK.tolist() if drafted.logprob_BK is not None and any(explores) else None
        return [
            Proposal(
                tokens=tokens[b],
                parents=parents[b],
                source=SOURCE_DRAFT,
                explored_at=self.explore_temperature if explore else None,
                logprobs=logprobs[b] if logprobs is not None and explore else None,
            )
            for b, explore in enumerate(explores)
        ]
