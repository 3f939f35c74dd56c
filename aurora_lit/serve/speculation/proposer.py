"""Makes a round's proposals: for each sequence one tree of what is copied and what the draft proposes, or none.

Copies cost no pass of the draft. Where they promise as much as the draft would, they are proposed alone; the draft runs
for the other sequences, and copies that are worth their columns are merged into its proposals. Every sequence accepts
what equals the target's own token (serve/engine/round_plan.py), so that all sources serve greedy and sampled
sequences alike. The draft does not run if no sequence needs it, nor for a sequence whose prompt it has not
caught up with: it reads `max_catch_up_s` worth of positions a round until it has.

Exploration: in a share of the rounds that draft, all greedy sequences that may be stored draw their proposals from the
draft at a separate temperature, so that a learner sees what else the draft could have proposed, and how probable it
was; those with penalties, a bias or a grammar do not, since their rewards cannot be computed. Verification does not
change, so the output stays exact, but fewer of these proposals are accepted. Such rounds propose chains. Sampled
sequences do not explore: what is accepted of them depends on the noise that target and draft share, and a policy
rewarded by p(a) alone would learn to propose the likeliest token, which that noise accepts less.

Where a sequence's grammar leaves no choice, what it forces is proposed, and nothing else is looked for.

Left out: the draft's work (serve/speculation/drafter.py), what copies there are (serve/speculation/copy_finder.py),
how much is proposed (serve/speculation/planner.py, serve/speculation/copy_planner.py), and which proposals are accepted
(serve/engine/round_plan.py).

Shapes: B sequences that draft.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch

from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.draft_steps import Drafted
from aurora_lit.kernels.matmul import ColumnDraws
from aurora_lit.kernels.suffix_index import Copies
from aurora_lit.modules.sampling.distribution import uses_temperature_only
from aurora_lit.request import Source
from aurora_lit.serve.engine.round_plan import NO_PROPOSAL, Proposal, ProposingTimes, WeighedChain
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.candidate_tree import copied, with_copies
from aurora_lit.serve.speculation.copy_finder import MAX_PADDED_COPIES, CopyFinder
from aurora_lit.serve.speculation.copy_planner import CopyPlanner
from aurora_lit.serve.speculation.costs import READ_IN_A_STEP
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.grammar_rows import forced_proposal
from aurora_lit.serve.speculation.planner import MAX_REMAINING_TOKENS, DraftDecision, SpeculationPlanner
from aurora_lit.serve.speculation.traffic_memory import TrafficMemory

_LEAST_CATCH_UP = 32
"""Positions of the draft's prefill that a round computes at least, if any are missing."""
_TRY_COPIES_EVERY = 64
"""Rounds without copied proposals after which the most probable copy is tried, whatever it promises. Only what is
proposed is measured: without this, copies that were wrong for a while, or columns that were dear, would stay so."""


class Proposer:
    """Makes the proposals of a batch, and reports their outcome to the planners.

    >>> proposals, times = proposer.propose(sequences)        # one for each sequence
    >>> proposer.observe(sequence, proposals[0], output)      # for each sequence, after the round
    """

    def __init__(
        self,
        drafter: Drafter | None,
        planner: SpeculationPlanner,
        *,
        tokens_SL: torch.Tensor,
        memory: TrafficMemory | None = None,
        looks_up: bool = True,
        max_catch_up_s: float = 1.0,
        explore_share: float = 0.0,
        explore_temperature: float = 1.0,
        explore_seed: int = 0,
    ) -> None:
        """`drafter` None: only copies are proposed; without copied tokens in the planner's limits only drafts are.

        `tokens_SL`: the engine's table of committed tokens. `memory` None: copies come from within requests alone.
        `looks_up` False: none come from there.
        """
        self._drafter = drafter
        self._planner = planner
        self._copy_planner = CopyPlanner(planner)
        self.reliability = CopyReliability()
        self._copy_finder = CopyFinder(planner, self.reliability, tokens_SL=tokens_SL, memory=memory, looks_up=looks_up)
        self._rounds_without_copies = 0
        """That might have copied, since one did."""
        self._max_catch_up_s = max_catch_up_s
        self.explore_share, self.explore_temperature = explore_share, explore_temperature
        self._rng = random.Random(explore_seed)

    def propose(
        self, sequences: Sequence[RunningSequence], *, copies: bool = True, drafts: bool = True
    ) -> tuple[list[Proposal], ProposingTimes]:
        """A proposal for each sequence, of what is allowed; what a grammar forces always is."""
        started, times = time.perf_counter(), ProposingTimes()
        proposals = [
            NO_PROPOSAL if sequence.grammar is None else forced_proposal(sequence, most=self._most_forced)
            for sequence in sequences
        ]
        if copies or drafts:
            self._propose(sequences, proposals, times, copies=copies, drafts=drafts)
            if any(proposal.copies for proposal in proposals):
                self._rounds_without_copies = 0
            times.all_s = time.perf_counter() - started
        return proposals, times

    @property
    def _most_forced(self) -> int:
        """Longest chain of tokens that a grammar forces."""
        limits = self._planner.limits
        most = max(limits.draft_tokens, limits.copied_tokens)
        return most if self._planner.costs.ragged else min(most, MAX_PADDED_COPIES)

    def _propose(
        self,
        sequences: Sequence[RunningSequence],
        proposals: list[Proposal],
        times: ProposingTimes,
        *,
        copies: bool,
        drafts: bool,
    ) -> None:
        """Fill in the proposals of sequences that have none."""
        speculating = [i for i, sequence in enumerate(sequences) if sequence.speculates and proposals[i] is NO_PROPOSAL]
        if not speculating:
            return
        found: dict[int, Copies] = {}
        is_trial = False
        if copies:
            started = time.perf_counter()
            self._rounds_without_copies += 1
            is_trial = self._rounds_without_copies >= _TRY_COPIES_EVERY
            found = self._copy_finder.find(sequences, speculating, is_trial=is_trial)
            times.looking_s = time.perf_counter() - started
        speed = self._copy(sequences, found, proposals, drafts=drafts, is_trial=is_trial)
        if not drafts:
            return
        rest = [i for i in speculating if proposals[i] is NO_PROPOSAL and sequences[i].num_remaining > 1]
        drafted = self._draft(sequences, rest, times)
        if found and drafted and not any(proposal.explored_at is not None for _, proposal in drafted):
            drafted = self._merge(sequences, drafted, found, proposals, speed=speed)
        for i, proposal in drafted:
            proposals[i] = proposal

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
            accepted = set(path)
            for node in proposal.copies:
                if node.parent in accepted:
                    self.reliability.observe(node.table, node.cell, accepted=node.column in accepted)
        if proposal.source is Source.DRAFT or proposal.weighed is not None:
            self._planner.observe(sequence, proposal, path=path, tokens=tokens, finished=finished)

    # -- copies --------------------------------------------------------------------------------------------------------

    def _copy(
        self,
        sequences: Sequence[RunningSequence],
        copies: dict[int, Copies],
        proposals: list[Proposal],
        *,
        drafts: bool,
        is_trial: bool,
    ) -> float:
        """Propose copies where they promise more than the draft, if that may run. Returns the tokens per second."""
        if not copies:
            return 0.0
        survivals = [each.survivals for each in copies.values()]
        rates = [self._planner.rate_of(sequences[i]) if drafts else 0.0 for i in copies]
        counts, speed = self._copy_planner.choose(survivals, rates, batch_size=len(sequences), is_trial=is_trial)
        for (i, each), count in zip(copies.items(), counts, strict=True):
            table = self.reliability.table(sampled=sequences[i].temperature > 0)
            proposals[i] = copied(each, count, table=table)
        return speed

    def _merge(
        self,
        sequences: Sequence[RunningSequence],
        drafted: list[tuple[int, Proposal]],
        copies: dict[int, Copies],
        proposals: list[Proposal],
        *,
        speed: float,
    ) -> list[tuple[int, Proposal]]:
        """Add to the draft's proposals the copies that are worth a column."""
        if not self._planner.costs.ragged or not self._planner.limits.adaptive:
            return drafted
        counts = [len(proposal.tokens) for proposal in proposals] + [len(proposal.tokens) for _, proposal in drafted]
        price = speed * self._planner.costs.column_s(len(sequences), sum(counts))
        merged = []
        for i, proposal in drafted:
            if i in copies:
                proposal = with_copies(
                    proposal,
                    copies[i],
                    reliability=self.reliability,
                    sampled=sequences[i].temperature > 0,
                    least=price,
                    most=self._planner.limits.copied_tokens,
                )
            merged.append((i, proposal))
        return merged

    # -- the draft -----------------------------------------------------------------------------------------------------

    def _draft(
        self, all_sequences: Sequence[RunningSequence], candidates: list[int], times: ProposingTimes
    ) -> list[tuple[int, Proposal]]:
        """What the draft proposes for those at `candidates`, with the indices of the sequences."""
        drafter, batch_size = self._drafter, len(all_sequences)
        if drafter is None or not candidates:
            return []
        rates = [self._planner.rate_of(all_sequences[i]) for i in candidates]
        decision = self._planner.decide(rates, batch_size=batch_size)
        if not decision.length:
            return []
        uncached = {i: drafter.num_uncached(all_sequences[i].slot, all_sequences[i].length) for i in candidates}
        if decision.is_probe:
            candidates = [min(candidates, key=uncached.__getitem__)]
            if not self._planner.affords_probe(batch_size, uncached=uncached[candidates[0]]):
                return []
        else:
            remaining = sum(min(MAX_REMAINING_TOKENS, sequence.num_remaining) for sequence in all_sequences)
            missing = sum(uncached[i] for i in candidates)
            if not self._planner.pays_for_catching_up(
                decision.length, rates, batch_size=batch_size, uncached=missing, remaining=remaining
            ):
                return []
        started = time.perf_counter()
        candidates, num_read = self._caught_up(all_sequences, candidates, uncached)
        num_read += sum(uncached[i] for i in candidates)
        read_apart, read_apart_s = 0, 0.0
        if candidates and decision.is_probe:
            # Probes alone measure a draft that does not pay, and the time of both together says nothing of its steps.
            probed = all_sequences[candidates[0]]
            read_apart = drafter.catch_up(probed.slot, probed.length, most=max(0, num_read - READ_IN_A_STEP))
            read_apart_s = time.perf_counter() - started
        if candidates:
            sequences = [all_sequences[i] for i in candidates]
            explores = [False] * len(sequences)
            if self.explore_share and not decision.is_probe and self._rng.random() < self.explore_share:
                explores = [
                    sequence.request.store and sequence.temperature == 0 and uses_temperature_only(sequence.params)
                    for sequence in sequences
                ]
            drafted = self._run(sequences, decision, explores, batch_size=batch_size)
        times.drafting_s = time.perf_counter() - started
        catch_up_s = self._planner.costs.catch_up_s(len(candidates), uncached=num_read)
        times.catching_up_s = min(times.drafting_s, catch_up_s)
        if not candidates:
            return []
        found = self._proposals(drafted, explores)
        if not any(explores):
            self._planner.observe_catch_up(read_apart, read_apart_s)
            drafting_s, left = times.drafting_s - read_apart_s, num_read - read_apart
            self._planner.observe_draft(len(found), len(drafted.outcomes), drafting_s, uncached=left)
        return list(zip(candidates, found, strict=True))

    def _caught_up(
        self, sequences: Sequence[RunningSequence], candidates: list[int], uncached: dict[int, int]
    ) -> tuple[list[int], int]:
        """Those whose prompt the draft has read. For others it reads on, as far as this round's time allows.

        Also returns how many positions it has read for others.
        """
        drafter, position_s = self._drafter, self._planner.costs.catch_up_position_s
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
        decision: DraftDecision,
        explores: list[bool],
        *,
        batch_size: int,
    ) -> Drafted:
        """Draft for some sequences what was decided."""
        assert self._drafter is not None
        inputs = DraftInputs(
            slots=[sequence.slot for sequence in sequences], lengths=[sequence.length for sequence in sequences]
        )
        noise = self._noise(sequences, explores)
        if any(explores):
            return self._drafter.propose(inputs, num_steps=decision.length, noise=noise, with_logprobs=True)
        if self._weighs(decision):
            limits = self._planner.limits
            return self._drafter.propose_weighed(
                inputs,
                num_steps=limits.draft_tokens,
                num_nodes=limits.weighed_tokens,
                num_siblings=limits.sibling_tokens,
                weighing=self._planner.weighing(sequences, batch_size=batch_size, speed=decision.speed),
                noise=noise,
            )
        min_gains = None
        if not decision.is_trial:
            min_gains = self._planner.min_gains(
                decision.length, len(sequences), batch_size=batch_size, speed=decision.speed
            )
        return self._drafter.propose(inputs, num_steps=decision.length, noise=noise, min_gains=min_gains)

    def _weighs(self, decision: DraftDecision) -> bool:
        """False where a length is drafted to measure it, or a draft was swapped in that has no native steps."""
        if not self._planner.limits.sibling_tokens or decision.is_trial or decision.is_probe:
            return False
        return self._drafter is not None and self._drafter.is_native

    def _noise(self, sequences: list[RunningSequence], explores: list[bool]) -> ColumnDraws | None:
        """The noise that the target draws with; where a sequence explores, noise of its own."""
        if not any(explores) and all(sequence.temperature == 0 for sequence in sequences):
            return None
        temperatures, keys = [], []
        for sequence, explore in zip(sequences, explores, strict=True):
            temperatures.append(self.explore_temperature if explore else sequence.temperature)
            keys.append(self._rng.getrandbits(63) if explore else sequence.noise_key)
        positions = [sequence.length - sequence.prompt_length for sequence in sequences]
        return ColumnDraws(temperatures, keys, positions)

    def _proposals(self, drafted: Drafted, explores: list[bool]) -> list[Proposal]:
        if drafted.first_choices is not None and drafted.shares is not None:
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
        tokens, logprobs = drafted.tokens, drafted.logprobs
        return [
            Proposal(
                tokens=tokens[b],
                source=Source.DRAFT,
                num_drafted=len(tokens[b]),
                explored_at=self.explore_temperature if explore else None,
                logprobs=logprobs[b] if logprobs is not None and explore else None,
            )
            for b, explore in enumerate(explores)
        ]
