"""Recording traces while serving: the target's hidden states by slot, notes of the rounds, segments to a sink.

A segment is handed over when a request ends and whenever it has grown by `segment_tokens`; a later one repeats the last
`overlap_tokens` positions before it, as context. Each generated position is new in exactly one segment, and each round
lies in one. Its states are those in the slot, not copied, so a sink takes what it wants before it returns. What is left
out: what a trace holds (trace.py), where it goes (serve/worker/trace_sinks.py).

Lifecycle: made, given to an Engine (which attaches it), and from then on called by that.

    recorder = TraceRecorder(sink, hidden_size=target.hidden_size)
    engine = Engine(target, draft, ..., observer=recorder)

Shapes: S slots, L capacity, F = 3H auxiliary features, B rows, T positions, H hidden, R rounds, K proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aurora_lit.drafts.versions import version_number
from aurora_lit.modules.sampling.distribution import is_greedy
from aurora_lit.request import SamplingParams
from aurora_lit.serve.sequences.observer import RoundNote
from aurora_lit.serve.sequences.sequence import RunningSequence
from aurora_lit.traces.record import SOURCE_DRAFT, Trace


@dataclass(kw_only=True)
class _Segment:
    """What has been noted of the segment in hand of one slot."""

    row: RunningSequence | None = None
    start: int = 0
    """First position that no earlier segment taught."""
    notes: list[RoundNote] = field(default_factory=list)
    rejected: list[torch.Tensor] = field(default_factory=list)


class TraceRecorder:
    """An observer of the engine that hands traces to `sink`, in the engine's thread: the sink must not wait.

    A trace is the sink's until it returns: the slot will hold something else soon.
    """

    def __init__(
        self,
        sink: Callable[[Trace], None],
        *,
        hidden_size: int,
        segment_tokens: int = 512,
        overlap_tokens: int = 64,
    ) -> None:
        """`segment_tokens`: new positions at which a segment is handed over before the request's end."""
        self._sink = sink
        self._hidden_size = hidden_size
        self._segment_tokens = segment_tokens
        self._overlap_tokens = overlap_tokens

    def attach(self, *, tokens_SL: torch.Tensor, aux_SLF: torch.Tensor | None) -> None:
        """Make room for the engine's slots."""
        num_slots, capacity = tokens_SL.shape
        self._tokens_SL = tokens_SL
        self._owns_aux = aux_SLF is None
        self._aux_SLF = aux_SLF if aux_SLF is not None else self._table(num_slots, capacity, 3, tokens_SL.device)
        self._last_SLH = self._table(num_slots, capacity, 1, tokens_SL.device)
        self._segments = [_Segment() for _ in range(num_slots)]

    def on_pass(
        self, *, slots_B: torch.Tensor, starts_B: torch.Tensor, aux_BT3H: torch.Tensor, last_BTH: torch.Tensor
    ) -> None:
        """Keep what the target computed; positions rejected later are simply kept again."""
        index = (slots_B[:, None], starts_B[:, None] + torch.arange(last_BTH.shape[1], device=starts_B.device))
        self._last_SLH[index] = last_BTH.to(torch.bfloat16)
        if self._owns_aux:
            self._aux_SLF[index] = aux_BT3H.to(torch.bfloat16)

    def on_copy(self, *, source: int, slot: int, length: int) -> None:
        """Copy the states; where the source's were not kept, nor will the slot's be asked for."""
        self._last_SLH[slot, :length] = self._last_SLH[source, :length]
        if self._owns_aux:
            self._aux_SLF[slot, :length] = self._aux_SLF[source, :length]

    def on_commit(self, row: RunningSequence, note: RoundNote, last_TH: torch.Tensor) -> None:
        """Note a round and the states behind its first rejection; hand the segment over when it is full."""
        segment = self._segments[row.slot]
        if segment.row is not row:
            segment = self._segments[row.slot] = _Segment(row=row, start=row.prompt_length)
        segment.notes.append(note)
        if note.accepted + 1 < len(note.proposals):
            rejected_NH = last_TH[note.accepted + 1 : len(note.proposals)]
            segment.rejected.append(rejected_NH.to(torch.bfloat16, copy=True))  # a view would keep the whole batch's
        if row.length - 1 - segment.start >= self._segment_tokens:
            self._hand_over(segment, row)

    def on_finish(self, row: RunningSequence) -> None:
        """Hand over what is left of a request."""
        segment = self._segments[row.slot]
        self._segments[row.slot] = _Segment()
        # The target has not run the last token: an answer of one leaves nothing of itself.
        if segment.row is row and row.length - 1 > segment.start:
            self._hand_over(segment, row)

    def _hand_over(self, segment: _Segment, row: RunningSequence) -> None:
        end = row.length - 1
        first = 0 if segment.start == row.prompt_length else max(0, segment.start - self._overlap_tokens)
        self._sink(
            Trace(
                request_id=row.request.request_id,
                domain=row.request.domain,
                client=row.request.client,
                verify=verify_mode(row.params),
                temperature=row.params.temperature,
                first_position=first,
                answer_start=segment.start - first,
                token_ids_T=self._tokens_SL[row.slot, first:end].to("cpu", torch.int32),
                aux_T3H=self._aux_SLF[row.slot, first:end].to("cpu", torch.bfloat16),
                last_TH=self._last_SLH[row.slot, first:end].cpu(),
                rejected_last_NH=self._rejected(segment.rejected),
                **_round_tensors(segment.notes, first=first),
            )
        )
        segment.start, segment.notes, segment.rejected = end, [], []

    def _rejected(self, rows: list[torch.Tensor]) -> torch.Tensor:
        if not rows:
            return torch.zeros(0, self._hidden_size, dtype=torch.bfloat16)
        return torch.cat(rows).cpu()

    def _table(self, num_slots: int, capacity: int, width: int, device: torch.device) -> torch.Tensor:
        table = torch.empty(num_slots, capacity, width * self._hidden_size, dtype=torch.bfloat16, device=device)
        return table.zero_()  # not torch.zeros, whose pages would be a round's to make


def verify_mode(params: SamplingParams) -> str:
    """How a request's proposals are verified, as a trace says it."""
    if is_greedy(params):
        return "greedy"
    return "free" if params.seed is None else "seeded"


def _round_tensors(notes: Sequence[RoundNote], *, first: int) -> dict[str, torch.Tensor]:
    count, widest = len(notes), max((len(note.proposals) for note in notes), default=0)
    padding, unknown = [-1] * widest, [float("nan")] * widest
    versions = {note.version: version_number(note.version) for note in notes}
    columns: dict[str, tuple[list[Any], type[np.generic]]] = {
        "round_root_R": ([note.root - first for note in notes], np.int32),
        "round_version_R": (
            [versions[note.version] if note.source == SOURCE_DRAFT else -1 for note in notes],
            np.int32,
        ),
        "num_proposed_R": ([len(note.proposals) for note in notes], np.int32),
        "num_accepted_R": ([note.accepted for note in notes], np.int32),
        "source_R": ([note.source for note in notes], np.uint8),
        "explored_R": ([note.explored for note in notes], np.bool_),
        "draft_temperature_R": ([note.draft_temperature for note in notes], np.float32),
        "proposal_RK": ([(note.proposals + padding)[:widest] for note in notes], np.int32),
        "behaviour_logprob_RK": ([((note.logprobs or []) + unknown)[:widest] for note in notes], np.float32),
    }
    tensors = {}
    for name, (values, kind) in columns.items():
        array = np.array(values, dtype=kind)  # a fraction of what torch.tensor takes for lists
        tensors[name] = torch.from_numpy(array.reshape(count, widest) if name.endswith("_RK") else array)
    return tensors
