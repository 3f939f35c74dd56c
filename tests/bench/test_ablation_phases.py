"""Seeds of an ablation take other requests and orders, and phases that are too short are named."""

from __future__ import annotations

from dataclasses import replace

from aurora_lit.bench.ablation.phases import order_of_phases, short_phases, takes
from aurora_lit.config import load_config
from aurora_lit.learn.online.held_out import HeldOut

REQUESTS = [f"{n // 200}-chat/{n}" for n in range(1200)]


def taken(seed: int, every: int) -> set[str]:
    return {request for request in REQUESTS if takes(request, seed=seed, every=every)}


def test_no_two_seeds_take_the_same_requests_and_the_first_ones_share_none() -> None:
    for every in (2, 3, 4):
        groups = [taken(seed, every) for seed in range(2 * every)]
        for first in (0, every):
            assert set().union(*groups[first : first + every]) == set(REQUESTS)
            assert sum(map(len, groups[first : first + every])) == len(REQUESTS)
        for i, group in enumerate(groups):
            assert 0.8 < len(group) * every / len(REQUESTS) < 1.2
            for other in groups[i + 1 :]:
                assert len(group & other) < 0.75 * len(group)
    assert taken(0, 1) == taken(5, 1) == set(REQUESTS)


def test_every_seed_has_its_share_of_the_requests_that_the_gate_keeps() -> None:
    for every in (2, 3, 4):
        for seed in range(2 * every):
            group = taken(seed, every)
            kept = sum(HeldOut.is_kept(request) for request in group)
            assert 0.03 < kept / len(group) < 0.1, kept


def test_seeds_have_their_own_orders_if_phases_are_shuffled() -> None:
    assert order_of_phases(6, seed=3, shuffled=False) == list(range(6))
    orders = [order_of_phases(6, seed=seed, shuffled=True) for seed in range(5)]
    assert orders[0] == list(range(6))
    assert len({tuple(order) for order in orders}) == 5
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[3] == order_of_phases(6, seed=3, shuffled=True)


def test_phases_that_gate_or_average_look_beyond_are_named() -> None:
    config = load_config(None, ["learn.gate_requests=32", "learn.publish_every_steps=10", "learn.ema_decay=0.95"])

    def said(requests: int, *, every: int = 1, steps: float = 1.0, ema: float = 0.95) -> list[str]:
        changed = replace(config, learn=replace(config.learn, ema_decay=ema))
        phases = [{"name": "chat", "requests": 1000}, {"name": "sql", "requests": requests}]
        return short_phases(changed, phases, steps_per_request=steps, every=every)

    assert said(400) == []
    (gate,) = said(400, every=4)
    assert gate.startswith("phase sql has 100 requests, of which 32 wait for a trial")
    assert [text.split("optimiser steps, ")[-1][:13] for text in said(400, steps=0.05)] == [
        "and 4 refusal",
        "and the publi",
    ]
    assert len(said(400, steps=0.15)) == 1, "60 steps are thrice those that the average looks back over"
    assert len(said(400, steps=0.05, ema=0.0)) == 1
