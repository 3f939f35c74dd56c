"""Copies a step's wanted rows to the CPU without making the engine wait.

On a GPU the rows go to pinned memory on a stream of their own, which begins when the step's work is done; they are
looked at a step later. The engine's next step must not overwrite what is still being copied, so its stream waits for
the copies (the CPU does not). On the CPU there is no stream, and the rows are there at once.

    pending = copy_step(batch, capture.wanted_rows, num_sampled_B=counts_B, version=3, stream=stream)
    pending.hold_back_next_step()           # when the next step begins
    if pending.is_ready: capture.add(pending.step())
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aurora_lit.vllm.capture import Step
from aurora_lit.vllm.runners import Batch


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """A step whose rows are being copied."""

    batch: Batch
    """Also keeps the tensors on the GPU until the copies are done."""
    num_wanted: list[int]
    version: int
    num_sampled_B: Tensor
    rows: dict[str, Tensor]
    """Fields of Step."""
    event: Any
    """When the copies are done; None: they are."""
    sources: Sequence[Tensor] = ()
    """What is being copied on the GPU."""

    @property
    def is_ready(self) -> bool:
        """True when the copies are done."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        """Wait for the copies."""
        if self.event is not None:
            self.event.synchronize()

    def hold_back_next_step(self) -> None:
        """What the engine's stream computes from now on begins after the copies."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def step(self) -> Step:
        """The step; only when it is ready."""
        rows: dict[str, Any] = dict(self.rows)
        sampled = zip(self.num_sampled_B.tolist(), self.batch.is_unfinished, strict=True)
        return Step(
            request_ids=self.batch.request_ids,
            num_rows=self.num_wanted,
            num_drafted=self.batch.num_drafted,
            num_sampled=[0 if unfinished else count for count, unfinished in sampled],
            version=self.version,
            **rows,
        )


def copy_step(
    batch: Batch,
    wanted_rows: Callable[[str, int], int],
    *,
    num_sampled_B: Tensor,
    version: int,
    stream: Any,
) -> PendingStep:
    """Begin to copy; `wanted_rows(request_id, num_rows)`: how many of a request's last rows are worth it.

    stream: the stream of the copies; None on the CPU.
    """
    num_wanted = [wanted_rows(*each) for each in zip(batch.request_ids, batch.num_rows, strict=True)]
    spans = wanted_spans(batch, num_wanted)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        sources = [
            _rows([batch.token_ids_Q], spans),
            _rows([batch.position_Q], spans),
            _rows(batch.aux_QH, spans),
            _rows([batch.last_QH], spans),
            num_sampled_B,
        ]
        copies = sources if stream is None else [_to_pinned(tensor) for tensor in sources]
        event = None if stream is None else stream.record_event()
    names = ("token_ids_Q", "position_Q", "aux_Q3H", "last_QH")
    return PendingStep(
        batch=batch,
        num_wanted=num_wanted,
        version=version if batch.drafts_next else -1,
        num_sampled_B=copies[4],
        rows=dict(zip(names, copies, strict=False)),
        event=event,
        sources=sources,
    )


def wanted_spans(batch: Batch, num_wanted: Sequence[int]) -> list[tuple[int, int]]:
    """The wanted rows as ranges of the batch's rows, those of neighbouring requests as one."""
    spans: list[tuple[int, int]] = []
    for start, count, wanted in zip(batch.row_starts, batch.num_rows, num_wanted, strict=True):
        end = start + count
        if wanted and spans and spans[-1][1] == end - wanted:
            spans[-1] = (spans[-1][0], end)
        elif wanted:
            spans.append((end - wanted, end))
    return spans


def _rows(tensors_Q: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
    """The rows of all spans, the tensors' columns side by side."""
    if len(tensors_Q) == 1:
        return torch.cat([tensors_Q[0][start:end] for start, end in spans] or [tensors_Q[0][:0]])
    parts = [torch.cat([tensor[start:end] for tensor in tensors_Q], -1) for start, end in spans]
    return torch.cat(parts or [torch.cat([tensor[:0] for tensor in tensors_Q], -1)])


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
