"""What the engine takes over from the learner's status page: exploration, and the number of its CPU threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.planner import SpeculationLimits, SpeculationPlanner
from aurora_lit.serve.speculation.proposer import Proposer
from aurora_lit.serve.worker.learner_signals import ExplorationFollower, ThreadBudget


def test_rounds_explore_as_a_running_learner_asks_and_else_as_configured(tmp_path: Path) -> None:
    page = LearnerStatusPage.create(tmp_path / "page")
    proposer = Proposer(
        None,
        SpeculationPlanner(SpeculationLimits(draft_tokens=0, lookup_tokens=0, adaptive=False), Costs(ragged=True)),
        device=torch.device("cpu"),
        explore_share=0.02,
        explore_temperature=1.5,
    )
    now = [0.0]
    follower = ExplorationFollower(proposer, page, monotonic_s=lambda: now[0])

    def followed() -> tuple[float, float]:
        now[0] += 1.0
        follower.follow()
        return proposer.explore_share, proposer.explore_temperature

    assert followed() == (0.02, 1.5), "no learner"
    page.beat()
    page.write(pid=1)
    assert followed() == (0.02, 1.5), "it has not reported anything yet"
    page.write(explore_share=0.25, explore_temperature=2.0)
    assert followed() == (0.25, 2.0)
    page.write(explore_share=0.5)
    follower.follow()
    assert proposer.explore_share == 0.25, "the page is not read in every round"
    assert followed() == (0.5, 2.0)
    page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
    assert followed() == (0.02, 1.5), "it has stalled"
    page.beat()
    page.write(pid=0)
    assert followed() == (0.02, 1.5), "it has ended"


def test_rounds_leave_the_cores_to_a_running_learner_that_computes_on_them(tmp_path: Path) -> None:
    page, now = LearnerStatusPage.create(tmp_path / "page"), [0.0]
    planner = SpeculationPlanner(SpeculationLimits(draft_tokens=2, lookup_tokens=0), Costs(ragged=True))
    num_threads = torch.get_num_threads()
    budget = ThreadBudget(planner, page, threads=4, cores=5, monotonic_s=lambda: now[0])

    def followed(busy_threads: int) -> tuple[int, bool]:
        now[0] += 1.0
        page.write(busy_threads=busy_threads)
        budget.follow()
        planner.observe_round(1, 1, 0.1)
        return torch.get_num_threads(), planner.updates_costs

    try:
        torch.set_num_threads(4)
        assert followed(3) == (4, True), "no learner"
        page.beat()
        page.write(pid=os.getpid())
        assert followed(1) == (4, True), "there is a core for it"
        assert planner.costs.target(1, 1) == 0.1
        assert followed(3) == (2, False)
        planner.observe_round(1, 1, 9.0)
        assert planner.costs.target(1, 1) == 0.1, "times on fewer cores do not update the costs of rounds"
        assert followed(9) == (1, False)
        assert followed(0) == (4, True), "it rests"
        assert followed(3) == (2, False)
        page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
        assert followed(3) == (4, True), "it was killed at work"
    finally:
        torch.set_num_threads(num_threads)
