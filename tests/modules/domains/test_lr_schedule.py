"""DomainAwareLR: the factor of every step, listed; resumable; and the signal that goes with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch

from aurora_lit.modules.domains.lr_schedule import MAX_DOMAINS, DomainAwareLR

_DECAY = 100 / math.log(2)
"""decay_tokens such that a hundred tokens halve a domain's heat."""


def a_schedule(*, warmup_steps: int = 0, min_lr_factor: float = 0.2, rate: float = 1.0) -> DomainAwareLR:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return DomainAwareLR(optimizer, warmup_steps=warmup_steps, min_lr_factor=min_lr_factor, decay_tokens=_DECAY)


def step(schedule: DomainAwareLR, tokens: Mapping[str, float], live: Mapping[str, float] | None = None) -> float:
    """Take a step that learned from these tokens; returns the rate of the next."""
    schedule.count_tokens(tokens, live=tokens if live is None else live)
    schedule.optimizer.step()
    schedule.step()
    return round(schedule.optimizer.param_groups[0]["lr"], 4)


def test_steady_traffic_warms_up_and_cools_to_the_minimum() -> None:
    schedule = a_schedule(warmup_steps=4)
    assert schedule.get_last_lr() == [0.25]
    # warm-up times 0.2 + 0.8 · (1/2, 1/4, …)
    rates = [step(schedule, {"a": 100}) for _ in range(6)]
    assert rates == [0.3, 0.3, 0.3, 0.25, 0.225, 0.2125]
    for _ in range(30):
        step(schedule, {"a": 100})
    assert schedule.get_last_lr() == pytest.approx([0.2])


def test_a_shift_raises_the_rate_by_novelty_from_the_next_step_on() -> None:
    schedule = a_schedule()
    rates = [step(schedule, {"a": 100}) for _ in range(5)]
    assert rates == [0.6, 0.4, 0.3, 0.25, 0.225]
    schedule.raise_heat("b", 0.8)
    schedule.shift_to("b")
    assert schedule.get_last_lr() == pytest.approx([0.225]), "a signal changes state only"
    # 0.2 + 0.8 · 0.8 · (1/2, 1/4, …)
    assert [step(schedule, {"b": 100}) for _ in range(4)] == [0.52, 0.36, 0.28, 0.24]

    lesser = a_schedule()
    lesser.raise_heat("b", 0.4)
    lesser.shift_to("b")
    assert step(lesser, {"b": 100}) == 0.36, "half the novelty, half as much above the minimum"


def test_a_domain_that_returns_has_the_heat_that_it_left_with() -> None:
    schedule = a_schedule()
    rates = [step(schedule, {"a": 100}) for _ in range(2)]
    schedule.raise_heat("b", 1.0)
    schedule.shift_to("b")
    rates += [step(schedule, {"b": 100}) for _ in range(5)]
    schedule.raise_heat("a", 0.0)  # a known domain has novelty 0
    schedule.shift_to("a")
    rates += [step(schedule, {"a": 100}) for _ in range(2)]
    assert rates == [0.6, 0.4, *[0.6, 0.4, 0.3, 0.25, 0.225], *[0.3, 0.25]]


def test_a_drop_inside_a_domain_heats_it_again() -> None:
    schedule = a_schedule()
    for _ in range(10):
        step(schedule, {"a": 100})
    schedule.raise_heat("a", 0.5)
    assert step(schedule, {"a": 100}) == 0.4
    schedule.raise_heat("a", 0.1)  # its heat is higher than that
    assert step(schedule, {"a": 100}) == 0.3


def test_back_off_halves_the_rate_and_recovery_doubles_it_again() -> None:
    schedule = a_schedule(min_lr_factor=1.0)
    rates = []
    for event in ("back_off", "back_off", "recover", "recover", "recover"):
        getattr(schedule, event)()
        rates.append(step(schedule, {"a": 100}))
    assert rates == [0.5, 0.25, 0.5, 1.0, 1.0]
    for _ in range(20):
        schedule.back_off()
    assert step(schedule, {"a": 100}) == round(1 / 8, 4), "it has a minimum"
    other = a_schedule()
    other.continue_from(schedule)
    assert other.backoff == schedule.backoff


def test_new_traffic_is_learned_fast_whatever_was_refused_before() -> None:
    schedule = a_schedule()
    for _ in range(10):
        step(schedule, {"known": 100})
        schedule.back_off()
    schedule.raise_heat("known", 0.0)
    schedule.shift_to("known")
    assert schedule.backoff == 1 / 8, "nothing is new"
    schedule.raise_heat("known", 0.7)
    assert schedule.backoff == pytest.approx(0.7)
    schedule.raise_heat("new", 1.0)
    assert schedule.backoff == 1.0


def test_two_interleaved_domains_cool_apart() -> None:
    schedule = a_schedule()
    for _ in range(10):
        step(schedule, {"old": 100})
    schedule.raise_heat("new", 1.0)
    # Half of each batch is new: 0.2 + 0.8 · share of the new in the last steps · heat of the new.
    rates = [step(schedule, {"old": 50, "new": 50}) for _ in range(6)]
    shares = [(1 - 0.75**n) / 2 for n in range(1, 7)]
    assert rates == pytest.approx([0.2 + 0.8 * s * 0.5 ** (n / 2) for n, s in enumerate(shares, 1)], abs=1e-3)
    assert rates == [0.2712, 0.2878, 0.282, 0.2685, 0.254, 0.2412]
    assert schedule.heat_of("old") == pytest.approx(2.0**-13)
    assert schedule.heat_of("new") == pytest.approx(2.0**-3)


def test_replay_cools_its_domain_and_does_not_set_the_rate() -> None:
    schedule = a_schedule()
    schedule.raise_heat("a", 1.0)
    schedule.shift_to("b")
    assert step(schedule, {"a": 100, "b": 100}, live={"b": 100}) == 0.6
    assert schedule.heat_of("a") == pytest.approx(0.5)
    assert step(schedule, {"a": 100}, live={}) == 0.6, "only replay: the live traffic is unchanged"
    assert schedule.heat_of("a") == pytest.approx(0.25)


def test_it_is_saved_as_plain_numbers_and_continues_exactly() -> None:
    first = a_schedule(warmup_steps=8)
    for _ in range(3):
        step(first, {"a": 70, "b": 10})
    first.raise_heat("c", 0.7)
    first.shift_to("c")
    state = json.loads(json.dumps(first.state_dict()))
    again = a_schedule(warmup_steps=8)
    again.load_state_dict(state)
    rates = [schedule.optimizer.param_groups[0]["lr"] for schedule in (first, again)]
    assert rates[0] == rates[1] != first.get_lr()[0], "a shift counts from the next step on"
    for tokens in ({"c": 50}, {"a": 20, "c": 30}, {"d": 5}):
        assert step(first, tokens) == step(again, tokens)


def test_settings_that_were_changed_hold_after_a_restart() -> None:
    first = a_schedule(rate=1.0)
    step(first, {"a": 100})
    again = a_schedule(rate=0.1, min_lr_factor=0.6)
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.load_state_dict(first.state_dict())
    assert again.heat_of("a") == 0.5
    assert again.get_last_lr() == [group["lr"] for group in again.optimizer.param_groups] == pytest.approx([0.08])
    assert step(again, {"a": 100}) == 0.07


def test_after_a_rollback_it_warms_up_again_and_keeps_the_domains_heat() -> None:
    old = a_schedule(warmup_steps=4)
    for _ in range(8):
        step(old, {"a": 100})
    new = a_schedule(warmup_steps=4)
    new.continue_from(old)
    assert step(new, {"a": 0}) == pytest.approx(0.5 * (0.2 + 0.8 / 256), abs=1e-4)


def test_domains_are_bounded_and_the_least_recently_learned_is_forgotten() -> None:
    schedule = a_schedule()
    for number in range(MAX_DOMAINS):
        step(schedule, {str(number): 100})
    step(schedule, {"0": 100})
    step(schedule, {"new": 100})
    assert len(schedule.raised_heat) == len(schedule.tokens_since) == MAX_DOMAINS
    assert "0" in schedule.raised_heat
    assert "1" not in schedule.raised_heat
    assert len(schedule.live_share) < 64
