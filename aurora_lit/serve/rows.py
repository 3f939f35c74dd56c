"""What the engine keeps of a request that holds a slot, and its counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from aurora_lit.request import Request, SamplingParams, TokenLogprob
from aurora_lit.serve.lookup import NgramIndex


@dataclass(kw_only=True)
class EngineStats:
    """Counters since start."""

    rounds: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    """Rounds of a request in which tokens were proposed for it."""
    proposed: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=lambda: [0] * 8)
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
class Row:
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
    lookup_rate: float = 0.6
    """The same of prompt lookup; starts where it is tried before the draft has shown more."""
    looked_up: bool = False
    """Whether this round's proposals are copied."""
    explored: bool = False
    """Whether this round's proposals are drawn at the exploration's temperature."""
    versions: dict[str, None] = field(default_factory=dict)
    """Draft versions that have proposed for it, in the order they came."""
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

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
