"""Records traces while serving: the target's hidden states by slot, notes of the rounds, and segments for a sink.

A segment goes to the sink when its request ends and whenever it has grown by `segment_tokens`. A later segment repeats
the last `overlap_tokens` positions before it, as context. Each generated position is new in exactly one segment, and
each round is part of one. The states of a trace are views of the slot, not copies, so a sink must copy what it needs
before it returns. Left out: what a trace holds (traces/record.py), and where it goes (serve/worker/trace_sinks.py).

Lifecycle: created, passed to an Engine (which attaches it), and called by that from then on.

    recorder = TraceRecorder(sink, hidden_size=target.hidden_size)
    engine = Engine(target, draft, options, observer=recorder)

Shapes: S slots, L capacity of a slot, F = 3H auxiliary features, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from aurora_lit.kernels import huge_pages
from aurora_lit.modules.sampling.distribution import is_greedy
from aurora_lit.request import Output, SamplingParams, Source
from aurora_lit.serve.engine.round_plan import DecodingRow
from aurora_lit.serve.engine.sequence import RunningSequence
from aurora_lit.traces.record import OVERLAP_TOKENS, SEGMENT_TOKENS, RoundNote, Trace, round_tensors


@dataclass(kw_only=True)
class _Segment:
    """The segment of one slot that is being recorded."""

    sequence: RunningSequence | None = None
    start: int = 0
    """First position that is in no earlier segment."""
    notes: list[RoundNote] = field(default_factory=list)


class TraceRecorder:
    """An observer of the engine that passes traces to `sink`, in the engine's thread: the sink must not block."""

    def __init__(
        self,
        sink: Callable[[Trace], None],
        *,
        hidden_size: int,
        segment_tokens: int = SEGMENT_TOKENS,
        overlap_tokens: int = OVERLAP_TOKENS,
        keeps_prompts: bool = False,
    ) -> None:
        """`segment_tokens`: new positions after which a segment goes to the sink before its request ends.

        `keeps_prompts`: traces have the last hidden states of whole prompts, which the engine computes for them then.
        """
        self._sink = sink
        self._hidden_size = hidden_size
        self._segment_tokens = segment_tokens
        self._overlap_tokens = overlap_tokens
        self.keeps_prompts = keeps_prompts
        """True if last hidden states of prompts are kept."""

    def attach(self, *, tokens_SL: torch.Tensor, aux_SLF: torch.Tensor | None) -> None:
        """Allocate memory for the engine's slots. Called once by the engine, with its committed tokens.

        `aux_SLF`: the auxiliary states that the drafter keeps; None: there is none, so that they are kept here.
        """
        num_slots, capacity = tokens_SL.shape
        self._tokens_SL = tokens_SL
        self._owns_aux = aux_SLF is None
        self._aux_SLF = aux_SLF if aux_SLF is not None else self._allocate(num_slots, capacity, 3, tokens_SL.device)
        self.last_SLH = self._allocate(num_slots, capacity, 1, tokens_SL.device)
        """Last hidden states by slot, bf16. Who writes them there need not call `on_forward` beside a drafter."""
        self._segments = [_Segment() for _ in range(num_slots)]

    def on_forward(self, *, slot: int, start: int, aux_TF: torch.Tensor, last_TH: torch.Tensor) -> None:
        """Keep what the target computed of positions start, start + 1, … of a slot, which are committed."""
        end = start + len(last_TH)
        self.last_SLH[slot, start:end] = last_TH
        if self._owns_aux:
            self._aux_SLF[slot, start:end] = aux_TF

    @property
    def prompt_states(self) -> list[torch.Tensor]:
        """What is kept here [S, L, …] of prompts too, for a prefix that is copied to a slot."""
        return [*([self._aux_SLF] if self._owns_aux else []), *([self.last_SLH] if self.keeps_prompts else [])]

    def on_round(self, row: DecodingRow, output: Output, *, version: int) -> None:
        """Add a committed round of one sequence. The segment goes to the sink if it is full.

        `version`: number of the draft's version.
        """
        sequence = row.sequence
        segment = self._segments[sequence.slot]
        if segment.sequence is not sequence:
            segment = self._segments[sequence.slot] = _Segment(sequence=sequence, start=sequence.prompt_length)
        segment.notes.append(_note_of(row, output, version=version))
        if sequence.length - 1 - segment.start >= self._segment_tokens:
            self._emit(segment, sequence)

    def on_finish(self, sequence: RunningSequence) -> None:
        """Pass on the last segment of a request."""
        segment = self._segments[sequence.slot]
        self._segments[sequence.slot] = _Segment()
        # The target has not computed the last token, so an output of one token leaves no trace.
        if segment.sequence is sequence and sequence.length - 1 > segment.start:
            self._emit(segment, sequence)

    def _emit(self, segment: _Segment, sequence: RunningSequence) -> None:
        slot, end = sequence.slot, sequence.length - 1
        first = 0 if segment.start == sequence.prompt_length else max(0, segment.start - self._overlap_tokens)
        if not self.keeps_prompts:  # what is there may be another request's
            self.last_SLH[slot, first : max(first, sequence.prompt_length - 1)] = 0
        self._sink(
            Trace(
                request_id=sequence.request.request_id,
                domain=sequence.request.domain,
                served_domain=sequence.domain,
                client=sequence.request.client.source,
                verify=verify_mode(sequence.params),
                temperature=sequence.params.temperature,
                first_position=first,
                prompt_length=sequence.prompt_length,
                answer_start=segment.start - first,
                token_ids_T=self._tokens_SL[slot, first:end].to("cpu", torch.int32),
                aux_T3H=self._aux_SLF[slot, first:end].to("cpu", torch.bfloat16),
                last_TH=self.last_SLH[slot, first:end].cpu(),
                **round_tensors(segment.notes, first=first),
            )
        )
        segment.start, segment.notes = end, []

    def _allocate(self, num_slots: int, capacity: int, width: int, device: torch.device) -> torch.Tensor:
        """States by slot and position, `width` times the hidden size each."""
        return huge_pages.growing((num_slots, capacity, width * self._hidden_size), torch.bfloat16, device=device)


def verify_mode(params: SamplingParams) -> str:
    """How a request's proposals are verified, as a trace records it (traces.record.VERIFY_MODES)."""
    return "greedy" if is_greedy(params) else "sampled"


def _note_of(row: DecodingRow, output: Output, *, version: int) -> RoundNote:
    """A round as a trace has it.

    Of a tree, only the chain of first choices is recorded, as if it alone had been proposed: a draft learns from its
    first choices and is evaluated by them. So of a weighed chain those are recorded, proposed or not, of which the
    answer tells whether they were right: a draft that is not sure proposes less, and would seem to be right.
    """
    sequence, proposal = row.sequence, row.proposal
    weighed, committed = (proposal if row.uncut is None else row.uncut.proposal).weighed, len(output.token_ids)
    if weighed is not None and output.tested_choices is not None:
        tested, right = output.tested_choices
        return RoundNote(
            root=sequence.length - committed - 1,
            version=version if tested else -1,
            source=Source.DRAFT if tested else Source.TARGET,
            proposals=weighed.tokens[:tested],
            accepted=right,
        )
    columns = proposal.first_choices
    accepted = output.chain_accepted
    # Without a token after the accepted ones the request ended there, and the other proposals were not verified.
    count = len(columns) if committed > accepted else accepted
    source = proposal.source if count else Source.TARGET
    if source > Source.DRAFT:
        count = min(count, accepted + 1)  # nothing is learned from copied tokens after a rejected one
    if source is Source.GRAMMAR:
        source = Source.NGRAM  # as a trace records it
    return RoundNote(
        root=sequence.length - committed - 1,
        version=version if source is Source.DRAFT else -1,
        source=source,
        proposals=[proposal.tokens[column - 1] for column in columns[:count]],
        accepted=accepted,
    )
