"""Chooses the traces of each batch: live traffic as it arrives, mixed with replay.

A live trace waits until a batch takes it; then it goes to the reservoir, from where it may be drawn again as replay.
When more arrives than can be trained on, clients have turns: the most informative trace of each is taken, then its
second; the oldest of the client that has most of them go to the reservoir without having been in a batch. While there
are several clients, none gets more than its share of a batch, live and replayed traces together, nor of its live part,
so that what is replayed of that client has room. Leaves out padding (learn/data/collate.py) and requests kept out of
training (learn/online/trial.py), which never come here.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

from aurora_lit.learn.data.collate import collate_online
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.trace_parts import (
    CONTEXT_COST,
    batch_size,
    crop,
    pieces_of,
    trained_positions,
)
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.request import Source, by_turns, oldest_of_busiest
from aurora_lit.traces.record import Trace

MAX_PASSES = 4
"""How often a position that is held is trained on, on average, before the learner waits for new traces. Those that the
reservoir has dropped do not count, or the traffic of a day would have its last hour replayed all night."""
_FEWEST_LIVE = 64
"""Fewer live positions weigh in a step as they would among so many, and are no reason for one: the six of a health
probe would be 70 % of its loss, each 140 times a replayed one, and a probe every ten seconds 8,640 steps a day."""
MAX_CLIENT_SHARE = 0.5
"""Largest share of a batch's positions from one client while there are others. A client is the request's `user`, else
its network address."""
_MOST_INFORMATIVE = 0.75
"""Text of which more is rejected is no better to learn from: it is mostly noise, as at temperature 2."""
_MIN_POSITIONS = 8
"""Shorter traces are dropped: each would be a row of its own in a batch."""
MAX_CONTEXT = 128
"""Positions kept before the first one that is trained on, which contribute no loss."""
_LARGE_SHARE = 0.75
"""A piece with at least such a share of its trace's bytes keeps all of them in memory, since a copy takes half a
millisecond."""
_REPLAY_DRAWS = 16
"""Draws from the reservoir to fill a batch; drawn traces that are too long for it are skipped, mostly unread."""
_FIRST_UNTAKEN, _UNTAKEN_PER_TAKEN = 64, 2
"""Traces that no batch takes are remembered up to the first number, and so many more for each trace that one takes:
beside four clients a learner takes one in thirty, and writing one to the reservoir costs as much as reading it did."""
_RECENT_CLIENTS = 32
"""There are several clients while so many latest traces, and those that wait, are not all of one. Not for longer: a
client is limited then, also where others have nothing to fill the rest of a batch with."""


def _live_positions(*, batch_positions: int, replay_share: float) -> int:
    """The size of a batch's live part."""
    return max(_MIN_POSITIONS, int(batch_positions * (1 - replay_share)))


def fewest_live(*, batch_positions: int, replay_share: float) -> int:
    """As how many live positions fewer of them weigh in a step."""
    return min(_FEWEST_LIVE, _live_positions(batch_positions=batch_positions, replay_share=replay_share))


class OnlineBatcher:
    """Makes batches of live and replayed traces.

    >>> batcher.add(trace)
    >>> batch = batcher.next_batch()                       # None: nothing to train on now
    """

    def __init__(
        self,
        reservoir: Reservoir,
        *,
        batch_positions: int,
        replay_share: float,
        live_bytes: int,
        max_client_share: float = MAX_CLIENT_SHARE,
    ) -> None:
        """Start without live traces.

        batch_positions: size of a batch, see `batch_size`. replay_share: share of it that is replayed.
        live_bytes: memory for waiting traces. max_client_share: largest share of a batch's positions for one client.
        """
        self.reservoir = reservoir
        self._batch_positions = batch_positions
        self._live_positions = _live_positions(batch_positions=batch_positions, replay_share=replay_share)
        self._fewest_live = fewest_live(batch_positions=batch_positions, replay_share=replay_share)
        self._live_bytes = live_bytes
        self._client_positions = max(_MIN_POSITIONS, int(max_client_share * batch_positions))
        self._client_live_positions = max(_MIN_POSITIONS, int(max_client_share * self._live_positions))
        self._clients: deque[str] = deque(maxlen=_RECENT_CLIENTS)
        self._waiting: deque[Trace] = deque()
        self._waiting_bytes = 0
        self._untaken_room = _FIRST_UNTAKEN
        """Traces that no batch took which may still be remembered."""
        self._counted = reservoir.positions
        """Positions whose passes are counted: those that were held at the last batch, and those added since."""
        # Of traces that a learner before has left it is not known; they are replayed beside new ones.
        self.positions_out: float = MAX_PASSES * reservoir.positions
        """How often the positions that are held were in batches, added up."""
        self.num_over_share = 0
        """How often a client's live traces had to wait for the next batch because its share was used up."""

    def add(self, trace: Trace) -> None:
        """Add a live trace, a long one in pieces; one without positions to train on is dropped."""
        if len(trace.token_ids_T) < _MIN_POSITIONS or not trained_positions(trace):
            return
        self._clients.append(trace.client)
        # What fits beside live traces, so that long answers are replayed too, and half a batch at most.
        # A small share of replay is no reason for pieces that are mostly context.
        size = self._batch_positions
        room = max(_MIN_POSITIONS, size // 4, min(size - self._live_positions or size, size // 2))
        if self._has_several_clients:
            room = min(room, self._client_live_positions)
        trained = trained_positions(trace)
        if batch_size([crop(trace, trained + MAX_CONTEXT)]) > room:
            trained = max(_MIN_POSITIONS, room - int(CONTEXT_COST * min(MAX_CONTEXT, len(trace.token_ids_T))))
        for piece in pieces_of(trace, most_trained=trained, most_context=MAX_CONTEXT):
            piece = crop(piece, room) if batch_size([piece]) > room else piece
            # Or what was cut off would stay in memory, uncounted.
            piece = piece.copy() if piece.num_bytes < _LARGE_SHARE * trace.num_bytes else piece
            self._counted += trained_positions(piece)
            self._waiting.append(piece)
            self._waiting_bytes += piece.num_bytes
        while self._waiting_bytes > self._live_bytes:
            oldest = oldest_of_busiest(self._waiting)
            self._waiting.remove(oldest)
            self._waiting_bytes -= oldest.num_bytes
            self._remember_untaken(oldest)

    def rename_domain(self, removed: str, kept: str) -> None:
        """Traces of a domain that went into another one are of that from now on."""
        self._waiting = deque(
            replace(trace, domain=kept) if trace.domain == removed else trace for trace in self._waiting
        )
        self.reservoir.rename_domain(removed, kept)

    def next_batch(self) -> OnlineBatch | None:
        """The next batch; None when no live trace waits and MAX_PASSES is reached."""
        self._forget_passes()
        if not self._waiting and self._is_learned:
            return None
        is_limited = self._has_several_clients
        quota = _ClientQuota(self._client_live_positions if is_limited else self._batch_positions)
        live = self._take_live(quota)
        quota.begin_replay(self._client_positions if is_limited else self._batch_positions)
        replay = self._take_replay(live, quota)
        if not live and not replay:
            return None
        for trace in live:
            self._remember(trace)
        self._untaken_room = min(_FIRST_UNTAKEN, self._untaken_room + _UNTAKEN_PER_TAKEN * len(live))
        batch = collate_online(live, replay)
        self.positions_out += int((batch.traces.weight_BT > 0).sum())
        return batch

    def holds_back(self) -> bool:
        """True if live traces had better wait for more: they are few, and MAX_PASSES is reached or nothing replayed."""
        self._forget_passes()
        is_done = self._is_learned or self._live_positions >= self._batch_positions
        return is_done and 0 < self._waiting_positions < self._fewest_live

    @property
    def _is_learned(self) -> bool:
        return self.positions_out >= MAX_PASSES * self._counted

    @property
    def positions_in(self) -> int:
        """Positions that are held and can be trained on, waiting or remembered."""
        return self._waiting_positions + self.reservoir.positions

    @property
    def _waiting_positions(self) -> int:
        return sum(map(trained_positions, self._waiting))

    @property
    def num_waiting(self) -> int:
        """Live traces that no batch has taken yet."""
        return len(self._waiting)

    @property
    def _has_several_clients(self) -> bool:
        return len({*self._clients, *(trace.client for trace in self._waiting)}) > 1

    def _take_live(self, quota: _ClientQuota) -> list[Trace]:
        """The most informative of each client's waiting traces, as many as the live part holds; at least one."""
        taken: list[Trace] = []
        chosen, held_back = set(), set()
        for trace in by_turns(sorted(self._waiting, key=informativeness, reverse=True)):
            part = quota.allowed_part(trace)
            if taken and batch_size([*taken, part or trace]) > self._live_positions:
                continue
            if part is None:
                held_back.add(trace.client)
                continue
            quota.reserve(part)
            taken.append(part)
            chosen.add(id(trace))
        self.num_over_share += len(held_back)
        self._waiting = deque(trace for trace in self._waiting if id(trace) not in chosen)
        self._waiting_bytes = sum(trace.num_bytes for trace in self._waiting)
        return taken

    def _take_replay(self, live: list[Trace], quota: _ClientQuota) -> list[Trace]:
        """Traces drawn at random from the reservoir until the batch is full."""
        taken: list[Trace] = []
        if self._live_positions >= self._batch_positions:
            return taken
        seen = set()
        for _ in range(_REPLAY_DRAWS):
            room = self._batch_positions - batch_size([*live, *taken])
            trace = self.reservoir.sample(largest=room if live or taken else None, allows=quota.allows)
            if trace is None:
                continue
            segment = (trace.request_id, trace.first_position + trace.answer_start)
            part = quota.allowed_part(trace)
            if part is None or segment in seen:
                continue
            if not (live or taken) or batch_size([*live, *taken, part]) <= self._batch_positions:
                seen.add(segment)
                quota.reserve(part)
                taken.append(part)
        return taken

    def _forget_passes(self) -> None:
        """What was dropped takes its passes with it, as many as others had on average."""
        held = self.positions_in
        if held < self._counted:
            self.positions_out *= held / self._counted
        self._counted = held

    def _remember_untaken(self, trace: Trace) -> None:
        """Remember a trace that no batch took, or forget it if there are many of those."""
        if self._untaken_room:
            self._untaken_room -= 1
            self._remember(trace)
        else:
            self._counted -= trained_positions(trace)

    def _remember(self, trace: Trace) -> None:
        self.reservoir.add(trace, weight=0.1 + informativeness(trace))


class _ClientQuota:
    """Limits each client's positions in one batch: first those of its live traces, then all of them."""

    def __init__(self, max_positions: int) -> None:
        """max_positions: of one client's live traces; traces of unknown clients are not limited."""
        self._max_positions = max_positions
        self._taken: Counter[str] = Counter()
        self._begun = set[str]()
        """Clients with a trace in the present part of the batch."""

    def begin_replay(self, max_positions: int) -> None:
        """Replayed traces are taken from now on. max_positions: of one client, its live traces included."""
        self._max_positions = max_positions
        self._begun.clear()

    def allows(self, client: str, size: int) -> bool:
        """True if a trace of this client and size may be taken, or a part of it."""
        room = self._max_positions - self._taken[client]
        return not client or size <= room or (client not in self._begun and room >= _MIN_POSITIONS)

    def allowed_part(self, trace: Trace) -> Trace | None:
        """The trace, or its last positions if it is too long and its client's first of this part; None: no room."""
        size = batch_size([trace])
        if not self.allows(trace.client, size):
            return None
        room = self._max_positions - self._taken[trace.client]
        return trace if not trace.client or size <= room else crop(trace, room)

    def reserve(self, trace: Trace) -> None:
        """Count a trace that is now in the batch."""
        self._taken[trace.client] += batch_size([trace])
        self._begun.add(trace.client)


def informativeness(trace: Trace) -> float:
    """The draft's rejection rate, rejected / verified proposals; 0.5 for a trace without rounds of the draft.

    Proposals after a round's first rejection are not verified and do not count. It is _MOST_INFORMATIVE at most.
    """
    drafted_R = (trace.source_R == Source.DRAFT) & (trace.num_proposed_R > 0)
    if not drafted_R.any():
        return 0.5
    accepted_R, proposed_R = trace.num_accepted_R[drafted_R].long(), trace.num_proposed_R[drafted_R].long()
    rejected_R = accepted_R < proposed_R
    return min(_MOST_INFORMATIVE, float(rejected_R.sum()) / float((accepted_R + rejected_R).sum()))
