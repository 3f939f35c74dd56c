"""Measures, before the first request, what target passes and draft steps cost here (seconds, least of a few calls).

The numbers start the policy in serve/speculation/planner.py; running rounds keep them up (serve/speculation/costs.py). Runs in the
engine's own slots, which hold nothing yet.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from aurora_lit.models.slots import KVSlots
from aurora_lit.models.target import Target
from aurora_lit.modules.sampling.distribution import LogitOptions
from aurora_lit.request import SamplingParams
from aurora_lit.serve.speculation.draft_tree import propose_tree
from aurora_lit.serve.speculation.drafter import Drafter, DraftInputs
from aurora_lit.serve.speculation.planner import MOST_COLUMNS, SpeculationPlanner

_POSITIONS = 256
"""That a draft catches up with, to see what one takes."""
_CALLS, _GAIN = 3, 0.98
"""The least time is believed when so many calls have not made it shorter by 2 %: weights that fit into a cache come to
lie there only after a few calls, and there rounds find them."""


@torch.no_grad()
def calibrate(
    policy: SpeculationPlanner, target: Target, drafter: Drafter | None, *, slots: KVSlots, max_rows: int
) -> None:
    """Fill the policy's cost tables for 1, 2, 4, … `max_rows` rows and the widths that it chooses from."""
    if drafter is not None:
        behind = DraftInputs(
            slots_B=torch.zeros(1, dtype=torch.int64, device=target.model.device),
            lengths=[1 + min(_POSITIONS, slots.capacity // 2)],
        )
        seconds = _least_seconds(lambda: drafter.catch_up(_anew(drafter, behind)))
        policy.position_cost = seconds / (behind.lengths[0] - 1)
    rows = [1]
    while rows[-1] < max_rows:
        rows.append(min(2 * rows[-1], max_rows))
    for num_rows in rows:
        slots_B = torch.arange(num_rows, device=target.model.device)
        starts_B = torch.zeros_like(slots_B)

        def run_target(width: int, slots_B: torch.Tensor = slots_B, starts_B: torch.Tensor = starts_B) -> None:
            ids_BT = torch.zeros(len(slots_B), width, dtype=torch.int64, device=slots_B.device)
            _, last_BTH = target(ids_BT, slots=slots, slots_B=slots_B, starts_B=starts_B)
            target.likeliest(last_BTH)

        widths = {*range(1, policy.max_draft_tokens + 2), 2, policy.max_proposals + 1}
        widths |= {nodes + 1 for nodes in policy.tree_sizes if num_rows * (nodes + 1) <= MOST_COLUMNS}
        for width in sorted(widths):
            policy.target_cost.begin_with(num_rows, width, _least_seconds(functools.partial(run_target, width)))

        if drafter is None:
            continue
        greedy = LogitOptions.of([SamplingParams(max_tokens=1, temperature=0.0)] * num_rows, device=slots_B.device)

        def run_draft(
            steps: int,
            nodes: int = 0,
            slots_B: torch.Tensor = slots_B,
            options: LogitOptions = greedy,
            drafter: Drafter = drafter,
        ) -> None:
            rows = _anew(drafter, DraftInputs(slots_B=slots_B, lengths=[3] * len(slots_B)))
            if nodes:
                propose_tree(drafter, rows, num_steps=steps, num_nodes=nodes, go_on=lambda *_: True)
                return
            drafter.propose(
                rows,
                options=options,
                num_steps=steps,
                uniform_BK=torch.zeros(len(slots_B), steps, device=slots_B.device),
                go_on=lambda *_: True,
            )

        # As in rounds, where a target pass has taken the draft's weights' place in the caches.
        before = functools.partial(run_target, 1)
        one_s = _least_seconds(lambda: run_draft(1), before=before)
        three_s = _least_seconds(lambda: run_draft(3), before=before)
        policy.first_step_cost.begin_with(num_rows, 1, one_s)
        policy.next_step_cost.begin_with(num_rows, 1, max(0.0, (three_s - one_s) / 2))
        if policy.tree_sizes:
            three_s = _least_seconds(lambda: run_draft(3, policy.tree_sizes[-1]), before=before)
            policy.level_cost.begin_with(num_rows, 1, max(0.0, (three_s - one_s) / 2))


def _anew(drafter: Drafter, rows: DraftInputs) -> DraftInputs:
    """The rows as those of requests that the draft has not seen yet."""
    for slot in rows.slots_B.tolist():
        drafter.forget(slot)
    return rows


def _least_seconds(operation: Callable[[], object], *, before: Callable[[], None] | None = None) -> float:
    """`before` is run each time, and takes no time."""
    least, calls_since = float("inf"), 0
    while calls_since < _CALLS:
        if before:
            before()
        started = time.perf_counter()
        operation()
        seconds = time.perf_counter() - started
        calls_since = 0 if seconds < _GAIN * least else calls_since + 1
        least = min(least, seconds)
    return least
