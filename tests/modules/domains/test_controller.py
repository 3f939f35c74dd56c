"""How learning answers to domains: every setting of `domain` and `schedule` changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.domain_prompts import Prompts
from support.live_traces import make_controller

from aurora_lit.config import load_config
from aurora_lit.learn.online.build import controller_for
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.domains.detector import DomainDetector


def with_rate(steering: DomainController) -> tuple[DomainController, Callable[[], float]]:
    """The steering with schedules on an optimizer of rate 1, and a way to take a step and read the rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (schedule,) = steering.schedules_for([optimizer])

    def step() -> float:
        optimizer.step()
        schedule.step()
        rate = optimizer.param_groups[0]["lr"]
        assert isinstance(rate, float)
        return rate

    return steering, step


class Batch:
    """What `learned` looks at."""

    def __init__(self, *rows: tuple[str, int, bool]) -> None:
        self.traces = self
        self.domains = tuple(domain for domain, _, _ in rows)
        self.weight_BT = torch.stack([(torch.arange(100) < tokens).float() for _, tokens, _ in rows])
        self.live_B = torch.tensor([live for _, _, live in rows])


def test_a_trace_gets_the_detectors_domain_and_a_new_one_heats_the_rate() -> None:
    steering, step = with_rate(
        make_controller(
            detector=DomainDetector(max_domains=8, novelty=0.7), warmup_steps=0, min_lr_factor=0.2, decay_tokens=50.0
        )
    )
    prompts = Prompts()
    for n in range(100):
        trace = steering.place(prompts.trace(("code", "chat")[n % 2], label="auto-99"))
        steering.learned(Batch((trace.domain, 40, True)))  # type: ignore[arg-type]
        calm = step()
    assert trace.domain not in ("", "auto-99")
    assert calm < 0.25
    rates = []
    for _ in range(20):
        trace = steering.place(prompts.trace("prose"))
        steering.learned(Batch((trace.domain, 1, True)))  # type: ignore[arg-type]
        rates.append(step())
    assert max(rates) > 0.6
    assert steering.last_shift is not None
    assert (steering.num_shifts, steering.last_shift.domain) == (1, trace.domain)
    assert trace.domain in steering.describe()


def test_without_a_detector_labels_are_domains_and_nothing_shifts() -> None:
    steering, step = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.2, decay_tokens=50.0))
    trace = Prompts().trace("code", label="mine")
    assert steering.place(trace) is trace
    for _ in range(10):
        steering.learned(Batch(("mine", 50, True), ("old", 50, False)))  # type: ignore[arg-type]
        rate = step()
    assert rate == pytest.approx(0.2, abs=1e-3)
    assert (steering.num_shifts, steering.describe()) == (0, "mine 100% (heat 0.00)")


@pytest.mark.parametrize("detect", [False, True])
def test_labels_are_capped_and_those_dropped_are_counted(detect: bool) -> None:
    def a_capped() -> DomainController:
        detector = DomainDetector(max_domains=3, novelty=0.7) if detect else None
        return with_rate(make_controller(detector=detector, max_labels=3))[0]

    steering, prompts = a_capped(), Prompts()
    found = [steering.place(prompts.trace("code", label=f"label {n % 5}")).domain for n in range(50)]
    assert set(found) == {"label 0", "label 1", "label 2"} | set(found) & {""}
    assert steering.num_labels_dropped == 20
    again = a_capped()
    again.load_state_dict(steering.state_dict())
    assert again.place(prompts.trace("code", label="label 2")).domain == "label 2"
    assert again.place(prompts.trace("code", label="another")).domain != "another"
    assert again.num_labels_dropped == 1
    other = make_controller(detector=None if detect else DomainDetector(max_domains=3, novelty=0.7))
    other.load_state_dict(steering.state_dict())
    assert other.place(prompts.trace("code", label="mine")).domain == "mine"


def test_only_what_is_learned_counts() -> None:
    steering, step = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.0, decay_tokens=100.0))
    steering.learned(Batch(("a", 60, True), ("a", 40, False), ("b", 100, False)))  # type: ignore[arg-type]
    assert step() == pytest.approx(1 / 2.718281828), "live and replayed tokens of the live domain, padding left out"


def test_new_optimizers_know_the_domains_of_the_old_ones() -> None:
    steering, _ = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.0, decay_tokens=100.0))
    steering.learned(Batch(("a", 100, True)))  # type: ignore[arg-type]
    before = steering.heat
    steering, _ = with_rate(steering)
    assert steering.heat == before < 0.5


def answers(overrides: list[str]) -> dict[str, Any]:
    """What a configuration's steering does, in numbers, in a fixed course of traffic."""
    steering, step = with_rate(controller_for(load_config(None, overrides)))
    cold, hot = (steering._signals.at(heat) for heat in (0.0, 1.0))
    prompts, domains, rates = Prompts(), [], [step()]
    for n in range(120):
        trace = steering.place(prompts.trace(("code", "chat", "prose", "sql")[n % 4]))
        domains.append(trace.domain)
        steering.learned(Batch((trace.domain, 100, True)))  # type: ignore[arg-type]
        rates.append(step())
    return {"cold": vars(cold), "hot": vars(hot), "domains": domains, "first_rate": rates[0], "rates": rates}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("domain.detect=false", {"domains", "rates"}),
        ("domain.max_domains=2", {"domains", "rates"}),
        ("domain.novelty_threshold=1.9", {"domains", "rates"}),
        ("schedule.warmup_steps=4", {"first_rate", "rates"}),
        ("schedule.min_lr_factor=0.9", {"first_rate", "rates"}),
        ("schedule.decay_tokens=500", {"rates"}),
        ("schedule.explore_share=0.3", {"hot"}),
        ("schedule.explore_temperature_factor=2", {"hot"}),
        ("schedule.entropy_weight=0.1", {"hot"}),
        ("schedule.replay_factor=0.1", {"hot"}),
        ("engine.explore_share=0.2", {"cold", "hot"}),
        ("engine.explore_temperature=2", {"cold", "hot"}),
        ("learn.entropy_weight=0.1", {"cold", "hot"}),
        ("learn.replay_share=0.2", {"cold", "hot"}),
    ],
)
def test_every_setting_changes_what_it_says(override: str, changed: set[str]) -> None:
    usual = answers([])
    other = answers([override])
    assert {name for name in usual if usual[name] != other[name]} - {"first_rate"} == changed - {"first_rate"}


def test_what_is_hot_is_added_to_what_is_cold_and_stays_possible() -> None:
    overrides = [
        "engine.explore_share=0.9",
        "schedule.explore_share=0.5",
        "learn.replay_share=0.9",
        "schedule.replay_factor=2",
        "learn.entropy_weight=0.1",
        "schedule.entropy_weight=0.2",
    ]
    hot = answers(overrides)["hot"]
    assert hot == pytest.approx(
        {"explore_share": 1.0, "explore_temperature": 1.0, "entropy_weight": 0.3, "replay_share": 0.95}
    )


@pytest.mark.parametrize(
    "override",
    [
        "domain.max_domains=1",
        "domain.novelty_threshold=2",
        "schedule.min_lr_factor=1.1",
        "schedule.decay_tokens=0",
        "schedule.explore_share=1.5",
        "schedule.replay_factor=-1",
        "schedule.warmup_steps=-1",
    ],
)
def test_impossible_settings_are_refused(override: str) -> None:
    with pytest.raises(Exception, match="is out of range"):
        load_config(None, [override])
