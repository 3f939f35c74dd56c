"""What the engine keeps of a request that holds a slot, its counters, and a round's verdict on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from aurora_lit.modules.sampling.distribution import History, LogitOptions
from aurora_lit.modules.sampling.tree import depths, first_choices
from aurora_lit.modules.sampling.verification import Proposals, Verdict
from aurora_lit.request import Request, SamplingParams, TokenLogprob
from aurora_lit.serve.sequences.ngram_index import NgramIndex
from aurora_lit.settings import MOST_PROPOSED


@dataclass(kw_only=True)
class EngineStats:
    """Counters since start."""

    rounds: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that were not computed, since a slot held them."""
    generated_tokens: int = 0
    drafts: int = 0
    """Rounds of a request in which tokens were proposed for it."""
    proposed: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=lambda: [0] * MOST_PROPOSED)
    opted_out: int = 0
    """Requests of which no trace may be made."""
    explored: int = 0
    """Those of `drafts` that proposed by sampling at the exploration's temperature."""

    def count(self, *, generated: int, proposed: int, accepted: int, explored: bool) -> None:
        """Take in one round of one request."""
        self.generated_tokens += generated
        self.drafts += proposed > 0
        self.proposed += proposed
        self.accepted += accepted
        self.explored += explored
        for position in range(accepted):
            self.accepted_by_position[position] += 1


@dataclass(kw_only=True, eq=False)
class RunningSequence:
    """A request that has a slot."""

    request: Request
    slot: int
    rate: float
    """Running acceptance rate of the draft."""
    prompt_length: int
    length: int
    """Committed tokens. While decoding, the target has run all but the last."""
    prefilled: int = 0
    """Prompt tokens the target has run."""
    looked_for_beginning: bool = False
    """Whether other slots were searched for the prompt's beginning."""
    looked_up: bool = False
    """Whether this round's proposals are copied."""
    match: int = 0
    """How many tokens agree in front of the place that would be copied from."""
    explored: bool = False
    """Whether this round's proposals are drawn at the exploration's temperature."""
    versions: dict[str, None] = field(default_factory=dict)
    """Draft versions that have proposed for it, in the order they came."""
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def num_held(self) -> int:
        """Tokens whose keys, values and states lie in the slot."""
        return self.length - 1 if self.prefilled == self.prompt_length - 1 else self.prefilled

    @property
    def num_left(self) -> int:
        """Tokens that the request may still get, as it was asked for."""
        return self.params.max_tokens - self.length + self.prompt_length

    @property
    def params(self) -> SamplingParams:
        """How the request is decoded."""
        return self.request.params

    def cut_at_end(
        self, tokens: list[int], *, eos_token_ids: frozenset[int], max_seq_len: int
    ) -> tuple[list[int], str | None]:
        """The new tokens up to where the request ends, and the reason, None while it goes on."""
        room = min(self.params.max_tokens - (self.length - self.prompt_length), max_seq_len - self.length)
        tokens = tokens[: max(0, room)]
        ends = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else eos_token_ids)
        for i, token in enumerate(tokens):
            if token in ends:
                return tokens[: i + 1], "stop"
        return tokens, "length" if len(tokens) == room or room <= 0 else None


def history_of(rows: Sequence[RunningSequence], options: LogitOptions, tokens_SL: torch.Tensor) -> History | None:
    """The rows' tokens, where an option depends on them; `tokens_SL` has them by slot."""
    if not options.penalty_rows.numel() and options.num_free == options.num_sampled:
        return None
    longest, device = max(row.length for row in rows), tokens_SL.device
    return History(
        token_BL=tokens_SL[torch.tensor([row.slot for row in rows]), :longest],
        prompt_length_B=torch.tensor([row.prompt_length for row in rows], device=device),
        length_B=torch.tensor([row.length for row in rows], device=device),
    )


class VerifiedTokens(NamedTuple):
    """What a round's verdict means for a row."""

    tokens: list[int]
    """The proposals accepted, and the token that the target says behind them."""
    columns: list[int]
    """Of the target's pass, at which each of these was decided."""
    num_proposed: int
    num_levels: int
    """How far the proposals reached: their number, or the depth of a tree."""
    first_choices: list[int]
    """The chain of the draft's first choices: all proposals, or one path of a tree."""


def judge(proposals: Proposals, verdict: Verdict) -> list[VerifiedTokens]:
    """One record a row."""
    tokens, counts = proposals.token_BK.tolist(), proposals.num_B.tolist()
    accepted, final = verdict.accepted_B.tolist(), verdict.next_token_B.tolist()
    if proposals.parent_BK is None or verdict.column_BA is None:
        return [
            VerifiedTokens([*row[:hits], last], list(range(hits + 1)), count, count, row[:count])
            for row, count, hits, last in zip(tokens, counts, accepted, final, strict=True)
        ]
    judged = []
    for b, (row, count, hits) in enumerate(zip(tokens, counts, accepted, strict=True)):
        parents = proposals.parent_BK[b, :count].tolist()
        columns = verdict.column_BA[b, : hits + 1].tolist()
        chosen = [row[column - 1] for column in first_choices(parents)]
        taken = [row[column - 1] for column in columns[1:]]
        judged.append(VerifiedTokens([*taken, final[b]], columns, count, max(depths(parents)), chosen))
    return judged
