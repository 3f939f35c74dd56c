"""Turns the steps of a vLLM engine into traces: which rows were kept, what was proposed, how much was accepted.

A step computes rows for many requests: chunks of prompts, and for requests that generate, the last token and its
proposals. Of a request with n rows, k of them proposals, a of these accepted, the first n - k + a rows stay. Chunks
follow each other; after a prefix hit they begin at a position above 0; a preempted request begins anew, and what is
held already is skipped. A request's last tokens may have been computed although it ended before: they are cut off.

Knows nothing of vLLM's objects (runners.py reads them), and copies nothing from a GPU (device_transfer.py).

Shapes: T positions, Q rows of a step, H hidden, R rounds, K proposals, N rejected positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aurora_lit.drafts.live_watch import TrafficKind
from aurora_lit.request import MAX_DOMAIN_CHARACTERS, Source
from aurora_lit.traces.record import OVERLAP_TOKENS, SEGMENT_TOKENS, RoundNote, Trace, round_tensors

PROMPT_TOKENS = 1024
"""Of a longer prompt, only the last positions are recorded."""
DOMAIN_ARGUMENT, STORE_ARGUMENT = "aurora_lit_domain", "aurora_lit_store"
"""Names of vLLM's extra arguments (`vllm_xargs`) that the middleware sets; store 0: the client opted out."""


@dataclass(frozen=True, kw_only=True)
class RequestInfo:
    """A request that has begun."""

    request_id: str
    prompt_tokens: int
    max_tokens: int | None
    """None: no limit."""
    stop_ids: frozenset[int]
    """Tokens that end it, end-of-text included."""
    temperature: float
    domain: str = ""
    """The client's label."""
    has_grammar: bool = False
    """True if structured output is asked for."""
    has_options: bool = False
    """True if penalties, a bias, top-k, top-p or min-p change the target's distribution."""
    recordable: bool = True
    """False if its client opted out, or if it is not plain text of the target."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the engine, on the CPU. The wanted rows of all requests are end to end."""

    request_ids: Sequence[str]
    num_rows: Sequence[int]
    """Wanted rows of each request: its last ones of this step."""
    num_drafted: Sequence[int]
    """Proposals among them."""
    num_sampled: Sequence[int]
    """Accepted proposals and the target's own token; 0 while a prompt is unfinished."""
    token_ids_Q: Tensor
    position_Q: Tensor
    aux_Q3H: Tensor
    last_QH: Tensor
    version: int
    """The draft that proposed at the end of this step, for the next one; -1 if none did."""


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """What one request got from a step with proposals."""

    request_id: str
    traffic: TrafficKind
    proposed: int
    accepted: int
    version: int


@dataclass(kw_only=True)
class _Recording:
    """A request that generates."""

    info: RequestInfo
    recorded: bool
    """False: it is only counted."""
    next_position: int
    """Where its prompt continues."""
    reserved_bytes: int = 0
    first: int = -1
    """Position of the first row held; -1 before any."""
    start: int = 0
    """First position that no earlier segment contains."""
    length: int = 0
    """Position after the last row held."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Tokens [T], auxiliary states [T, 3H] and last states [T, H]."""
    rounds: list[RoundNote] = field(default_factory=list)
    version: int = -1
    """Of the draft that made the proposals of its next step."""


class Capture:
    """The running requests of one engine; traces go to `sink`, which must not block.

    capture.begin(info, position=0)         # at its first step; capture.resume after a preemption
    capture.wanted_rows(request_id, 5)      # before its rows are copied
    capture.add(step)                       # its rows; gives what was accepted
    capture.finish([request_id])
    """

    def __init__(
        self,
        sink: Callable[[Trace], object],
        *,
        bytes_per_token: int,
        limit_bytes: int,
        segment_tokens: int = SEGMENT_TOKENS,
        overlap_tokens: int = OVERLAP_TOKENS,
        is_behind: Callable[[], bool] = lambda: False,
    ) -> None:
        """limit_bytes: most memory that running requests may hold; those that do not fit are only counted.

        is_behind: True if so many traces are unread that a request which begins now is only counted, too.
        """
        self._sink, self._bytes_per_token, self._limit_bytes = sink, bytes_per_token, limit_bytes
        self._is_behind = is_behind
        self._segment_tokens, self._overlap_tokens = segment_tokens, overlap_tokens
        self._recordings: dict[str, _Recording] = {}
        self._reserved_bytes = 0
        self.on_finish: Callable[[str, TrafficKind], None] = lambda request_id, traffic: None
        """Called when a request has ended, by itself or not."""
        self.num_prompt_tokens = self.num_cached_tokens = 0
        """Of the requests that have begun; the latter are those found in the prefix cache."""
        self.num_opted_out = 0
        self.num_unrecorded = 0
        """Requests not recorded because the running ones hold all the memory, or too many traces wait."""

    @property
    def num_running(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._recordings)

    def begin(self, info: RequestInfo, *, position: int) -> None:
        """A request's first step begins at `position`, which is above 0 if its prefix was cached.

        The V2 runner announces a request again when it goes on after a preemption.
        """
        if info.request_id in self._recordings:
            self.resume(info.request_id, position=position)
            return
        self.num_prompt_tokens += info.prompt_tokens
        self.num_cached_tokens += position
        longest = min(info.max_tokens or self._segment_tokens, self._segment_tokens) + self._overlap_tokens
        needed = (min(info.prompt_tokens - position, PROMPT_TOKENS) + longest) * self._bytes_per_token
        fits = self._reserved_bytes + needed <= self._limit_bytes and not self._is_behind()
        self.num_opted_out += not info.recordable
        self.num_unrecorded += info.recordable and not fits
        recorded = info.recordable and fits
        self._recordings[info.request_id] = _Recording(
            info=info, recorded=recorded, next_position=position, reserved_bytes=needed if recorded else 0
        )
        self._reserved_bytes += needed if recorded else 0

    def resume(self, request_id: str, *, position: int) -> None:
        """A preempted request is computed again from `position` on."""
        if recording := self._recordings.get(request_id):
            recording.next_position = position

    def wanted_rows(self, request_id: str, num_rows: int) -> int:
        """How many of the request's last rows in this step are worth copying."""
        recording = self._recordings.get(request_id)
        if recording is None or not recording.recorded:
            return 0
        position = recording.next_position
        recording.next_position += num_rows
        return max(0, min(num_rows, position + num_rows - (recording.info.prompt_tokens - PROMPT_TOKENS)))

    def add(self, step: Step) -> list[RoundOutcome]:
        """Add a step's rows to its requests. Returns the rounds with proposals of the draft."""
        outcomes = []
        ends = list(itertools.accumulate(step.num_rows))
        for index, (request_id, end) in enumerate(zip(step.request_ids, ends, strict=True)):
            recording = self._recordings.get(request_id)
            if recording is None:  # it began before capture did
                continue
            drafted, sampled = step.num_drafted[index], step.num_sampled[index]
            accepted = min(drafted, max(0, sampled - 1))
            if drafted and sampled and recording.version >= 0:
                outcomes.append(
                    RoundOutcome(
                        request_id=request_id,
                        traffic=_kind(recording.info),
                        proposed=drafted,
                        accepted=accepted,
                        version=recording.version,
                    )
                )
            if step.num_rows[index]:
                self._add_rows(
                    recording, step, slice(end - step.num_rows[index], end), drafted, accepted, bool(sampled)
                )
            recording.version = step.version
        return outcomes

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests have ended, by themselves or not: their last segments go to the sink."""
        for request_id in request_ids:
            recording = self._recordings.pop(request_id, None)
            if recording is not None:
                self._reserved_bytes -= recording.reserved_bytes
                self._emit(recording, ended=True)
                self.on_finish(request_id, _kind(recording.info))

    def forget(self) -> None:
        """Drop all running requests: no trace of them is made, and their further rounds are not counted."""
        self._recordings.clear()
        self._reserved_bytes = 0

    def _add_rows(
        self, recording: _Recording, step: Step, rows: slice, drafted: int, accepted: int, sampled: bool
    ) -> None:
        position, count = int(step.position_Q[rows.start]), rows.stop - rows.start
        root = position + count - drafted - 1
        if recording.first < 0 or position > recording.length:  # the first rows, or a gap: nothing before is of use
            recording.rows, recording.rounds = [], []
            recording.first = recording.length = position
            recording.start = max(position, recording.info.prompt_tokens)
        low, high = rows.start + recording.length - position, rows.stop - drafted + accepted
        if high > low:
            # Copies, since a view would keep the memory of the whole step.
            recording.rows.append(
                (step.token_ids_Q[low:high].clone(), step.aux_Q3H[low:high].clone(), step.last_QH[low:high].clone())
            )
            recording.length += high - low
        if not sampled or root < recording.info.prompt_tokens:
            return
        proposals = step.token_ids_Q[rows.stop - drafted : rows.stop].tolist()
        if recording.version < 0:
            proposals, accepted = [], 0
        recording.rounds.append(_note(root, proposals, accepted, version=recording.version))
        if recording.length - recording.start >= self._segment_tokens:
            self._emit(recording, ended=False)

    def _emit(self, recording: _Recording, *, ended: bool) -> None:
        if recording.length <= recording.start or not recording.rows:
            return
        tokens_T, aux_T3H, last_TH = (torch.cat(parts) for parts in zip(*recording.rows, strict=True))
        first, end, info = recording.first, recording.length, recording.info
        if info.max_tokens is not None:  # the last token is not computed, or its row is of no use
            end = min(end, info.prompt_tokens + info.max_tokens - 1)
        stops = [i for i in range(recording.start, end) if int(tokens_T[i - first]) in info.stop_ids]
        end = min([end, *stops])
        if end > recording.start:
            rounds = [_cut(each, end) if ended or end < recording.length else each for each in recording.rounds]
            rounds = [each for each in rounds if first <= each.root < end]
            self._sink(
                Trace(
                    request_id=info.request_id,
                    domain=info.domain,
                    served_domain=info.domain,
                    verify="greedy" if info.temperature == 0 else "sampled",
                    temperature=info.temperature,
                    first_position=first,
                    prompt_length=info.prompt_tokens,
                    answer_start=recording.start - first,
                    token_ids_T=tokens_T[: end - first].int(),
                    aux_T3H=aux_T3H[: end - first].bfloat16(),
                    last_TH=last_TH[: end - first].bfloat16(),
                    **round_tensors(rounds, first=first),
                )
            )
        kept = min(self._overlap_tokens, recording.length - first)
        # Copies, since a view would keep the whole segment.
        rows = slice(len(tokens_T) - kept, None)
        recording.rows = [] if ended else [(tokens_T[rows].clone(), aux_T3H[rows].clone(), last_TH[rows].clone())]
        recording.first, recording.start, recording.rounds = recording.length - kept, recording.length, []


def _kind(info: RequestInfo) -> TrafficKind:
    return TrafficKind(
        domain=info.domain,
        temperature=round(info.temperature, 1),
        has_grammar=info.has_grammar,
        has_options=info.has_options,
    )


def _cut(note: RoundNote, end: int) -> RoundNote:
    """The round without proposals for positions after `end`, which is that of the request's last token."""
    proposed = min(len(note.proposals), max(0, end - note.root))
    return _note(note.root, note.proposals[:proposed], min(note.accepted, proposed), version=note.version)


def _note(root: int, proposals: list[int], accepted: int, *, version: int) -> RoundNote:
    return RoundNote(
        root=root,
        version=version if proposals else -1,
        source=Source.DRAFT if proposals else Source.TARGET,
        proposals=proposals,
        accepted=accepted,
    )


def label(extra_args: dict[str, object] | None) -> tuple[str, bool]:
    """The domain label of a request's extra arguments, and whether it may be recorded."""
    extra = extra_args or {}
    domain = str(extra.get(DOMAIN_ARGUMENT, ""))
    return (domain if len(domain) <= MAX_DOMAIN_CHARACTERS else ""), extra.get(STORE_ARGUMENT, 1) != 0
