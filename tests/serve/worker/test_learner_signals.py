"""What the engine takes over from the learner's status page: exploration, and the cores it computes on."""

from __future__ import annotations

import os
import time
from pathlib import Path

from aurora_lit.ipc.learner_status import LearnerStatusPage
from aurora_lit.serve.engine.round_plan import SpeculationLimits
from aurora_lit.serve.speculation.costs import Costs
from aurora_lit.serve.speculation.sources.draft import DraftSource
from aurora_lit.serve.speculation.weigh import Weigher
from aurora_lit.serve.worker.learner_signals import ExplorationFollower, LearnerCores


def test_rounds_explore_as_a_running_learner_asks_and_else_as_configured(tmp_path: Path) -> None:
    page = LearnerStatusPage.create(tmp_path / "page")
    limits = SpeculationLimits(draft_tokens=0, copied_tokens=0, adaptive=False)
    source = DraftSource(None, Weigher(limits, Costs(ragged=True)), explore_share=0.02)
    now = [0.0]
    follower = ExplorationFollower(source, page, monotonic_s=lambda: now[0])

    def followed() -> float:
        now[0] += 1.0
        follower.follow()
        return source.explore_share

    assert followed() == 0.02, "no learner"
    page.beat()
    page.write(pid=1)
    assert followed() == 0.02, "it has not reported anything yet"
    page.write(explore_share=0.25, rate_factor=0.5)
    assert followed() == 0.25
    page.write(explore_share=0.5)
    follower.follow()
    assert source.explore_share == 0.25, "the page is not read in every round"
    assert followed() == 0.5
    page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
    assert followed() == 0.02, "it has stalled"
    page.beat()
    page.write(pid=0)
    assert followed() == 0.02, "it has ended"


def test_a_learner_has_the_cores_that_it_computes_on_while_it_lives(tmp_path: Path) -> None:
    page, now = LearnerStatusPage.create(tmp_path / "page"), [0.0]
    cores = LearnerCores(page, monotonic_s=lambda: now[0])

    def taken(busy_threads: int) -> int:
        now[0] += 1.0
        page.write(busy_threads=busy_threads)
        return cores()

    assert taken(3) == 0, "no learner"
    page.beat()
    page.write(pid=os.getpid())
    assert [taken(1), taken(3), taken(0), taken(2)] == [1, 3, 0, 2]
    page.write(heartbeat_ns=time.monotonic_ns() - int(20e9))
    assert taken(3) == 0, "it was killed at work"
