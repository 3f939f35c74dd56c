"""Who proposes what in a round: prompt lookup where it promises more, else the draft, else nobody.

Lookup serves rows that accept what equals the target's own token (greedy and seeded ones); for the others proposals
must be drawn from a distribution, which only the draft has. No draft pass runs when no row needs one.

Exploration: in a share of a row's drafted rounds the proposals are drawn from the draft at a temperature of its own,
for greedy and seeded rows too, so that a learner sees what else the draft could have said and with which probability.
Verification does not change, so output stays exact; such rounds accept less. They propose chains, as do rounds with
rows that are sampled freely or have a penalty: a tree is for rows that accept what equals the target's own token.
What is left out: the draft's work (serve/speculation/drafter.py), lengths and costs (serve/speculation/planner.py), verification.

Shapes: B rows, K proposals, D draft vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from aurora_lit.modules.sampling.distribution import LogitOptions, is_greedy
from aurora_lit.modules.sampling.verification import Proposals, behaviour_logprobs
from aurora_lit.request import SamplingParams
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.serve.speculation.draft_tree import propose_tree
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.ngram_planner import NgramPlanner
from aurora_lit.serve.speculation.planner import MOST_LEFT, SpeculationPlanner

_MOST_SIDE_BY_SIDE = 4
"""Tokens copied where a round computes as many columns, and logits, for all rows as for the one with most."""


class Proposer:
    """Makes the round's proposals for a batch; `drafter` None: lookup alone, `copying` None: the draft alone."""

    def __init__(
        self,
        drafter: Drafter | None,
        policy: SpeculationPlanner,
        *,
        copying: NgramPlanner | None,
        device: torch.device,
        explore_share: float = 0.0,
        explore_temperature: float = 1.0,
        explore_seed: int = 0,
        log_probabilities: bool = False,
    ) -> None:
        """`log_probabilities`: also say how likely each proposal was (`Proposals.logprob_BK`)."""
        self._drafter = drafter
        self._policy = policy
        self._copying = copying
        self._device = device
        self.explore_share, self.explore_temperature = explore_share, explore_temperature
        self._rng = random.Random(explore_seed)
        self._log_probabilities = log_probabilities
        self._options_rows: list[RunningSequence] = []
        self._options = LogitOptions.of([])

    def propose(self, rows: Sequence[RunningSequence], *, ragged: bool = False) -> Proposals:
        """Proposals for each row; sets each row's `looked_up` and `explored`, so that the outcome counts for those.

        `ragged`: rows may have very different numbers of them, since the target runs no more than those.
        """
        self._policy.ragged = ragged
        speculating = [i for i, row in enumerate(rows) if row.params.speculate]
        copied = self._look_up(rows, speculating)
        for i, row in enumerate(rows):
            row.looked_up, row.explored = i in copied, False
        drafting = [i for i in speculating if i not in copied]
        drafted, drafting = self._draft(rows, drafting)
        return self._merge(len(rows), copied, drafting, drafted)

    def observe(self, row: RunningSequence, *, proposed: int, accepted: int, cut: bool) -> None:
        """Take in a round's outcome; `cut`: the request ended there, maybe within what was right."""
        if not row.looked_up:
            self._policy.observe(row, proposed=proposed, accepted=accepted)
        elif self._copying is not None and not cut:
            self._copying.record.observe(row.match, proposed=proposed, accepted=accepted)

    def _look_up(self, rows: Sequence[RunningSequence], speculating: list[int]) -> dict[int, list[int]]:
        """Tokens copied for the rows of which a copy promises more than the draft."""
        if self._copying is None:
            return {}
        most = self._copying.most if self._policy.ragged else min(self._copying.most, _MOST_SIDE_BY_SIDE)
        places, survivals = {}, []
        for i in speculating:
            row = rows[i]
            count = min(most, row.num_left - 1)
            if count > 0 and (is_greedy(row.params) or row.params.seed is not None):
                row.match, place = row.ngrams.longest()
                if row.match:
                    places[i] = place
                    survivals.append(self._copying.record.survival(row.match, count))
        if not places:
            return {}
        rates = [rows[i].rate for i in places]
        counts = self._copying.choose(survivals, rates, num_others=len(rows) - len(places))
        chosen = zip(places.items(), counts, strict=True)
        return {i: rows[i].ngrams.continuation(place, count) for (i, place), count in chosen if count}

    def _draft(self, all_rows: Sequence[RunningSequence], places: list[int]) -> tuple[Proposals | None, list[int]]:
        """What is drafted, and for which of the rows at `places`."""
        rows = [all_rows[i] for i in places]
        num_steps = self._policy.choose([row.rate for row in rows], num_plain=len(all_rows) - len(rows))
        if self._drafter is None or not (num_steps or self._policy.tree_sizes):
            return None, []
        behind = [self._drafter.behind(row.slot, row.length) for row in rows]
        if self._policy.probing:
            least = min(range(len(rows)), key=behind.__getitem__)
            places, rows, behind = [places[least]], [rows[least]], [behind[least]]
        rates, num_others = [row.rate for row in rows], len(all_rows) - len(rows)
        options, num_nodes = self._options_for(rows), 0
        if not (options.num_free or options.penalty_rows.numel() or self._policy.probing):
            num_steps, num_nodes = self._policy.choose_tree(num_steps, rates, num_plain=num_others)
        left = sum(min(MOST_LEFT, row.num_left) for row in all_rows)
        debt = sum(behind)
        if not num_steps or not self._policy.stands(
            num_steps, num_nodes, rates, num_plain=num_others, behind=debt, left=left
        ):
            for row in rows:
                row.explored = False
            return None, []
        if num_nodes:
            return self._branch(rows, rates, num_steps, num_nodes, num_others, debt), places
        return self._chain(rows, options, num_steps, num_others, debt), places

    def _chain(
        self, rows: list[RunningSequence], options: LogitOptions, num_steps: int, num_others: int, behind: int
    ) -> Proposals:
        assert self._drafter is not None
        survival = [1.0] * len(rows)
        started = time.perf_counter()
        drafted = self._drafter.propose(
            self._draft_rows(rows),
            options=options,
            num_steps=num_steps,
            uniform_BK=torch.rand(len(rows), num_steps, dtype=torch.float64, device=self._device),
            go_on=lambda done, values_B: self._policy.worth_another_step(
                done, values_B.tolist(), survival, num_plain=num_others
            ),
        )
        seconds = time.perf_counter() - started
        self._policy.observe_draft(len(rows), drafted.token_BK.shape[1], seconds, behind=behind)
        if not self._log_probabilities:
            return drafted
        logprob_BK = behaviour_logprobs(drafted, options=options, vocabulary=self._drafter.vocabulary)
        return replace(drafted, logprob_BK=logprob_BK)

    def _branch(
        self,
        rows: list[RunningSequence],
        rates: list[float],
        num_steps: int,
        num_nodes: int,
        num_others: int,
        behind: int,
    ) -> Proposals:
        """A tree a row, for rows that accept what equals the target's own token and count none of their past."""
        assert self._drafter is not None
        started = time.perf_counter()
        drafted, levels = propose_tree(
            self._drafter,
            self._draft_rows(rows),
            num_steps=num_steps,
            num_nodes=num_nodes,
            go_on=lambda done, reach_B: self._policy.worth_another_level(
                reach_B, rates, nodes=num_nodes, num_plain=num_others
            ),
        )
        self._policy.observe_levels(len(rows), levels, time.perf_counter() - started, behind=behind)
        return drafted

    def _draft_rows(self, rows: Sequence[RunningSequence]) -> DraftInputs:
        slots_B = torch.tensor([row.slot for row in rows], device=self._device)
        return DraftInputs(slots_B=slots_B, lengths=[row.length for row in rows])

    def _options_for(self, rows: list[RunningSequence]) -> LogitOptions:
        """How each row's proposals are drawn: by its own options, or by exploring."""
        if self.explore_share:
            for row in rows:
                row.explored = row.request.store and self._rng.random() < self.explore_share
            if any(row.explored for row in rows):
                # As if it were a request that is sampled freely; the target's pass keeps to what was asked for.
                free = SamplingParams(max_tokens=1, temperature=self.explore_temperature)
                return LogitOptions.of([free if row.explored else row.params for row in rows], device=self._device)
        if rows != self._options_rows:
            self._options_rows = rows
            self._options = LogitOptions.of([row.params for row in rows], device=self._device)
        return self._options

    def _merge(
        self, num_rows: int, copied: dict[int, list[int]], drafting: list[int], drafted: Proposals | None
    ) -> Proposals:
        """One table for all rows; a row with neither has no proposals."""
        if drafted is not None and len(drafting) == num_rows:
            return drafted
        steps = 0 if drafted is None else drafted.token_BK.shape[1]
        width = max([steps, *(len(tokens) for tokens in copied.values())])
        token_BK = torch.zeros(num_rows, width, dtype=torch.int64, device=self._device)
        num_B = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        q_BKD = logprob_BK = parent_BK = None
        if drafted is not None:
            index = torch.tensor(drafting, device=self._device)
            token_BK[index, :steps] = drafted.token_BK
            num_B[index] = drafted.num_B
            if drafted.parent_BK is not None:
                parent_BK = torch.arange(width).repeat(num_rows, 1)  # the others' are chains
                parent_BK[index, :steps] = drafted.parent_BK
            if drafted.q_BKD is not None:
                q_BKD = drafted.q_BKD.new_zeros(num_rows, width, drafted.q_BKD.shape[2])
                q_BKD[index, :steps] = drafted.q_BKD
            if drafted.logprob_BK is not None:
                logprob_BK = drafted.logprob_BK.new_full((num_rows, width), float("nan"))
                logprob_BK[index, :steps] = drafted.logprob_BK
        for i, tokens in copied.items():
            token_BK[i, : len(tokens)] = torch.tensor(tokens, device=self._device)
            num_B[i] = len(tokens)
        return Proposals(token_BK=token_BK, num_B=num_B, q_BKD=q_BKD, logprob_BK=logprob_BK, parent_BK=parent_BK)
