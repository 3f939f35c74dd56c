"""An online learner and its environment: a loop in this process, or a learner's process beside a stand-in for a server.

harness = LearnerHarness(target, tmp_path, publish_every_steps=40)
harness.ring.records.extend(traces)                 # as if a server had pushed them
harness.tick_until(lambda: harness.loop.published >= 1)
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_lit.config import load_config
from aurora_lit.drafts.checkpoint import load_draft, save_draft
from aurora_lit.drafts.store import DraftStore
from aurora_lit.ipc.engine_status import STATUS_NAME, EngineStatusPage
from aurora_lit.ipc.learner_status import LEARNER_STATUS_NAME, LearnerStatusPage
from aurora_lit.ipc.ring import RingWriter
from aurora_lit.ipc.run_folder import RING_NAME
from aurora_lit.learn.data.online_batcher import OnlineBatcher
from aurora_lit.learn.data.reservoir import Reservoir
from aurora_lit.learn.data.target_head import TargetHead
from aurora_lit.learn.online.budget import Budget, ServerLoad, ShareLimit
from aurora_lit.learn.online.build import build_loop
from aurora_lit.learn.online.environment import LearnerEnvironment
from aurora_lit.learn.online.learner import STARTING_VERSION, Learner
from aurora_lit.learn.online.loop import OnlineLoop
from aurora_lit.learn.online.scores import HeldOutRequest
from aurora_lit.learn.online.trial import Trial
from aurora_lit.models.interface import Target
from aurora_lit.modules.domains.controller import DomainController
from aurora_lit.modules.draft.eagle3 import Eagle3Draft
from aurora_lit.settings import LearnSettings
from aurora_lit.traces.record import LAYOUT_DIGEST, Trace
from support.live_traces import FakeRing, asked_again, make_controller, online_module
from support.tiny_models import random_draft


class RiggedTrial(Trial):
    """Held-out requests for which a test may choose the champion's score: a high one has every challenger refused."""

    champion_score: float | None = None
    """None: the champion is scored as usual."""

    def __iter__(self) -> Iterator[HeldOutRequest]:
        for request in super().__iter__():
            if self.champion_score is not None:
                request.champion_score = self.champion_score
            yield request


class LearnerHarness:
    """A loop with a ring that the test fills, a real store and status page, and a budget without limit.

    Trials have no limit either, unless `limits_trials`. `told_before`: what the learner before has written to the page.
    `resumes`: it continues from the state that a learner has saved in the folder.
    """

    def __init__(
        self,
        target: Target,
        folder: Path,
        *,
        draft: Eagle3Draft | None = None,
        controller: DomainController | None = None,
        limits_trials: bool = False,
        told_before: Mapping[str, int] | None = None,
        resumes: bool = False,
        batch_positions: int = 512,
        max_repeated_share: float = 1.0,
        traffic: Sequence[Trace] = (),
        **settings: Any,
    ) -> None:
        config = LearnSettings(
            **{
                "publish_every_s": 0.0,
                "publish_every_steps": 20,
                "gate_requests": 12,
                **settings,
            }
        )
        folder.mkdir(exist_ok=True)
        self.traffic = traffic
        self.starting = draft or random_draft(target)
        self.store = DraftStore(folder / "live", keep=3)
        self.ring = FakeRing()
        self.target_head = TargetHead(target)
        self.page = LearnerStatusPage.create(folder / f"page{time.monotonic_ns()}")
        self.page.write(**(told_before or {}))
        module = online_module(target, copy.deepcopy(self.starting))
        self.learner = Learner(
            module,
            controller or make_controller(),
            folder / "learner.safetensors",
            target_head=self.target_head,
            version=STARTING_VERSION,
            ema_decay=settings.get("ema_decay", 0.0),
        )
        assert not resumes or self.learner.resume()
        self.load = ServerLoad.SPARE
        self.sleeps_s: list[float] = []
        self.environment = LearnerEnvironment(
            traces=self.ring,
            store=self.store,
            page=self.page,
            server_load=lambda: self.load,
            served_draft=self.served_draft,
            sleep=self.sleeps_s.append,
        )
        self.trial = RiggedTrial(seed=0, num_waiting=config.gate_requests)
        self.loop = OnlineLoop(
            self.environment,
            config=config,
            learner=self.learner,
            champion=online_module(target, copy.deepcopy(self.starting)),
            target_head=self.target_head,
            batcher=OnlineBatcher(
                Reservoir(folder / "reservoir", limit_bytes=1 << 24, seed=0),
                replay_share=0.5,
                batch_positions=batch_positions,
                live_bytes=1 << 24,
            ),
            trial=self.trial,
            budget=Budget(idle_share=1.0, share=1.0, cpu_s=lambda: 0.0),
        )
        self.loop._intake.max_repeated_share = max_repeated_share
        if not limits_trials:
            self.loop._trial_limit = ShareLimit(1.0)

    def ask(self, times: int) -> None:
        """As if the traffic were asked so often now, each time in new requests."""
        self.ring.records.extend(asked_again(self.traffic, times))

    def served_draft(self, version: str | None) -> Eagle3Draft:
        return self.starting if version is None else load_draft(self.store.folder / version, self.target_head)

    def tick_until(self, done: Callable[[], bool], *, max_ticks: int = 400) -> None:
        for _ in range(max_ticks):
            if done():
                return
            self.loop.tick()
        assert done(), f"not after {max_ticks} ticks; the gate decided {self.loop.decision}"


MakeHarness = Callable[..., LearnerHarness]
"""Makes one for the target and the traffic of the tests, in their folder unless another `folder` is given."""


class ServerStandIn:
    """What a learner's process needs of a server: a run folder with a ring and two status pages, and a live process."""

    def __init__(self, folder: Path, target_folder: Path, draft: Eagle3Draft) -> None:
        self.run_folder = folder / "run"
        self.run_folder.mkdir()
        self.ring = RingWriter.create(self.run_folder / RING_NAME, 1 << 24, layout=LAYOUT_DIGEST)
        self.page = LearnerStatusPage.create(self.run_folder / LEARNER_STATUS_NAME)
        EngineStatusPage.create(self.run_folder / STATUS_NAME).write(worker_pid=os.getpid())
        save_draft(draft, folder / "start", dtype=torch.float32)
        self.store = DraftStore(folder / "checkpoints" / "live")
        self.folder, self.target_folder = folder, target_folder

    @property
    def overrides(self) -> list[str]:
        learn = {
            "compute_share": 1.0,
            "learning_rate": 4e-3,
            "publish_every_s": 0.5,
            "publish_every_steps": 4,
            "gate_requests": 8,
            "reservoir_mb": 16,
        }
        return [
            f"target.source={self.target_folder}",
            "target.precision=fp32",
            f"draft.checkpoint={self.folder / 'start'}",
            f"checkpoint.dir={self.folder / 'checkpoints'}",
            "engine.max_seq_len=128",
            *(f"learn.{key}={value}" for key, value in learn.items()),
        ]

    def loop(self, *overrides: str) -> contextlib.AbstractContextManager[OnlineLoop]:
        """A learner's loop in this process."""
        config = load_config(None, [*self.overrides, *overrides])
        status = EngineStatusPage.open(self.run_folder / STATUS_NAME)
        return build_loop(config, self.run_folder, self.run_folder / RING_NAME, self.page, status)

    def start_learner(self) -> subprocess.Popen[str]:
        code = f"""
            from pathlib import Path
            from aurora_lit.config import load_config
            from aurora_lit.learn.online import build, intake, loop
            from aurora_lit.learn.online.process import run_learner
            build.BATCH_POSITIONS, intake.MAX_REPEATED_SHARE, loop.SAVE_EVERY_S = 256, 1.0, 0.2
            run_learner(load_config(None, {self.overrides!r}), Path({str(self.run_folder)!r}))
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, learner: subprocess.Popen[str], until: Callable[[], bool], *, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            if learner.poll() is not None or time.monotonic() > deadline:
                learner.kill()
                pytest.fail(f"{self.page.read()}\n{learner.communicate()[0][-3000:]}")
            time.sleep(0.05)
