"""Made-up traces whose prompts are of a few kinds, with the statistics of real hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_lit.request import Source
from aurora_lit.traces.record import Trace

_WIDTH = 96

KINDS = ("code", "chat", "prose", "sql")


class PromptMaker:
    """Makes traces whose prompts are of one of a few kinds; the first position is an attention sink."""

    def __init__(self, seed: int = 0, *, spread: float = 1.0) -> None:
        self._spread = spread
        self._gen = torch.Generator().manual_seed(seed)
        directions = torch.randn(len(KINDS), _WIDTH, generator=torch.Generator().manual_seed(99))
        self._centre = dict(zip(KINDS, directions, strict=True))
        self._centre["chatty"] = 0.8 * self._centre["chat"] + 0.6 * self._centre["prose"]
        self._scale_E = torch.ones(_WIDTH)
        self._scale_E[:3] = 300.0
        self._number = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._gen)

    def trace(self, kind: str, *, label: str = "", accepted: float | None = None) -> Trace:
        """A trace of a prompt of this kind. `accepted`: acceptance rate of ten rounds; None: it has no rounds."""
        self._number += 1
        prompt, length = 8, 24
        noise = 0.8 * self.normal(_WIDTH) + 2.0 * self.normal(length, _WIDTH)
        states = self._centre[kind] + self._spread * noise + 0.5
        states = states * self._scale_E
        states[0] = 1e4 * self.normal(_WIDTH)
        tokens = torch.randint(0, 50, (length,), generator=self._gen, dtype=torch.int32)
        rounds = {} if accepted is None else rounds_with(tokens, prompt, accepted)
        return Trace(
            request_id=f"r{self._number}",
            domain=label,
            verify="greedy",
            answer_start=prompt,
            token_ids_T=tokens,
            aux_T3H=states.bfloat16(),
            last_TH=torch.zeros(length, _WIDTH // 3, dtype=torch.bfloat16),
            **rounds,
        )


def rounds_with(tokens: Tensor, prompt: int, accepted: float) -> dict[str, Tensor]:
    """Ten rounds of one proposal each, of which the share `accepted` was accepted."""
    num_accepted = round(10 * accepted)
    return {
        "round_root_R": torch.arange(prompt, prompt + 10, dtype=torch.int32),
        "round_version_R": torch.zeros(10, dtype=torch.int32),
        "num_proposed_R": torch.ones(10, dtype=torch.int32),
        "num_accepted_R": (torch.arange(10) < num_accepted).int(),
        "source_R": torch.full((10,), Source.DRAFT, dtype=torch.uint8),
        "proposal_RK": tokens[prompt + 1 : prompt + 11, None].clone(),
    }
