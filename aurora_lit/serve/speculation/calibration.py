"""Measures forward passes of the target and draft steps before the first request (seconds, best of a few calls).

The measurements initialise the cost tables (serve/speculation/costs.py); running rounds update them. Everything runs in
the engine's own slots, which are still empty. A start that has tables of an earlier one
(serve/speculation/kept_costs.py) measures for a moment and then only while it waits for its first request; what it
finds to be faster than in the tables replaces that, since the earlier start may have had other work beside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator

import torch

from aurora_lit.models.kv_cache import KVCache
from aurora_lit.models.target import Target
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.planner import MAX_TREE_COLUMNS, SpeculationLimits

_PREFILL_POSITIONS = 256
"""Positions of the draft's prefill that is timed, to learn what one takes."""
_CALLS, _MIN_GAIN = 3, 0.98
"""The shortest time is accepted after so many calls that did not improve it by 2 %: weights that fit into a CPU cache
move there only after a few calls, and rounds find them there."""


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

    Each step makes one timed call: at most about a tenth of a second.
    """
    if drafter is not None:
        position_s = yield from _prefill_position_s(target, drafter, capacity=kv_cache.capacity)
        costs.prefill_position_s = min(position_s, costs.prefill_position_s or position_s)
    batch_size = 1
    while True:
        probe = _Probe(target, drafter, kv_cache=kv_cache, batch_size=batch_size)
        yield from _measure_target(costs, limits, probe)
        if drafter is not None:
            yield from _measure_draft(costs, limits, probe)
        if batch_size >= max_batch_size:
            return
        batch_size = min(2 * batch_size, max_batch_size)


class _Probe:
    """Operations of a batch of one size, over the first slots, to be timed."""

    def __init__(self, target: Target, drafter: Drafter | None, *, kv_cache: KVCache, batch_size: int) -> None:
        self.batch_size = batch_size
        self._target, self._drafter, self._kv_cache = target, drafter, kv_cache
        self._slots_B = torch.arange(batch_size, device=target.device)
        self._starts_B = torch.zeros_like(self._slots_B)

    def run_target(self, query_length: int) -> None:
        """One forward pass of the target, and the greedy tokens of its logits."""
        ids_BT = torch.zeros(self.batch_size, query_length, dtype=torch.int64, device=self._slots_B.device)
        _, last_BTH = self._target(ids_BT, kv_cache=self._kv_cache, slots_B=self._slots_B, starts_B=self._starts_B)
        self._target.greedy_tokens(last_BTH).cpu()  # waits for a GPU, as below

    def run_chain(self, steps: int) -> None:
        """Draft chains of `steps` tokens, after a prefill of two positions."""
        assert self._drafter is not None
        self._drafter.propose(_uncached(self._drafter, self._inputs()), num_steps=steps).token_BK.cpu()

    def run_tree(self, levels: int, nodes: int) -> None:
        """Draft trees, after a prefill of two positions."""
        assert self._drafter is not None
        self._drafter.propose_tree(
            _uncached(self._drafter, self._inputs()),
            num_steps=levels,
            num_nodes=nodes,
        )

    def _inputs(self) -> DraftInputs:
        return DraftInputs(slots_B=self._slots_B, lengths=[3] * self.batch_size)


def _measure_target(costs: Costs, limits: SpeculationLimits, probe: _Probe) -> Iterator[None]:
    batch_size = probe.batch_size
    lengths = {*range(1, limits.draft_tokens + 2), 2, limits.copied_tokens + 1}
    lengths |= {nodes + 1 for nodes in limits.tree_sizes if batch_size * (nodes + 1) <= MAX_TREE_COLUMNS}
    for length in sorted(lengths):
        seconds = yield from _best_seconds(functools.partial(probe.run_target, length))
        costs.target.set_initial(batch_size, length, seconds)
    costs.target.make_monotonic(batch_size)


def _measure_draft(costs: Costs, limits: SpeculationLimits, probe: _Probe) -> Iterator[None]:
    # As in rounds, where a pass of the target has displaced the draft's weights from the CPU caches.
    before = functools.partial(probe.run_target, 1)
    for levels in range(1, limits.draft_tokens + 1):
        seconds = yield from _best_seconds(functools.partial(probe.run_chain, levels), before=before)
        costs.chain.set_initial(probe.batch_size, levels, seconds)
    costs.chain.make_monotonic(probe.batch_size)
    if not limits.tree_sizes:
        return
    for levels in range(2, limits.draft_tokens + 1):
        run = functools.partial(probe.run_tree, levels, limits.tree_sizes[-1])
        seconds = yield from _best_seconds(run, before=before)
        costs.tree.set_initial(probe.batch_size, levels, seconds)
    costs.tree.make_monotonic(probe.batch_size)


def _prefill_position_s(target: Target, drafter: Drafter, *, capacity: int) -> Generator[None, None, float]:
    """Seconds per position of the prefill of the draft's cache, for one sequence."""
    inputs = DraftInputs(
        slots_B=torch.zeros(1, dtype=torch.int64, device=target.device),
        lengths=[1 + min(_PREFILL_POSITIONS, capacity // 2)],
    )
    seconds = yield from _best_seconds(lambda: drafter.prefill(_uncached(drafter, inputs)).cpu())
    return seconds / (inputs.lengths[0] - 1)


def _uncached(drafter: Drafter, inputs: DraftInputs) -> DraftInputs:
    """The same inputs, after the draft's cache has dropped their slots."""
    for slot in inputs.slots_B.tolist():
        drafter.forget(slot)
    return inputs


def _best_seconds(
    operation: Callable[[], object], *, before: Callable[[], None] | None = None
) -> Generator[None, None, float]:
    """The shortest time of several calls. `before` runs before each call and is not timed. Yields after each call."""
    best, calls_since = float("inf"), 0
    while calls_since < _CALLS:
        if before:
            before()
        started = time.perf_counter()
        operation()
        seconds = time.perf_counter() - started
        calls_since = 0 if seconds < _MIN_GAIN * best else calls_since + 1
        best = min(best, seconds)
        yield
    return best
