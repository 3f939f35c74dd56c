"""Traces that a tiny engine records while it serves, and what a learner needs to train on them.

traces = serve(target, draft, some_requests(10))        # list of Trace
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from aurora_lit.learn.data.trace_parts import first_trained_position
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.modules.losses.draft_module import DraftModule
from aurora_lit.modules.losses.objective import OnlineWeights
from aurora_lit.request import Request
from aurora_lit.serve.engine.trace_recorder import TraceRecorder
from aurora_lit.traces.record import Trace, to_bytes
from support.tiny_models import VOCAB, draft_module, make_engine, request, run
from support.trace_examples import keep_in


def some_requests(
    count: int, *, seed: int = 0, max_tokens: int = 24, domain: str = "chat", **params: Any
) -> list[Request]:
    """Requests with random short prompts, and noise of their own if they are sampled."""
    gen = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, VOCAB, (3,), generator=gen).tolist() for _ in range(count)]
    requests = [request(f"{domain}-{seed}-{i}", p, max_tokens=max_tokens, **params) for i, p in enumerate(prompts)]
    return [replace(r, domain=domain, noise_key=1000 * seed + i) for i, r in enumerate(requests)]


def serve(target: Target, draft: Eagle3Draft | None, requests: Sequence[Request], **changes: Any) -> list[Trace]:
    """The traces that an engine records while it answers the requests."""
    traces: list[Trace] = []
    recorder = TraceRecorder(keep_in(traces), hidden_size=target.hidden_size)
    draft = copy.deepcopy(draft)  # an engine packs the weights of its draft in place
    engine = make_engine(target, draft, observer=recorder, **{"max_draft_tokens": 3, **changes})
    run(engine, requests)
    return traces


def asked_again(traces: Sequence[Trace], times: int) -> list[Trace]:
    """The traces as if the same prompts were asked so often, each time in a new request."""
    return [replace(trace, request_id=f"{n}-{trace.request_id}") for n in range(times) for trace in traces]


def online_module(target: Target, draft: Eagle3Draft, **changes: Any) -> DraftModule:
    """A module as the learner uses it, with a learning rate that has an effect within a few steps."""
    fields: dict[str, Any] = {
        "num_steps": 3,
        "learning_rate": 4e-3,
        "online": OnlineWeights(),
    }
    return draft_module(target, draft, **{**fields, **changes})


def make_controller(**changes: Any) -> DomainController:
    """A controller that warms up and then keeps the full learning rate, so that tests learn fast."""
    fields: dict[str, Any] = {
        "detector": None,
        "warmup_steps": 2,
        "min_lr_factor": 1.0,
        "decay_tokens": 1000.0,
    }
    return DomainController(**{**fields, **changes})


class FakeRing:
    """The reading end of a ring, filled by the test."""

    def __init__(self, records: Sequence[Trace | bytes] = ()) -> None:
        self.records = deque(records)
        self.passes_over = False
        """Else a test may put in at once what it wants to be read in the course of time."""

    def pop(self) -> bytes | None:
        if not self.records:
            return None
        record = self.records.popleft()
        return record if isinstance(record, bytes) else to_bytes(record)

    def pass_over(self, most: float) -> None:
        while self.passes_over and self.lag_bytes > most * 200_000:
            self.records.popleft()

    @property
    def lag_records(self) -> int:
        return len(self.records)

    @property
    def lag_bytes(self) -> int:
        return 1000 * len(self.records)


def check_trace(target: Target, trace: Trace, *, has_prompt: bool = False) -> None:
    """The states of a trace are those of a plain pass over its tokens; `has_prompt`: the prompt's last ones too."""
    with torch.no_grad():
        aux, last = target.in_torch.forward_uncached(trace.token_ids_T.long()[None])
    rounding = {"atol": 1e-4, "rtol": 2**-8}  # traces are bf16
    torch.testing.assert_close(trace.aux_T3H.float(), aux[0], **rounding)
    start = 0 if has_prompt else first_trained_position(trace)
    torch.testing.assert_close(trace.last_TH[start:].float(), last[0, start:], **rounding)
