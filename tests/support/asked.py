"""Requests with answers that are given, for the traffic memory, and what it proposes for one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from aurora_lit.kernels import suffix_index
from aurora_lit.kernels.suffix_index import NUM_CELLS, Copies, LookUp
from aurora_lit.request import Client, SharedBy
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.serve.speculation.sources.memory import TrafficMemory
from support.tiny_models import request


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request with its answer."""

    client: str
    salt: str
    domain: str
    store: bool
    prompt: list[int]
    answer: list[int]

    def sequence(self) -> RunningSequence:
        """The request when its answer has ended."""
        asked = replace(
            request("r", self.prompt, max_tokens=64),
            client=Client(self.client, self.client),
            cache_salt=self.salt,
            store=self.store,
        )
        length = len(self.prompt) + len(self.answer)
        sequence = RunningSequence(request=asked, slot=0, prompt_length=len(self.prompt), length=length)
        sequence.domain = self.domain
        return sequence

    def may_read(self, other: Asked, shared_by: SharedBy) -> bool:
        """True if the rules allow it, said again in other words than the code's."""
        if not other.store or self.salt != other.salt:
            return False
        return shared_by == "domain" or (self.client != "" and self.client == other.client)


def copies_for(memory: TrafficMemory, sequence: RunningSequence, tokens: list[int]) -> Copies:
    """What the memory proposes after these tokens; `sequence` decides what it may read."""
    tokens_SL = torch.tensor([tokens])
    rate_RC = torch.full((1, NUM_CELLS), 0.9)
    rows = LookUp(
        slots=[0],
        lengths=[sequence.length],
        most=[31],
        parts=[sequence.memory_part],
        tables=[0],
        rate_RC=rate_RC,
        least=1e-6,
        own=False,
    )
    (copies,) = suffix_index.look_up(tokens_SL, rows, memory=memory.index)
    return copies
