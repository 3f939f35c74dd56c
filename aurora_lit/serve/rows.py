"""What the engine keeps of a request that holds a slot, its counters, and who may watch. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

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
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        """How the request is decoded."""
        return self.request.params


class RoundObserver(Protocol):
    """Sees what the target computed: for recording traces."""

    def on_pass(
        self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor, last_BTH: torch.Tensor
    ) -> None:
        """A target pass over positions start, start + 1, … of each slot; rejected ones are passed again later."""

    def on_finish(self, row: Row, token_ids_T: torch.Tensor) -> None:
        """A request ended with these tokens; the target has run all but the last."""
