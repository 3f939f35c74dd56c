"""Measures forward passes of the target and draft steps before the first request, in seconds.

The measurements initialise the cost tables (serve/speculation/costs.py); running rounds update them. Everything runs in
the engine's own slots, which are still empty. What a planner needs is how costs compare, and on a shared machine one
moment's times say nothing about the next one's. So all operations of a batch size are timed in turn, several times
over, and the median of each counts.

A first start measures one sequence and a full batch, and the rest while it waits for its first request. A start that
has tables of an earlier one (serve/speculation/kept_costs.py) measures for a moment and then only while it waits. What
was measured together stays together: of two sets of times for a batch size, the shorter one is kept, since the other
had other work beside it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.serve.speculation.costs import Costs, CostTable
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.kept_costs import KeptCosts
from aurora_lit.serve.speculation.planner import SpeculationLimits

_PREFILL_POSITIONS = 256
"""Positions of the draft's prefill that is timed, to learn what one takes."""
_CONTEXT = 192
"""Tokens before the columns of a timed pass: about what an answer has before it. A column costs more after them."""
_PASSES = 16
"""How often each operation of one sequence is timed; those of n sequences, a part of that, at least _ENOUGH times."""
_ENOUGH = 5
"""After so many of them, times may replace what is kept from an earlier start."""
_KEPT_AFTER = 2
"""After so many of them, times are kept where nothing is: the first calls are slow, and a slow target's start has time
for few."""
_REFINED_AT_START_S = 0.75
"""For so long a start that has all costs measures them again; enough for the widths of one sequence."""
_CALIBRATED_AT_START_S = 10.0
"""A start that lacks some measures no longer; beside other work all of it can take a minute."""


class Calibration:
    """The measurements of a start: the first at once, the others in idle moments until the first request.

    >>> steps = calibration_steps(costs, …, max_batch_size=8)
    >>> calibration = Calibration(costs, steps, kept=KeptCosts(…), max_batch_size=8)    # measures for a while
    >>> while calibration.step(): ...                                                   # goes on where that ended
    """

    def __init__(self, costs: Costs, steps: Iterator[None], *, kept: KeptCosts | None, max_batch_size: int) -> None:
        """Use what is kept, and measure for a while. What is not known yet is not drafted.

        `steps`: once they have measured `max_batch_size`, the costs are known well enough to begin with.
        `kept`: written with what this start measured, and again when the measurements end; None: nothing is kept.
        """
        self._costs, self._steps, self._kept = costs, steps, kept
        if kept is not None:
            kept.load_into(costs)
        has_all = _is_known(costs, max_batch_size)
        until = time.perf_counter() + (_REFINED_AT_START_S if has_all else _CALIBRATED_AT_START_S)
        while time.perf_counter() < until and self.step():
            if not has_all and _is_known(costs, max_batch_size):
                break
        self._save()

    def step(self) -> bool:
        """Time one operation; False if there is none left."""
        for _ in self._steps:
            return True
        self.end()
        return False

    def end(self) -> None:
        """Keep what was measured, and measure no more."""
        self._save()
        self._steps, self._kept = iter(()), None

    def _save(self) -> None:
        if self._kept is not None and self._costs.target.all_initial:
            self._kept.save(self._costs)


@torch.no_grad()
def calibration_steps(
    costs: Costs,
    limits: SpeculationLimits,
    target: Target,
    drafter: Drafter | None,
    *,
    kv_cache: KVCache,
    max_batch_size: int,
) -> Iterator[None]:
    """Fill the tables for batches of 1, 2, 4, … `max_batch_size`, at the query lengths that the limits allow.

    Of one sequence and of a full batch, what the tables lack comes first, with few calls each; then all sizes, those of
    which there is nothing yet before the others.
    Each step makes one timed call, of a large target half a second at most. In between, short slots get their memory.
    """
    if drafter is not None:
        position_s = yield from _prefill_position_s(target, drafter, capacity=kv_cache.capacity)
        costs.prefill_position_s = min(position_s, costs.prefill_position_s or position_s)

    def operations(batch_size: int) -> list[_Operation]:
        probe = _Probe(target, drafter, kv_cache=kv_cache, batch_size=batch_size)
        passes = _target_passes(costs.target, limits, probe)
        return passes if drafter is None else passes + _draft_steps(costs, limits, probe)

    for batch_size in sorted({1, max_batch_size}):
        if not _is_known(costs, batch_size):
            few = operations(batch_size) if batch_size == 1 else _outermost(operations(batch_size))
            yield from _measure(few, batch_size, passes=_KEPT_AFTER)
    yield from kv_cache.touch()
    sizes = {*(2**i for i in range(max_batch_size.bit_length())), max_batch_size}
    for batch_size in sorted(sizes, key=lambda size: (_is_known(costs, size), size)):
        yield from _measure(operations(batch_size), batch_size, passes=max(_ENOUGH, _PASSES // batch_size))


def _is_known(costs: Costs, batch_size: int) -> bool:
    return any(size == batch_size for size, _, _ in costs.target.all_initial)


@dataclass(frozen=True, kw_only=True)
class _Operation:
    """What is timed for one cell of a table."""

    table: CostTable
    length: int
    """Query length, or that of the draft's chains."""
    run: Callable[[], object]
    before: Callable[[], object] | None = None
    """Runs before each call, and is not timed."""

    def timed_s(self) -> float:
        """Seconds of one call."""
        if self.before:
            self.before()
        started = time.perf_counter()
        self.run()
        return time.perf_counter() - started


def _outermost(operations: list[_Operation]) -> list[_Operation]:
    """The shortest two and the longest of each table; times of those between are interpolated."""
    found = []
    for _, group in itertools.groupby(operations, key=lambda operation: id(operation.table)):
        own = list(group)
        found += own[:2] + own[2:][-1:]
    return found


def _measure(operations: list[_Operation], batch_size: int, *, passes: int) -> Iterator[None]:
    """Time each operation in turn, `passes` times over, and store the medians; they are rough at first.

    Yields after each call.

    `operations`: of each table from the shortest to the longest.
    """
    kept_s = [operation.table.initial(batch_size, operation.length) for operation in operations]
    times: list[list[float]] = [[] for _ in operations]
    for count in range(1, passes + 1):
        for operation, own in zip(operations, times, strict=True):
            own.append(operation.timed_s())
            yield
        costs_s = _monotonic(operations, [statistics.median(own) for own in times])
        known_s = sum(cost_s for cost_s, kept in zip(costs_s, kept_s, strict=True) if kept)
        if not kept_s[0] or (count >= _ENOUGH and known_s < sum(kept_s)):
            for operation, cost_s in zip(operations, costs_s, strict=True):
                operation.table.set_initial(batch_size, operation.length, cost_s, is_rough=count < _KEPT_AFTER)


def _monotonic(operations: list[_Operation], seconds: list[float]) -> list[float]:
    """The same, but no operation takes longer than a longer one of its table: other work on the machine only adds."""
    least = list(seconds)
    for i in reversed(range(len(operations) - 1)):
        if operations[i].table is operations[i + 1].table:
            least[i] = min(least[i], least[i + 1])
    return least


class _Probe:
    """Operations of a batch of one size, over the first slots, to be timed."""

    def __init__(self, target: Target, drafter: Drafter | None, *, kv_cache: KVCache, batch_size: int) -> None:
        self.batch_size = batch_size
        self._target, self._drafter, self._kv_cache = target, drafter, kv_cache
        self._slots_B = torch.arange(batch_size, device=target.device)
        self._context = min(_CONTEXT, kv_cache.capacity // 2)

    def run_target(self, query_length: int) -> None:
        """One forward pass of the target, and the greedy tokens of its logits."""
        ids_BT = torch.zeros(self.batch_size, query_length, dtype=torch.int64, device=self._slots_B.device)
        start = min(self._context, self._kv_cache.capacity - query_length)
        starts_B = torch.full_like(self._slots_B, start)
        _, last_BTH = self._target(ids_BT, kv_cache=self._kv_cache, slots_B=self._slots_B, starts_B=starts_B)
        self._target.greedy_tokens(last_BTH).cpu()  # waits for a GPU, as below

    def run_chain(self, steps: int) -> None:
        """Draft chains of `steps` tokens, after a prefill of two positions."""
        assert self._drafter is not None
        inputs = DraftInputs(slots=list(range(self.batch_size)), lengths=[3] * self.batch_size)
        self._drafter.propose(_uncached(self._drafter, inputs), num_steps=steps)


def _target_passes(table: CostTable, limits: SpeculationLimits, probe: _Probe) -> list[_Operation]:
    lengths = {*range(1, limits.draft_tokens + 2), 2, limits.weighed_tokens + 1, limits.copied_tokens + 1}
    return [
        _Operation(table=table, length=length, run=functools.partial(probe.run_target, length))
        for length in sorted(lengths)
    ]


def _draft_steps(costs: Costs, limits: SpeculationLimits, probe: _Probe) -> list[_Operation]:
    # As in rounds, where a pass of the target has displaced the draft's weights from the CPU caches.
    before = functools.partial(probe.run_target, 1)
    return [
        _Operation(table=costs.chain, length=length, run=functools.partial(probe.run_chain, length), before=before)
        for length in range(1, limits.draft_tokens + 1)
    ]


def _prefill_position_s(target: Target, drafter: Drafter, *, capacity: int) -> Generator[None, None, float]:
    """Seconds per position of the prefill of the draft's cache, for one sequence."""
    inputs = DraftInputs(
        slots=[0],
        lengths=[1 + min(_PREFILL_POSITIONS, capacity // 2)],
    )
    times = []
    for _ in range(_ENOUGH):
        started = time.perf_counter()
        drafter.prefill(_uncached(drafter, inputs)).cpu()
        times.append(time.perf_counter() - started)
        yield
    return statistics.median(times) / (inputs.lengths[0] - 1)


def _uncached(drafter: Drafter, inputs: DraftInputs) -> DraftInputs:
    """The same inputs, after the draft's cache has dropped their slots."""
    for slot in inputs.slots:
        drafter.forget(slot)
    return inputs
