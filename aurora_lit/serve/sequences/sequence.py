"""A running sequence as the engine keeps it, the engine's counters, and the outcome of verification by sequence.

Left out: the slots themselves (models/kv_cache.py), who gets one (serve/sequences/slot_allocator.py), and verification
(modules/sampling/verification.py).

Shapes: S slots, L capacity of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from aurora_lit.modules.sampling.distribution import History, LogitOptions
from aurora_lit.modules.sampling.proposals import Proposals
from aurora_lit.modules.sampling.tree import depths, first_choices
from aurora_lit.modules.sampling.verification import VerificationResult
from aurora_lit.request import Request, SamplingParams, TokenLogprob
from aurora_lit.serve.sequences.ngram_index import NgramIndex
from aurora_lit.settings import MAX_PROPOSAL_LENGTH


@dataclass(kw_only=True)
class EngineStats:
    """Counters since the engine was created."""

    rounds: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that were not computed because a slot already held them."""
    generated_tokens: int = 0
    drafts: int = 0
    """Rounds of single sequences that had proposals, from the draft or from n-gram lookup."""
    proposed: int = 0
    """Tokens."""
    accepted: int = 0
    """Tokens."""
    accepted_by_position: list[int] = field(default_factory=lambda: [0] * MAX_PROPOSAL_LENGTH)
    """Rounds of single sequences that accepted their first, second, … proposal."""
    opted_out: int = 0
    """Requests of which no trace may be made."""
    explored_drafts: int = 0
    """Those of `drafts` that were sampled at the exploration temperature."""

    def count(self, *, generated: int, proposed: int, accepted: int, explored: bool) -> None:
        """Add one round of one sequence."""
        self.generated_tokens += generated
        self.drafts += proposed > 0
        self.proposed += proposed
        self.accepted += accepted
        self.explored_drafts += explored
        for position in range(accepted):
            self.accepted_by_position[position] += 1


@dataclass(kw_only=True, eq=False)
class RunningSequence:
    """A request that holds a slot: first prefilling, then decoding."""

    request: Request
    slot: int
    acceptance_rate: float
    """Running mean for the draft's proposals."""
    prompt_length: int
    length: int
    """Committed tokens. While decoding, the target has computed all of them but the last."""
    prefilled: int = 0
    """Prompt tokens that the target has computed, or that were copied from another slot."""
    searched_for_prefix: bool = False
    """True once the other slots were searched for a prefix of the prompt."""
    uses_lookup: bool = False
    """True if this round's proposals come from n-gram lookup."""
    ngram_match: int = 0
    """Length of the longest n-gram match in this round, in tokens; 0: none."""
    is_exploring: bool = False
    """True if this round's proposals are sampled at the exploration temperature."""
    draft_versions: dict[str, None] = field(default_factory=dict)
    """Draft versions that have proposed for it, in order (an ordered set)."""
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys, values and hidden states are in the slot."""
        return self.length - 1 if self.prefilled == self.prompt_length - 1 else self.prefilled

    @property
    def num_remaining(self) -> int:
        """Tokens that `max_tokens` still allows."""
        return self.params.max_tokens - self.length + self.prompt_length

    @property
    def params(self) -> SamplingParams:
        """How the request is decoded."""
        return self.request.params

    def cut_at_end(
        self, tokens: list[int], *, eos_token_ids: frozenset[int], max_seq_len: int
    ) -> tuple[list[int], str | None]:
        """New tokens up to the end of the request, and the finish reason; None: it goes on."""
        room = min(self.params.max_tokens - (self.length - self.prompt_length), max_seq_len - self.length)
        tokens = tokens[: max(0, room)]
        ends = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else eos_token_ids)
        for i, token in enumerate(tokens):
            if token in ends:
                return tokens[: i + 1], "stop"
        return tokens, "length" if len(tokens) == room or room <= 0 else None


def token_history(
    sequences: Sequence[RunningSequence], options: LogitOptions, tokens_SL: torch.Tensor
) -> History | None:
    """The sequences' tokens, if an option depends on them (penalties, seeds). `tokens_SL`: committed tokens by slot."""
    if not options.penalty_rows.numel() and options.num_unseeded == options.num_sampled:
        return None
    longest, device = max(sequence.length for sequence in sequences), tokens_SL.device
    return History(
        token_BL=tokens_SL[torch.tensor([sequence.slot for sequence in sequences], device=device), :longest],
        prompt_length_B=torch.tensor([sequence.prompt_length for sequence in sequences], device=device),
        length_B=torch.tensor([sequence.length for sequence in sequences], device=device),
    )


class VerifiedTokens(NamedTuple):
    """The outcome of verification for one sequence."""

    tokens: list[int]
    """The accepted proposals, and the target's own token that follows them."""
    columns: list[int]
    """For each of `tokens`, the column of the target's forward pass whose logits decided it."""
    num_proposed: int
    num_levels: int
    """Depth of the proposals: their number, or the depth of a tree."""
    first_choices: list[int]
    """Tokens of the chain of the draft's first choices: all proposals, or one path of a tree."""


def verified_tokens(proposals: Proposals, result: VerificationResult) -> list[VerifiedTokens]:
    """The verification result of a batch as one record per sequence."""
    proposed, counts = proposals.token_BK.tolist(), proposals.num_proposed_B.tolist()
    accepted, final = result.num_accepted_B.tolist(), result.next_token_B.tolist()
    if proposals.parent_BK is None or result.accepted_column_BA is None:
        return [
            VerifiedTokens([*tokens[:hits], last], list(range(hits + 1)), count, count, tokens[:count])
            for tokens, count, hits, last in zip(proposed, counts, accepted, final, strict=True)
        ]
    verified = []
    for b, (tokens, count, hits) in enumerate(zip(proposed, counts, accepted, strict=True)):
        parents = proposals.parent_BK[b, :count].tolist()
        columns = result.accepted_column_BA[b, : hits + 1].tolist()
        chain = [tokens[column - 1] for column in first_choices(parents)]
        path = [tokens[column - 1] for column in columns[1:]]
        verified.append(VerifiedTokens([*path, final[b]], columns, count, max(depths(parents)), chain))
    return verified
