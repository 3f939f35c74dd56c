"""How learning responds to domains, and that every setting of `domain` and `schedule` changes something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.domain_prompts import PromptMaker
from support.live_traces import make_controller

from aurora_lit.config import load_config
from aurora_lit.learn.online.build import controller_for
from aurora_lit.modules.domains import clusters
from aurora_lit.modules.domains import controller as controller_module
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.domains.detector import DomainDetector


def with_rate(controller: DomainController) -> tuple[DomainController, Callable[[], float]]:
    """The controller with a schedule of base rate 1, and a function that takes a step and returns the rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (schedule,) = controller.schedules_for([optimizer])

    def step() -> float:
        optimizer.step()
        schedule.step()
        rate = optimizer.param_groups[0]["lr"]
        assert isinstance(rate, float)
        return rate

    return controller, step


class FakeBatch:
    """What `record_batch` reads of a batch; each row: domain, tokens, whether it is live."""

    def __init__(self, *rows: tuple[str, int, bool]) -> None:
        self.traces = self
        self.domains = tuple(domain for domain, _, _ in rows)
        self.weight_BT = torch.stack([(torch.arange(100) < tokens).float() for _, tokens, _ in rows])
        self.live_B = torch.tensor([live for _, _, live in rows])


def test_a_trace_gets_the_detectors_domain_and_a_new_domain_raises_the_rate() -> None:
    controller, step = with_rate(
        make_controller(
            detector=DomainDetector(max_domains=8, novelty_threshold=0.7),
            warmup_steps=0,
            min_lr_factor=0.2,
            decay_tokens=50.0,
        )
    )
    prompts, raised = PromptMaker(), list[int]()
    controller.on_raised_heat = lambda: raised.append(controller.num_shifts)
    for n in range(100):
        trace = controller.assign_domain(prompts.trace(("code", "chat")[n % 2], label="auto-99"))
        controller.record_batch(FakeBatch((trace.domain, 40, True)))  # type: ignore[arg-type]
        calm_rate = step()
    assert trace.domain not in ("", "auto-99")
    assert calm_rate < 0.25
    assert set(raised) == {0}, "domains were founded"
    rates = []
    for _ in range(20):
        trace = controller.assign_domain(prompts.trace("prose"))
        controller.record_batch(FakeBatch((trace.domain, 1, True)))  # type: ignore[arg-type]
        rates.append(step())
    assert max(rates) > 0.6
    assert controller.last_shift is not None
    assert (controller.num_shifts, controller.last_shift.domain) == (1, trace.domain)
    assert raised.count(1) == 1, "once for the shift"
    assert trace.domain in controller.describe()


def test_without_a_detector_labels_are_domains_and_no_shift_is_detected() -> None:
    controller, step = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.2, decay_tokens=50.0))
    trace = PromptMaker().trace("code", label="mine")
    assert controller.assign_domain(trace) is trace
    for _ in range(10):
        controller.record_batch(FakeBatch(("mine", 50, True), ("old", 50, False)))  # type: ignore[arg-type]
        rate = step()
    assert rate == pytest.approx(0.2, abs=1e-3)
    assert (controller.num_shifts, controller.describe()) == (0, "mine 100% (heat 0.00)")
    controller._schedules[0].back_off()
    for label, backoff in (("mine", 0.5), ("new", 1.0)):
        controller.assign_domain(PromptMaker().trace("code", label=label))
        assert controller._schedules[0].backoff == backoff


@pytest.mark.parametrize("detect", [False, True])
def test_labels_are_capped_and_those_dropped_are_counted(detect: bool) -> None:
    def a_capped() -> DomainController:
        detector = DomainDetector(max_domains=5, novelty_threshold=0.7) if detect else None
        return with_rate(make_controller(detector=detector, max_labels=3))[0]

    controller, prompts = a_capped(), PromptMaker()
    found = [controller.assign_domain(prompts.trace("code", label=f"label {n % 5}")).domain for n in range(50)]
    assert set(found) == {"label 0", "label 1", "label 2"} | set(found) & {""}
    assert controller.num_labels_dropped == 20
    again = a_capped()
    again.load_state_dict(controller.state_dict())
    assert again.assign_domain(prompts.trace("code", label="label 2")).domain == "label 2"
    assert again.assign_domain(prompts.trace("code", label="another")).domain != "another"
    assert again.num_labels_dropped == 1
    other = make_controller(detector=None if detect else DomainDetector(max_domains=3, novelty_threshold=0.7))
    other.load_state_dict(controller.state_dict())
    assert other.assign_domain(prompts.trace("code", label="mine")).domain == "mine"


@pytest.mark.parametrize("recency", [None, 64.0])
def test_a_detectors_state_with_embeddings_that_are_another_mean_is_ignored(recency: float | None) -> None:
    """None: one of the time before states said which mean it is."""
    saved, prompts = DomainDetector(max_domains=3, novelty_threshold=0.7), PromptMaker()
    saved.assign(prompts.trace("code", label="before"))
    state = saved.state_dict()
    state = {name: value for name, value in state.items() if name != "recency"}
    if recency is not None:
        state["recency"] = recency
    detector = DomainDetector(max_domains=3, novelty_threshold=0.7)
    controller = make_controller(detector=detector)
    controller.load_state_dict(state)
    assert (detector.num_requests, detector.domains) == (0, {})
    assert controller.assign_domain(prompts.trace("code", label="mine")).domain == "mine"
    controller.load_state_dict(saved.state_dict())
    assert set(detector.domains) == {"before"}


def test_only_learned_tokens_cool_a_domain() -> None:
    controller, step = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.0, decay_tokens=100.0))
    controller.record_batch(FakeBatch(("a", 60, True), ("a", 40, False), ("b", 100, False)))  # type: ignore[arg-type]
    assert step() == pytest.approx(1 / 2.718281828), "live and replayed tokens of the live domain, padding left out"


def test_what_was_unknown_and_is_replayed_does_not_cool_what_will_be_unknown() -> None:
    """Without a detector all that has no label is of one domain, which replay cools as any other."""
    for detector in (None, DomainDetector(max_domains=3, novelty_threshold=0.7)):
        rates: dict[str, Any] = {"warmup_steps": 0, "min_lr_factor": 0.0, "decay_tokens": 100.0}
        controller, _ = with_rate(make_controller(detector=detector, **rates))
        controller.record_batch(FakeBatch(("", 500, False), ("a", 100, True)))  # type: ignore[arg-type]
        assert (controller._schedules[0].heat_of("") == 1.0) is (detector is not None)
        controller.record_batch(FakeBatch(("", 100, True)))  # type: ignore[arg-type]
        assert controller._schedules[0].heat_of("") < 0.5


def test_new_optimizers_know_the_domains_of_the_old_ones() -> None:
    controller, _ = with_rate(make_controller(warmup_steps=0, min_lr_factor=0.0, decay_tokens=100.0))
    controller.record_batch(FakeBatch(("a", 100, True)))  # type: ignore[arg-type]
    before = controller.heat
    controller, _ = with_rate(controller)
    assert controller.heat == before < 0.5


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    """Of the default settings."""
    return behaviour_with([])


def behaviour_with(overrides: list[str]) -> dict[str, Any]:
    """A configuration's controller in numbers: domains and rates along fixed traffic."""
    controller, step = with_rate(controller_for(load_config(None, overrides)))
    prompts, domains, rates = PromptMaker(), [], [step()]
    for n in range(120):
        trace = controller.assign_domain(prompts.trace(("code", "chat", "prose", "sql")[n % 4]))
        domains.append(trace.domain)
        controller.record_batch(FakeBatch((trace.domain, 100, True)))  # type: ignore[arg-type]
        rates.append(step())
    return {"domains": domains, "first_rate": rates[0], "rates": rates}


def test_every_setting_has_its_effect(default: dict[str, Any]) -> None:
    other = behaviour_with(["domain.detect=false"])
    assert {name for name in default if default[name] != other[name]} - {"first_rate"} == {"domains", "rates"}


@pytest.mark.parametrize("detect", [False, True])
def test_a_label_that_nobody_uses_gives_way_to_a_new_one(detect: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticket numbers would take all places for good."""
    for module in (clusters, controller_module):
        monkeypatch.setattr(module, "UNUSED_REQUESTS", 20)
    detector = DomainDetector(max_domains=5, novelty_threshold=0.7) if detect else None
    controller, prompts = with_rate(make_controller(detector=detector, max_labels=3))[0], PromptMaker()

    def served_as(label: str) -> str:
        return controller.assign_domain(prompts.trace("code", label=label)).domain

    assert [served_as(label) for label in ("ticket 1", "used", "ticket 2")] == ["ticket 1", "used", "ticket 2"]
    found = [served_as(("new", "used")[n % 2]) for n in range(40)]
    assert found[:18:2].count("new") == 0
    assert found[24::2] == ["new"] * 8
    assert found[1::2] == ["used"] * 20
    again = with_rate(make_controller(detector=DomainDetector(max_domains=5) if detect else None, max_labels=3))[0]
    again.load_state_dict(controller.state_dict())
    assert again.assign_domain(prompts.trace("code", label="new")).domain == "new"
