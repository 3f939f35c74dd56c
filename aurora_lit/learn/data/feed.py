"""Which traces are learned from: live traffic as it comes, mixed with what is remembered.

A trace waits in `live` until a batch takes it; then it goes to the reservoir, from where it comes back as replay. When
more comes than can be learned from, the most informative traces are taken and the oldest go to the reservoir untaken.
No client fills more than its share of a batch, live and remembered traces together, unless it is the only one there is.
Requests kept out of training never come here (learn/online/gate.py). What is left out: padding (learn/data/labelled_trace.py).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence

from aurora_lit.learn.data.labelled_trace import LabelledTrace, crop, first_taught, online_batch, read_lesson, read_lse
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.data.vocabulary import VocabularyUse
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.traces.record import SOURCE_DRAFT, Trace

MAX_PASSES = 4
"""Positions are learned from at most so many times on average; then the learner waits for new ones."""
_SHORTEST = 8
"""Positions of a trace that is worth a row."""
_CONTEXT = 128
"""Positions kept before the first that teaches: a prompt costs as much as an answer and teaches nothing."""
_DRAWS = 16
"""Remembered traces looked at to fill a batch; those that do not fit in are left."""
_LATEST_CLIENTS = 256
"""Traces that tell whether there is more than one client now."""


class Feed:
    """Makes batches of live and remembered traces.

    >>> feed.add(trace)
    >>> batch = feed.next_batch(oldest_fresh=3)         # None: nothing to learn from now
    """

    def __init__(
        self,
        ends: TargetHead,
        reservoir: Reservoir,
        *,
        batch_positions: int,
        replay_share: float,
        live_bytes: int,
        max_client_share: float = 1.0,
        choice: str = "informative",
        seed: int = 0,
        vocabulary_use: VocabularyUse | None = None,
    ) -> None:
        """live_bytes: memory for traces that wait. max_client_share: of a batch's positions. choice, seed: learn's.
        vocabulary_use: is told of every trace that comes."""
        self._ends, self.reservoir = ends, reservoir
        self._batch_positions = batch_positions
        self.replay_share = replay_share
        """Of a batch's positions; may be changed between batches."""
        self._live_bytes, self._vocabulary_use = live_bytes, vocabulary_use
        self._client_positions = int(max_client_share * batch_positions)
        self._clients: deque[str] = deque(maxlen=_LATEST_CLIENTS)
        self._waiting: deque[Trace] = deque()
        self._waiting_bytes = 0
        self._uniform = random.Random(seed) if choice == "uniform" else None
        self.positions_in = 0
        """Positions that came and can teach."""
        self.positions_out = 0
        """Positions handed out in batches, replay included."""
        self.num_stale = 0
        """Live traces handed out whose draft was too old to teach the policy."""
        self.num_over_share = 0
        """Times that a client's live traces had to wait for the next batch, because it filled its share of one."""

    def add(self, trace: Trace) -> None:
        """Take in a live trace; one that teaches nothing is let go."""
        if self._vocabulary_use is not None:
            self._vocabulary_use.add(trace)
        taught = len(trace.token_ids_T) - first_taught(trace)
        # Half a batch at most, so that no trace fills one alone.
        trace = crop(trace, min(taught + _CONTEXT, max(_SHORTEST, self._batch_positions // 2)))
        if len(trace.token_ids_T) < _SHORTEST or not taught:
            return
        self.positions_in += len(trace.token_ids_T) - first_taught(trace)
        self._waiting.append(trace)
        self._clients.append(trace.client)
        self._waiting_bytes += trace.num_bytes
        while self._waiting_bytes > self._live_bytes:
            oldest = self._waiting.popleft()
            self._waiting_bytes -= oldest.num_bytes
            self._remember(oldest)

    def next_batch(self, *, oldest_fresh: int) -> OnlineBatch | None:
        """The next batch; None when nothing new came and what is remembered has taught enough.

        oldest_fresh: number of the oldest draft version whose proposals may teach the policy.
        """
        if not self._waiting and self.positions_out >= MAX_PASSES * self.positions_in:
            return None
        shares = _Shares(self._client_positions if len(set(self._clients)) > 1 else self._batch_positions)
        live = [read_lesson(trace, self._ends) for trace in self._take_live(shares)]
        replay = self._take_replay([lesson.trace for lesson in live], shares)
        if not live and not replay:
            return None
        for lesson in live:
            self._remember(lesson.trace)
        self.num_stale += sum(_is_stale(lesson, oldest_fresh) for lesson in live)
        batch = online_batch(live, replay, oldest_fresh=oldest_fresh)
        self.positions_out += int((batch.traces.weight_BT > 0).sum())
        return batch

    @property
    def _live_positions(self) -> int:
        return max(_SHORTEST, int(self._batch_positions * (1 - self.replay_share)))

    def _take_live(self, shares: _Shares) -> list[Trace]:
        """The most informative of those that wait, as many as the live share of a batch holds; at least one."""
        taken: list[Trace] = []
        uniform = self._uniform
        if uniform is not None:
            order = uniform.sample(list(self._waiting), len(self._waiting))
        else:
            order = sorted(self._waiting, key=informativeness, reverse=True)
        chosen, held_back = set(), set()
        for trace in order:
            part = shares.part_of(trace)
            if taken and _padded([*taken, part or trace]) > self._live_positions:
                continue
            if part is None:
                held_back.add(trace.client)
                continue
            shares.take(part)
            taken.append(part)
            chosen.add(id(trace))
        self.num_over_share += len(held_back)
        self._waiting = deque(trace for trace in self._waiting if id(trace) not in chosen)
        self._waiting_bytes = sum(trace.num_bytes for trace in self._waiting)
        return taken

    def _take_replay(self, live: list[Trace], shares: _Shares) -> list[Trace]:
        """Remembered traces, drawn at random until the batch is full."""
        taken: list[Trace] = []
        if self._live_positions >= self._batch_positions:
            return taken
        seen = set()
        for _ in range(_DRAWS):
            trace = self.reservoir.sample()
            if trace is None:
                break
            name = (trace.request_id, trace.first_position)
            part = shares.part_of(trace)
            if part is None or name in seen:
                continue
            if not (live or taken) or _padded([*live, *taken, part]) <= self._batch_positions:
                seen.add(name)
                shares.take(part)
                taken.append(read_lse(part, self._ends))
        return taken

    def _remember(self, trace: Trace) -> None:
        self.reservoir.add(trace, weight=0.1 + informativeness(trace))


class _Shares:
    """What each client may still fill of the batch in hand."""

    def __init__(self, most_positions: int) -> None:
        """most_positions: of one client; one that is not known is not bounded."""
        self._most_positions = most_positions
        self._taken: Counter[str] = Counter()

    def part_of(self, trace: Trace) -> Trace | None:
        """The trace, or the end of a client's first one that is too long alone; None when its share is filled."""
        room = self._most_positions - self._taken[trace.client] if trace.client else len(trace.token_ids_T)
        if len(trace.token_ids_T) <= room:
            return trace
        first = not self._taken[trace.client]
        return crop(trace, room) if first and room >= _SHORTEST else None

    def take(self, trace: Trace) -> None:
        """It is in the batch."""
        self._taken[trace.client] += len(trace.token_ids_T)


def informativeness(trace: Trace) -> float:
    """Rejected by tested proposals of the draft; a half where it had no round.

    A round tests its proposals up to the first rejection; those behind it say nothing.
    """
    drafted_R = (trace.source_R == SOURCE_DRAFT) & (trace.num_proposed_R > 0)
    if not drafted_R.any():
        return 0.5
    accepted_R, proposed_R = trace.num_accepted_R[drafted_R].long(), trace.num_proposed_R[drafted_R].long()
    rejected_R = accepted_R < proposed_R
    return float(rejected_R.sum()) / float((accepted_R + rejected_R).sum())


def _is_stale(lesson: LabelledTrace, oldest_fresh: int) -> bool:
    trace = lesson.trace
    return bool(((trace.source_R == SOURCE_DRAFT) & (trace.round_version_R < oldest_fresh)).any())


def _padded(traces: Sequence[Trace]) -> int:
    """Positions of a batch of these traces, padding included."""
    return len(traces) * max(len(trace.token_ids_T) for trace in traces)
