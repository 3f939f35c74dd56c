"""Measures forward passes of the target and draft steps before the first request, in seconds.

The measurements initialise the cost tables (serve/speculation/costs.py); running rounds correct them. Everything runs
in the engine's own slots, which are still empty. What matters is how costs compare, and on a shared machine one
moment's times say nothing about the next one's. So all operations of a batch size are timed in turn, several times
over, and the median of each counts. The start waits for a few calls; the others are made while the server waits for its
first request.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from aurora_lit.models.interface import Target
from aurora_lit.models.kv_cache import KVCache
from aurora_lit.serve.engine.round_plan import SpeculationLimits
from aurora_lit.serve.speculation.costs import Costs, CostTable
from aurora_lit.serve.speculation.sources.drafter import Drafter, DraftInputs

_PREFILL_POSITIONS = 128
"""Positions of the draft's prefill that is timed, to learn what one takes."""
_CONTEXT = 192
"""Tokens before the columns of a timed pass: about what an answer has before it. A column costs more after them."""
_LENGTHS_OF_ONE = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
"""Query lengths that are timed for one sequence. From six to seven rows kernels change to tiles, in a step."""
_FIRST_CALLS, _CALLS, _CALLS_OF_ONE = 3, 5, 16
"""Of each operation: at the start, in all, and in all of one sequence. With two, prices of columns were wrong by a
factor of six."""
_MOST_S = 10.0
"""Once one sequence is measured, a start waits for so long at most; beside other work all of it can take a minute."""

_Operation = tuple[CostTable, int, Callable[[], object]]
"""A table, a query length or that of a chain, and a call that returns once it is done."""


@torch.no_grad()
def calibrate(
    costs: Costs,
    limits: SpeculationLimits,
    target: Target,
    drafter: Drafter | None,
    *,
    kv_cache: KVCache,
    max_batch_size: int,
) -> Iterator[bool]:
    """Fill the tables for one sequence, two, four, … and `max_batch_size`.

    Each step makes one timed call, of a large target half a second at most. Yields True while a start should wait.
    """
    until = time.perf_counter() + _MOST_S
    if drafter is not None:
        inputs = DraftInputs(slots=[0], lengths=[1 + min(_PREFILL_POSITIONS, kv_cache.capacity // 2)])
        read_s = min(_timed_s(partial(_prefill, drafter, inputs)) for _ in range(_FIRST_CALLS))
        costs.prefill_position_s = read_s / (inputs.lengths[0] - 1)
    sizes = sorted({*(2**i for i in range(max_batch_size.bit_length())), max_batch_size})
    probes = {size: _Probe(costs, limits, target, drafter, kv_cache=kv_cache, batch_size=size) for size in sizes}
    for size in sorted({1, max_batch_size}):
        for _ in probes[size].calls(_FIRST_CALLS):
            yield size == 1 or time.perf_counter() < until
    for size, probe in probes.items():
        for _ in probe.calls(_CALLS_OF_ONE if size == 1 else _CALLS):
            yield False


def _timed_s(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _prefill(drafter: Drafter, inputs: DraftInputs) -> None:
    for slot in inputs.slots:
        drafter.forget(slot)
    drafter.prefill(inputs).cpu()


class _Probe:
    """Operations of a batch of one size, over the first slots."""

    def __init__(
        self,
        costs: Costs,
        limits: SpeculationLimits,
        target: Target,
        drafter: Drafter | None,
        *,
        kv_cache: KVCache,
        batch_size: int,
    ) -> None:
        self._batch_size = batch_size
        self._target, self._drafter, self._kv_cache = target, drafter, kv_cache
        self._slots_B = torch.arange(batch_size, device=target.device)
        self._context = min(_CONTEXT, kv_cache.capacity // 2)
        self._operations = self._in_turn(costs, limits)
        self._times: list[list[float]] = [[] for _ in self._operations]

    def calls(self, num_calls: int) -> Iterator[None]:
        """Time each operation until it was called so many times, and store the medians."""
        for _ in range(num_calls - len(self._times[-1])):
            for (_, _, run), times in zip(self._operations, self._times, strict=True):
                times.append(_timed_s(run))
                yield
            medians = [statistics.median(times) for times in self._times]
            for table, length, _ in self._operations:
                # No operation takes longer than a longer one.
                longer = zip(self._operations, medians, strict=True)
                seconds = min(s for (of, n, _), s in longer if of is table and n >= length)
                table.set_initial(self._batch_size, length, seconds)

    def _in_turn(self, costs: Costs, limits: SpeculationLimits) -> list[_Operation]:
        """What is timed, in turn: chains after passes, as in rounds, since these displace the draft from the caches."""
        longest = max(limits.weighed_tokens, limits.copied_tokens) + 1
        lengths = {1, 2, limits.draft_tokens + 1}
        if self._batch_size == 1:  # of a full batch that many would take a second
            lengths |= {longest, *(length for length in _LENGTHS_OF_ONE if length < longest)}
        passes: list[_Operation] = [(costs.target, n, partial(self._run_target, n)) for n in sorted(lengths)]
        chains: list[_Operation] = []
        if self._drafter is not None:
            chains = [(costs.chain, n, partial(self._run_chain, n)) for n in range(1, limits.draft_tokens + 1)]
        return [each for pair in itertools.zip_longest(passes, chains) for each in pair if each is not None]

    def _run_target(self, length: int) -> None:
        """One forward pass, and the greedy tokens of its logits."""
        ids_BT = torch.zeros(self._batch_size, length, dtype=torch.int64, device=self._slots_B.device)
        start = min(self._context, self._kv_cache.capacity - length)
        starts_B = torch.full_like(self._slots_B, start)
        _, last_BTH = self._target(ids_BT, kv_cache=self._kv_cache, slots_B=self._slots_B, starts_B=starts_B)
        self._target.greedy_tokens(last_BTH).cpu()  # waits for a GPU, as below

    def _run_chain(self, steps: int) -> None:
        """Chains of `steps` tokens, after a prefill of two positions."""
        assert self._drafter is not None
        slots = list(range(self._batch_size))
        for slot in slots:
            self._drafter.forget(slot)
        self._drafter.propose(DraftInputs(slots=slots, lengths=[3] * self._batch_size), num_steps=steps)
