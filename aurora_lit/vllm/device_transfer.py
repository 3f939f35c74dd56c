"""Copies a step's wanted rows to the CPU without making the engine wait.

Before the step samples, its rows are copied on the device: sampling and proposing may overwrite the runner's tensors,
since with CUDA graphs target and draft share memory. On a GPU the copies then go to pinned memory on a stream of their
own, and are looked at a step later, without waiting. On the CPU there is no stream, and they are there at
once.

    batch = own_rows(batch, capture.wanted_rows)            # before `sample_tokens`
    pending = copy_step(batch, num_sampled_B=counts_B, version=3, stream=stream)
    if pending.is_ready: capture.add(pending.step())
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aurora_lit.vllm.capture import Step
from aurora_lit.vllm.runners import Batch


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """A step whose rows are being copied."""

    batch: Batch
    version: int
    sources: Sequence[Tensor]
    """What is being copied, kept until that is done."""
    copies: Sequence[Tensor]
    """On the CPU."""
    event: Any
    """When the copies are done; None: they are."""

    @property
    def is_ready(self) -> bool:
        """True when the copies are done."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        """Wait for the copies."""
        if self.event is not None:
            self.event.synchronize()

    def step(self) -> Step:
        """The step; only when it is ready."""
        token_ids_Q, position_Q, aux_Q3H, last_QH, num_sampled_B = self.copies
        sampled = zip(num_sampled_B.tolist(), self.batch.is_unfinished, strict=True)
        return Step(
            request_ids=self.batch.request_ids,
            num_rows=self.batch.num_rows,
            num_drafted=self.batch.num_drafted,
            num_sampled=[0 if unfinished else count for count, unfinished in sampled],
            token_ids_Q=token_ids_Q,
            position_Q=position_Q,
            aux_Q3H=aux_Q3H,
            last_QH=last_QH,
            version=self.version,
        )


def own_rows(batch: Batch, wanted_rows: Callable[[str, int], int]) -> Batch:
    """The batch with only its wanted rows, in tensors of our own.

    wanted_rows(request_id, num_rows): how many of a request's last rows are worth copying.
    """
    num_wanted = [wanted_rows(*each) for each in zip(batch.request_ids, batch.num_rows, strict=True)]
    spans = wanted_spans(batch, num_wanted)
    return replace(
        batch,
        row_starts=list(itertools.accumulate(num_wanted[:-1], initial=0)),
        num_rows=num_wanted,
        token_ids_Q=_rows([batch.token_ids_Q], spans),
        position_Q=_rows([batch.position_Q], spans),
        aux_QH=[_rows(batch.aux_QH, spans)],
        last_QH=_rows([batch.last_QH], spans),
    )


def copy_step(batch: Batch, *, num_sampled_B: Tensor, version: int, stream: Any) -> PendingStep:
    """Begin to copy a batch of own rows.

    stream: the stream of the copies; None on the CPU.
    """
    sources = [batch.token_ids_Q, batch.position_Q, *batch.aux_QH, batch.last_QH, num_sampled_B]
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        copies = sources if stream is None else [_to_pinned(tensor) for tensor in sources]
        event = None if stream is None else stream.record_event()
    return PendingStep(
        batch=batch, version=version if batch.drafts_next else -1, sources=sources, copies=copies, event=event
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
    """The rows of all spans, the tensors' columns side by side; always a copy."""
    if len(tensors_Q) == 1:
        return torch.cat([tensors_Q[0][start:end] for start, end in spans] or [tensors_Q[0][:0]])
    parts = [torch.cat([tensor[start:end] for tensor in tensors_Q], -1) for start, end in spans]
    if len(parts) == 1:  # as a rule
        return parts[0]
    return torch.cat(parts or [torch.cat([tensor[:0] for tensor in tensors_Q], -1)])


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
