"""How many tokens a live server would have copied at every place of a recorded answer.

An answer does not depend on what is proposed. So at every root the tokens so far are known, and with them the tree of
copies that a server would have looked up, from earlier in the request and from the answers of earlier traces; its path
that equals the recorded tokens would have been accepted. An answer is remembered once its last segment was scored, so
it never helps itself. In three things this differs from a server:

- How probable copies of a kind are is learned from the rounds of a server that proposes copies alone, a segment at a
  time. So trees depend neither on the draft nor on the number of processes, and all arms of a replay share them.
- All nodes with at least `least` survival are proposed, whatever they cost. A server looks down to a fifth of that
  (serve/speculation/weigh.py), and proposes what repays its cost.
- Nothing is known of places in a text that an answer repeats (kernels/suffix_index.py), nor of its prediction.

Traces hold neither a request's last token nor its `cache_salt`: the former is not remembered, and requests that differ
in the latter share a memory here. A segment with fewer new tokens than `SEGMENT_TOKENS` is taken as a request's last
one. Needs kernels. Leaves out the draft's part (learn/offline/scoring.py) and the index (kernels/suffix_index.py).

Shapes: T positions.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from aurora_lit.config import AuroraConfig, copied_tokens, resolved_memory
from aurora_lit.kernels import native
from aurora_lit.kernels.copy_rates import CopyReliability
from aurora_lit.kernels.suffix_index import DOMAIN_BITS, Copies, LookUp, SuffixMemory, look_up
from aurora_lit.learn.data.trace_parts import first_trained_position
from aurora_lit.modules.domains.centroids import client_label
from aurora_lit.traces.record import SEGMENT_TOKENS, Trace

LEAST_SURVIVAL = 0.25
"""Of a copied node that is proposed, if nothing else is said."""
_MAX_OPEN_REQUESTS = 256
"""Requests whose next segment is waited for; then the one that waits longest counts as ended."""


class CopiedTokens(NamedTuple):
    """What is copied along a segment, by root."""

    accepted_T: list[int]
    """How many copied tokens would be accepted."""
    proposed_T: list[int]
    """How many would be proposed, all branches together."""


@dataclass(kw_only=True)
class _OpenRequest:
    """A request of which some segments have come."""

    tokens: list[int]
    """All that are known without a gap."""
    first: int
    """Position of the first of them; 0 unless a segment was lost."""
    answer: int
    """Position of the answer's first token, as far as known."""
    root: int
    """Position of the first root of the next segment."""
    part: int
    """What of the memory it reads and writes."""


class NgramPaths:
    """Copies along recorded answers, and the memory of those that ended.

    >>> paths = NgramPaths(most=15)
    >>> found = paths.copied(trace)             # before the memory knows the trace
    >>> paths.remember(trace)                   # after it was scored
    >>> paths.along(traces)                     # both, for each trace in turn
    >>> paths.peek(traces)                      # the same without learning anything from these traces
    """

    def __init__(
        self,
        *,
        most: int,
        segment_tokens: int = SEGMENT_TOKENS,
        least: float = LEAST_SURVIVAL,
        own: bool = True,
        memory: SuffixMemory | None = None,
        by_client: bool = False,
    ) -> None:
        """`most`: tokens of a round's copies. `own`: copy from earlier in the request too. `memory` None: only so.

        segment_tokens: new tokens that each segment but a request's last one has at least. by_client: answers to one
        client are never proposed to others, and those of unknown clients not remembered.
        """
        self.most = most
        self._segment_tokens, self._least, self._own = segment_tokens, least, own
        self._memory, self._by_client = memory, by_client
        self.reliability = CopyReliability()
        self._open: OrderedDict[str, _OpenRequest] = OrderedDict()
        self._clients: dict[str, int] = {}
        self._domains: dict[str, int] = {}

    def along(self, traces: Sequence[Trace]) -> list[CopiedTokens]:
        """What is copied along each trace; each is remembered before the next one."""
        found = []
        for trace in traces:
            found.append(self.copied(trace))
            self.remember(trace)
        return found

    def peek(self, traces: Sequence[Trace]) -> list[CopiedTokens]:
        """What is copied along traces that leave nothing behind: their answers are not remembered."""
        other = copy.copy(self)
        other.reliability, other._open = copy.deepcopy(self.reliability), OrderedDict()
        return [other.copied(trace) for trace in traces]

    def copied(self, trace: Trace) -> CopiedTokens:
        """What is copied along a trace.

        0 before the first root, which may lie up to `most` positions in the segment before, and too small where the
        path may go on in the next segment: at the last `most` positions. Segments of one request must come in order.
        """
        request = self._continued(trace)
        T = len(trace.token_ids_T)
        offset = trace.first_position - request.first
        first = max(1, first_trained_position(trace) - self.most)
        copies = dict(
            zip(range(first, T), self._look_up(request, trace, range(offset + first, offset + T)), strict=True)
        )
        paths = {root: _path(each, request.tokens, offset + root) for root, each in copies.items()}
        self._learn_rates(request, trace, copies, paths)
        return CopiedTokens(
            accepted_T=[len(paths.get(root, ())) for root in range(T)],
            proposed_T=[len(copies[root].tokens) if root in copies else 0 for root in range(T)],
        )

    def remember(self, trace: Trace) -> None:
        """Remember the answer if the trace is its last segment; it must be the one `copied` was called with last."""
        if len(trace.token_ids_T) - trace.answer_start < self._segment_tokens:
            self._end(trace.request_id)
        elif len(self._open) > _MAX_OPEN_REQUESTS:
            self._end(next(iter(self._open)))

    def _continued(self, trace: Trace) -> _OpenRequest:
        """The trace's request, with its tokens."""
        tokens = trace.token_ids_T.tolist()
        known = self._open.pop(trace.request_id, None)
        new = trace.first_position + trace.answer_start
        if known is None or known.first + len(known.tokens) != new:  # the first segment, or one was lost
            root = trace.first_position + max(1, first_trained_position(trace))
            part = self._part(trace)
            known = _OpenRequest(tokens=tokens, first=trace.first_position, answer=new, root=root, part=part)
        else:
            known.tokens += tokens[trace.answer_start :]
        self._open[trace.request_id] = known
        return known

    def _part(self, trace: Trace) -> int:
        """What of the memory the trace's request may read; 0: nothing."""
        if self._memory is None or (self._by_client and not trace.client):
            return 0
        client = self._clients.setdefault(trace.client if self._by_client else "", len(self._clients) + 1)
        name = trace.served_domain or client_label(trace.domain)
        domain = self._domains.setdefault(name, len(self._domains) + 1) if name else 0
        return (client << DOMAIN_BITS) + (domain if domain < 1 << DOMAIN_BITS else 0)

    def _look_up(self, request: _OpenRequest, trace: Trace, roots: range) -> list[Copies]:
        """The copies at each of these indices of the request's tokens."""
        if not len(roots):
            return []
        rows = len(roots)
        wanted = LookUp(
            slots=[0] * rows,
            lengths=[root + 1 for root in roots],
            most=[self.most] * rows,
            parts=[request.part] * rows,
            tables=[self.reliability.table(sampled=trace.verify == "sampled")] * rows,
            rate_RC=self.reliability.rate_RC,
            least=self._least,
            own=self._own,
        )
        return look_up(torch.tensor([request.tokens], dtype=torch.int64), wanted, memory=self._memory)

    def _learn_rates(
        self, request: _OpenRequest, trace: Trace, copies: dict[int, Copies], paths: dict[int, list[int]]
    ) -> None:
        """Count nodes whose parents were accepted, in rounds that propose copies alone."""
        table = self.reliability.table(sampled=trace.verify == "sampled")
        root, last = request.root - trace.first_position, len(trace.token_ids_T) - 1 - self.most
        root = max(root, min(copies, default=root))
        while root <= last:
            path = {0, *paths[root]}
            self.reliability.observe_tree(table, copies[root], path)
            root += len(path)
        request.root = trace.first_position + root

    def _end(self, request_id: str) -> None:
        request = self._open.pop(request_id)
        answer = request.first + len(request.tokens) - request.answer
        if self._memory is not None and request.part:
            self._memory.insert_answer(request.tokens, answer=answer, part=request.part)


def ngram_paths_of(config: AuroraConfig) -> NgramPaths | None:
    """Copies as a server with these settings may propose; None if it proposes none, or without kernels."""
    most, memory = copied_tokens(config.engine, config.memory), resolved_memory(config)
    if not most or native.library() is None:
        return None
    return NgramPaths(
        most=most,
        own=config.engine.lookup,
        memory=SuffixMemory(memory.capacity_mb << 20) if memory.capacity_mb else None,
        by_client=memory.scope == "client",
    )


def _path(copies: Copies, tokens: list[int], root: int) -> list[int]:
    """The columns of the tree's path that the tokens after index `root` follow."""
    path: list[int] = []
    at = 0
    for column, (token, parent) in enumerate(zip(copies.tokens, copies.parents, strict=True), start=1):
        place = root + 1 + len(path)
        if parent == at and place < len(tokens) and token == tokens[place]:
            path.append(column)
            at = column
    return path
