"""Several processes that learn together, each from its part of every batch: the first one leads, the others follow.

Fabric starts the others as copies of the leader's own command. They read no traffic and judge nothing: before a step
the leader sends them the batch and its schedules, on which the step depends, and the whole state where anything but a
step has changed it. So weights are the same in all of them, and the leader's are tried, published and saved.
What is left out: which part of a batch is whose (modules/losses/batch.py), and the step, which adds up their gradients
(learn/online/learner.py).

    fabric = launched(config.learn)                         # returns in every process; then they meet:
    with leading() as leader:                               # in the first process
        Learner(…, fabric=fabric, before_step=leader.share)
    follower = Follower()                                   # in the others
    follower.follow(Learner(…, fabric=fabric))              # returns when the leader dismisses them
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger

from aurora_lit.errors import AuroraError
from aurora_lit.learn.online.learner import Learner
from aurora_lit.modules.losses.batch import OnlineBatch
from aurora_lit.settings import LearnSettings

_IDLE_TIMEOUT = timedelta(days=365)
"""How long a follower waits for a step: where there is no traffic there is none."""
_LEAVING_S = 5.0
"""How long the leader waits for the others to leave."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What the leader sends."""

    batch: OnlineBatch
    schedules: list[dict[str, Any]]
    state: dict[str, Any] | None
    """None: the follower has it already."""


def launched(learn: LearnSettings, *, loggers: Sequence[Logger] = ()) -> Fabric:
    """Start the further processes, if any: on as many GPUs where there are enough, else on the CPU."""
    alone = learn.devices == 1
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= learn.devices
    fabric = Fabric(
        accelerator="auto" if alone else "cuda" if gpus else "cpu",
        devices=learn.devices,
        strategy="auto" if alone else "ddp",
        precision="bf16-mixed",
        loggers=list(loggers),
    )
    if not alone:
        fabric.launch()
    return fabric


class Leader:
    """The first process's side."""

    def __init__(self) -> None:
        """Meet the others; returns when all are there."""
        self._group = _control_group()
        self._followers = psutil.Process().children()
        self._changes_sent = -1

    def share(self, learner: Learner, batch: OnlineBatch) -> None:
        """Have the others take the step that this process is about to take. Raises AuroraError when one is gone."""
        new = learner.num_changes != self._changes_sent
        step = _Step(
            batch=batch,
            schedules=[schedule.state_dict() for schedule in learner.schedules],
            state=learner.state() if new else None,
        )
        try:
            self._send(step)
        except RuntimeError as error:
            raise AuroraError(f"the learner's processes cannot go on together: {error}") from error
        self._changes_sent = learner.num_changes

    def processor_s(self) -> float:
        """Processor seconds of all of them, for the budget."""
        total = time.process_time()
        for follower in self._followers:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = follower.cpu_times()
                total += times.user + times.system
        return total

    def dismiss(self) -> None:
        """Let the others leave, and see them off."""
        with contextlib.suppress(RuntimeError):  # they are gone
            self._send(None)
        psutil.wait_procs(self._followers, timeout=_LEAVING_S)

    def _send(self, step: _Step | None) -> None:
        stream = io.BytesIO()
        torch.save(step, stream)
        dist.broadcast_object_list([stream.getvalue()], src=0, group=self._group)


@contextlib.contextmanager
def leading() -> Iterator[Leader]:
    """A leader whose followers leave when this is left, however it is left."""
    leader = Leader()
    try:
        yield leader
    finally:
        leader.dismiss()


class Follower:
    """The side of each of the others."""

    def __init__(self) -> None:
        """Meet the leader; returns when all are there."""
        self._group = _control_group()

    def follow(self, learner: Learner) -> None:
        """Take the leader's steps with it until it has enough. Raises AuroraError when it is gone."""
        while (step := self._next_step()) is not None:
            if step.state is not None:
                learner.take(step.state)
            for schedule, state in zip(learner.schedules, step.schedules, strict=True):
                schedule.load_state_dict(state)
            learner.update(step.batch)

    def _next_step(self) -> _Step | None:
        message: list[Any] = [None]
        try:
            dist.broadcast_object_list(message, src=0, group=self._group)
        except RuntimeError as error:
            raise AuroraError(f"the learner that leads this one is gone: {error}") from error
        step: _Step | None = torch.load(io.BytesIO(message[0]), map_location="cpu", weights_only=False)
        return step


def _control_group() -> Any:
    return dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
