"""The last step of a round: a sequence's new tokens become part of it, and everybody who keeps count is told.

Left out: which tokens they are (serve/engine/round_plan.py), and the slots' keys, values and hidden states
(serve/engine/target_runner.py).

Shapes: S slots, L capacity of a slot, T columns of a row, V vocabulary.
"""

from __future__ import annotations

import torch

from aurora_lit.errors import RequestError
from aurora_lit.ipc.engine_status import EngineCounters
from aurora_lit.modules.sampling.distribution import token_logprobs
from aurora_lit.modules.sampling.tree import common_prefix_length
from aurora_lit.request import Output, Source
from aurora_lit.serve.engine.round_plan import DecodingRow, RowOutcome
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.propose import Proposer


class Commit:
    """Commits what rounds have come to.

    >>> commit = Commit(tokens_SL, max_seq_len=2048, proposer=proposer, counters=counters)
    >>> output = commit(row, judge(row.proposal, own_tokens), None, draft_version="draft-000001")
    """

    def __init__(
        self,
        tokens_SL: torch.Tensor,
        *,
        max_seq_len: int,
        proposer: Proposer,
        counters: EngineCounters,
    ) -> None:
        """`tokens_SL`: the engine's table of committed tokens, int64."""
        self._tokens_SL = tokens_SL
        self._tokens_on_cpu = tokens_SL.numpy().data if tokens_SL.device.type == "cpu" else None
        """The same memory, which takes a few tokens faster; None on another device."""
        self._max_seq_len = max_seq_len
        self._proposer, self._counters = proposer, counters

    def __call__(
        self, row: DecodingRow, outcome: RowOutcome, logits_TV: torch.Tensor | None, *, draft_version: str
    ) -> Output:
        """Append a sequence's new tokens, up to where the request ends.

        `logits_TV`: the target's, for a request that asks for log-probabilities. `draft_version`: what proposes now.
        """
        sequence, proposal = row.sequence, row.proposal
        tokens, reason = sequence.cut_at_end(outcome.tokens, max_seq_len=self._max_seq_len)
        logprobs = None
        if logits_TV is not None:
            num_top = sequence.params.logprobs or 0
            logprobs = token_logprobs(logits_TV[outcome.columns], token_ids=tokens, num_top=num_top)
        proposed, accepted = len(proposal.tokens), min(len(outcome.tokens) - 1, len(tokens))
        path = outcome.columns[: accepted + 1]
        first_choices = proposal.first_choices
        chain_accepted = common_prefix_length(first_choices, path[1:])
        is_first = sequence.length == sequence.prompt_length
        self._append(sequence, tokens)
        error = None
        if sequence.grammar is not None and reason is None:
            try:
                sequence.grammar.advance(tokens)
                if sequence.grammar.is_done:
                    sequence.grammar = None
            except RequestError as failure:
                reason, error = "error", failure.message
        made = (proposal, path)
        if row.uncut is not None:  # what was cut counts as rejected
            made = (row.uncut.proposal, [row.uncut.columns[column] for column in path])
        self._proposer.observe(sequence, made[0], path=made[1], tokens=tokens, finished=reason is not None)
        accepted_from = proposal.sources_of(path[1:])
        self._counters.count(
            generated=len(tokens),
            proposed=proposed,
            accepted_from=accepted_from,
            remembered=len(proposal.remembered),
        )
        if proposal.source is Source.DRAFT:
            sequence.draft_versions[draft_version] = None
        return Output(
            request_id=sequence.request.request_id,
            token_ids=tuple(tokens),
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and sequence.prompt_logprobs else None,
            is_first=is_first,
            num_proposed=proposed,
            num_accepted=accepted,
            first_choices=None if len(first_choices) == proposed else (len(first_choices), chain_accepted),
            tested_choices=None if made[0].weighed is None else made[0].weighed.tested_by(tokens),
            finish_reason=reason,
            error=error,
            only_copied=proposed > 0 and not proposal.num_drafted,
            accepted_from=accepted_from,
            draft_versions=tuple(sequence.draft_versions),
            domain=sequence.domain,
            num_cached_tokens=sequence.num_reused,
        )

    def _append(self, sequence: RunningSequence, tokens: list[int]) -> None:
        end = sequence.length + len(tokens)
        if self._tokens_on_cpu is not None:
            for position, token in enumerate(tokens, sequence.length):
                self._tokens_on_cpu[sequence.slot, position] = token
        else:
            new = torch.tensor(tokens, dtype=torch.int64, device=self._tokens_SL.device)
            self._tokens_SL[sequence.slot, sequence.length : end] = new
        sequence.length = end
        if tokens:
            sequence.last_token = tokens[-1]
