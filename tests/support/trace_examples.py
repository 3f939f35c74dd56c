"""Traces made up for tests: consistent, and with values that tell their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from aurora_lit.traces.record import SOURCE_DRAFT, SOURCE_LOOKUP, SOURCE_NOBODY, Trace

HIDDEN = 4


def trace_with_rounds(rounds: Sequence[tuple[int, int, int]], *, length: int = 12, **changes: Any) -> Trace:
    """`rounds`: (root, proposed, accepted). Accepted proposals are the tokens there, others are 50 more.

    Rounds of one proposal are looked up, those of none are nobody's.
    """
    widest = max([proposed for _, proposed, _ in rounds], default=0)
    token_ids_T = torch.arange(100, 100 + length, dtype=torch.int32)
    proposal_RK = torch.full((len(rounds), widest), -1, dtype=torch.int32)
    logprob_RK = torch.full((len(rounds), widest), float("nan"))
    for r, (root, proposed, accepted) in enumerate(rounds):
        for i in range(proposed):
            proposal_RK[r, i] = 100 + root + 1 + i + (0 if i < accepted else 50)
            if proposed > 1:
                logprob_RK[r, i] = -0.5 * i
    sources = [SOURCE_NOBODY if n == 0 else SOURCE_LOOKUP if n == 1 else SOURCE_DRAFT for _, n, _ in rounds]
    num_rejected = sum(max(0, proposed - 1 - accepted) for _, proposed, accepted in rounds)
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "domain": "code",
        "verify": "free",
        "temperature": 0.7,
        "first_position": 3,
        "answer_start": 2,
        "token_ids_T": token_ids_T,
        "aux_T3H": torch.arange(length * 3 * HIDDEN).view(length, 3 * HIDDEN).bfloat16(),
        "last_TH": -torch.arange(length * HIDDEN).view(length, HIDDEN).bfloat16(),
        "round_root_R": torch.tensor([root for root, _, _ in rounds], dtype=torch.int32),
        "round_version_R": torch.tensor([7 if n > 1 else -1 for _, n, _ in rounds], dtype=torch.int32),
        "num_proposed_R": torch.tensor([n for _, n, _ in rounds], dtype=torch.int32),
        "num_accepted_R": torch.tensor([a for _, _, a in rounds], dtype=torch.int32),
        "source_R": torch.tensor(sources, dtype=torch.uint8),
        "explored_R": torch.tensor([n > 2 for _, n, _ in rounds], dtype=torch.bool),
        "draft_temperature_R": torch.ones(len(rounds)),
        "proposal_RK": proposal_RK,
        "behaviour_logprob_RK": logprob_RK,
        "rejected_last_NH": torch.arange(num_rejected * HIDDEN).view(num_rejected, HIDDEN).bfloat16() / 8,
    }
    return Trace(**{**fields, **changes})


def keep_in(traces: list[Trace]) -> Callable[[Trace], None]:
    """A sink that keeps what it is given: a copy, as the recorder's slots go on."""
    return lambda trace: traces.append(trace.copy())


def same_trace(left: Trace, right: Trace) -> bool:
    """Every field equal, NaN to NaN."""
    for name in Trace.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a.float().nan_to_num(9.0), b.float().nan_to_num(9.0)):
                return False
        elif a is not b and a != b:
            return False
    return True
