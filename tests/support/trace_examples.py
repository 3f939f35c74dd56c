"""Made-up traces for tests: consistent, and with values from which the position can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aurora_lit.request import Source
from aurora_lit.traces.log import TraceLogWriter
from aurora_lit.traces.record import Trace

HIDDEN = 4


def trace_with_rounds(rounds: Sequence[tuple[int, int, int]], *, length: int = 12, **changes: Any) -> Trace:
    """A trace with the rounds (root, num_proposed, num_accepted).

    Accepted proposals are the tokens that follow the root, others are larger by 50. Rounds with one proposal come from
    n-gram lookup, those with more from the draft.
    """
    widest = max([proposed for _, proposed, _ in rounds], default=0)
    token_ids_T = torch.arange(100, 100 + length, dtype=torch.int32)
    proposal_RK = torch.full((len(rounds), widest), -1, dtype=torch.int32)
    for r, (root, proposed, accepted) in enumerate(rounds):
        for i in range(proposed):
            proposal_RK[r, i] = 100 + root + 1 + i + (0 if i < accepted else 50)
    sources = [Source.TARGET if n == 0 else Source.NGRAM if n == 1 else Source.DRAFT for _, n, _ in rounds]
    fields: dict[str, Any] = {
        "request_id": "r-1",
        "domain": "code",
        "verify": "sampled",
        "temperature": 0.7,
        "first_position": 3,
        "prompt_length": 5,
        "answer_start": 2,
        "token_ids_T": token_ids_T,
        "aux_T3H": torch.arange(length * 3 * HIDDEN).view(length, 3 * HIDDEN).bfloat16(),
        "last_TH": -torch.arange(length * HIDDEN).view(length, HIDDEN).bfloat16(),
        "round_root_R": torch.tensor([root for root, _, _ in rounds], dtype=torch.int32),
        "round_version_R": torch.tensor([7 if n > 1 else -1 for _, n, _ in rounds], dtype=torch.int32),
        "num_proposed_R": torch.tensor([n for _, n, _ in rounds], dtype=torch.int32),
        "num_accepted_R": torch.tensor([a for _, _, a in rounds], dtype=torch.int32),
        "source_R": torch.tensor(sources, dtype=torch.uint8),
        "proposal_RK": proposal_RK,
    }
    return Trace(**{**fields, **changes})


def numbered_trace(length: int, *, first: int = 0, domain: str = "chat", answer_start: int | None = None) -> Trace:
    """A trace without rounds; token ids and states are the positions from `first` on, exact also in bf16."""
    position_T = torch.arange(first, first + length)
    return Trace(
        token_ids_T=position_T.int(),
        aux_T3H=position_T[:, None].expand(-1, 6).bfloat16(),
        last_TH=-position_T[:, None].expand(-1, 2).bfloat16(),
        lse_T=position_T / 3,
        domain=domain,
        answer_start=length if answer_start is None else answer_start,
    )


def write_log(folder: Path, traces: Sequence[Trace], *, kind: str = "text", shard_positions: int = 10_000) -> None:
    """Append traces to a log, the last shard included."""
    writer = TraceLogWriter(folder, kind=kind, shard_positions=shard_positions)
    for trace in traces:
        writer.append(trace)
    writer.close()


def keep_in(traces: list[Trace]) -> Callable[[Trace], None]:
    """A sink that appends copies, since the recorder reuses the memory of what it hands over."""
    return lambda trace: traces.append(trace.copy())


def same_trace(left: Trace, right: Trace) -> bool:
    """True if all fields are equal; NaN equals NaN."""
    for name in Trace.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a.float().nan_to_num(9.0), b.float().nan_to_num(9.0)):
                return False
        elif a is not b and a != b:
            return False
    return True
