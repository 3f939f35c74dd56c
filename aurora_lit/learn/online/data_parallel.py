"""Data-parallel learning: several processes take each optimiser step together, each with its part of the batch.

The first process leads, the others follow. Before each step the leader broadcasts the batch and the schedules' state,
and its whole state when anything but a step has changed it. So all processes have the same weights, and those of the
leader are evaluated, published and saved; followers make no batches and evaluate no drafts. Messages are safetensors
and JSON (learn/data/training_state.py). Leaves out how a batch is divided (modules/losses/batch.py) and the step, which
sums the gradients (learn/online/learner.py).

Beside a server Fabric starts the followers as copies of the leader's own command, and they follow until it is done.
They meet in a file of the run folder, so no other process can join, and on the CPU talk over loopback only:

    fabric = launch_fabric(config.learn, run_folder)        # returns in every process
    with leader_process() as leader:                        # in the first process
        Learner(…, fabric=fabric, before_step=leader.broadcast_step)
    follower = Follower()                                   # in the others
    follower.follow(Learner(…, fabric=fabric))              # returns when the leader has ended its turn

In a replay (learn/offline/loop.py) `fabric run` starts all processes, and they follow for a block of traces at a
time: the leader ends each turn with `leader.end_turn()`. They use the group that Fabric has formed. Between machines it
needs no second connection, and its timeout tells when one of them is lost, since there is always something to do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy

from aurora_lit.distributed import use_loopback
from aurora_lit.errors import AuroraError
from aurora_lit.learn.data.training_state import from_bytes, to_bytes
from aurora_lit.learn.online.learner import Learner
from aurora_lit.learn.training_precision import training_precision
from aurora_lit.modules.losses.batch import OnlineBatch, TraceBatch
from aurora_lit.settings import LearnSettings

_IDLE_TIMEOUT = timedelta(days=365)
"""How long a follower waits for a step: without traffic there are no steps."""
_MEETING_TIMEOUT = timedelta(minutes=30)
"""How long processes wait for each other to load, and for each other in a step."""
_EXIT_TIMEOUT_S = 5.0
"""How long the leader waits for the followers to exit."""
_PIECE_BYTES = 64 << 20
"""A message goes through the device in pieces of so many bytes, since a learner's whole state is as large as what the
learner holds there."""
_END_OF_TURN = b""
"""The leader's message after the last step of a turn."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What the leader broadcasts before a step."""

    batch: OnlineBatch
    schedules: list[dict[str, Any]]
    state: dict[str, Any] | None
    """The learner's whole state; None if the followers have it already."""


class _LocalDDP(DDPStrategy):
    """DDP between processes of one machine. By itself it would open a port to the network that asks nobody's name."""

    def __init__(self, folder: Path) -> None:
        """folder: in which the processes meet, in a file named after the leader."""
        super().__init__()
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        self._path = folder / f"learners-{os.getpid() if leads else os.getppid()}"
        if leads:
            self._path.unlink(missing_ok=True)  # of a killed leader that had this number

    def setup_environment(self) -> None:
        """Form the group; Fabric uses one that is there."""
        device = self.root_device
        assert self.accelerator is not None
        self.accelerator.setup_device(device)
        store = dist.FileStore(str(self._path), self.num_processes)  # type: ignore[attr-defined]
        store.set_timeout(_MEETING_TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.local_rank,
            world_size=self.num_processes,
            timeout=_MEETING_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        super().setup_environment()


def launch_fabric(learn: LearnSettings, folder: Path, *, loggers: Sequence[Logger] = ()) -> Fabric:
    """Start the followers, if `learn.devices` asks for any: on CUDA GPUs if there are enough, else on the CPU.

    folder: private to the processes, which meet in a file in it.
    """
    alone = learn.devices == 1
    if not alone:
        os.environ.setdefault("LT_PRECISION", training_precision())  # the followers inherit it
        if sys.flags.safe_path:
            os.environ["PYTHONSAFEPATH"] = "1"  # as module_command has it; Fabric leaves out the flag
        use_loopback()
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= learn.devices
    fabric = Fabric(
        accelerator="cuda" if gpus else "cpu",
        devices=learn.devices,
        strategy="auto" if alone else _LocalDDP(folder),
        precision=training_precision(),
        plugins=[LightningEnvironment()],  # a SLURM job's tasks are not these processes
        loggers=list(loggers),
    )
    if not alone:
        fabric.launch()
    return fabric


class Leader:
    """The first process's side."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        """Form a group with the followers, which returns when all of them are there; or use the group of `fabric`."""
        self._group, self._device = _group_and_device(fabric)
        self._followers = psutil.Process().children()  # none under `fabric run`, which starts all processes
        self._num_changes_sent = -1

    def broadcast_step(self, learner: Learner, batch: OnlineBatch) -> None:
        """Have the followers take the step that this process is about to take. Raises AuroraError if one is gone."""
        changed = learner.num_weight_changes != self._num_changes_sent
        step = _Step(
            batch=batch,
            schedules=[schedule.state_dict() for schedule in learner.schedules],
            state=learner.state_dict() if changed else None,
        )
        self._send(_step_to_bytes(step))
        self._num_changes_sent = learner.num_weight_changes

    def end_turn(self) -> None:
        """Have the followers return from `follow`. Raises AuroraError if one is gone."""
        self._send(_END_OF_TURN)

    def cpu_s(self) -> float:
        """Processor seconds of all processes together, for the budget."""
        total = time.process_time()
        for follower in self._followers:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = follower.cpu_times()
                total += times.user + times.system
        return total

    def release_followers(self) -> None:
        """Let the followers exit, and wait for them a while."""
        with contextlib.suppress(AuroraError):  # they are gone
            self.end_turn()
        psutil.wait_procs(self._followers, timeout=_EXIT_TIMEOUT_S)

    def _send(self, message: bytes) -> None:
        try:
            _broadcast(message, self._group, self._device)
        except RuntimeError as error:
            raise AuroraError(f"the learner's processes cannot go on together: {error}") from error


@contextlib.contextmanager
def leader_process() -> Iterator[Leader]:
    """A leader that releases its followers at the end, after an error too."""
    leader = Leader()
    try:
        yield leader
    finally:
        leader.release_followers()


class Follower:
    """The side of each other process."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        """Form a group with the leader, which returns when all processes are there; or use the group of `fabric`."""
        self._group, self._device = _group_and_device(fabric)

    def follow(self, learner: Learner) -> None:
        """Take the leader's steps with it until it ends its turn. Raises AuroraError when it is gone."""
        while (step := self._next_step()) is not None:
            if step.state is not None:
                learner.load_state_dict(step.state)
            for schedule, state in zip(learner.schedules, step.schedules, strict=True):
                schedule.load_state_dict(state)
            learner.update(step.batch)

    def _next_step(self) -> _Step | None:
        try:
            message = _broadcast(None, self._group, self._device)
        except RuntimeError as error:
            raise AuroraError(f"the learner that leads this one is gone: {error}") from error
        return None if message == _END_OF_TURN else _step_from_bytes(message)


def broadcast_plain(fabric: Fabric, value: Any) -> Any:
    """The first process's `value`, of plain data and tensors (learn/data/training_state.py), in all of them."""
    if fabric.world_size == 1:
        return value
    message = to_bytes({"value": value}) if fabric.is_global_zero else None
    return from_bytes(_broadcast(message, *_group_and_device(fabric)))["value"]


def _group_and_device(fabric: Fabric | None) -> tuple[Any, torch.device]:
    """The group that `fabric` has formed, and where its messages are; without it, a new one for rare messages."""
    if fabric is not None:
        return dist.group.WORLD, fabric.device
    return dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT), torch.device("cpu")


def _broadcast(message: bytes | None, group: Any, device: torch.device) -> bytes:
    """Send the first process's message to all, its length first; None in the others. RuntimeError if one is gone."""
    length = torch.tensor([0 if message is None else len(message)], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0, group=group)
    content = bytearray(int(length)) if message is None else bytearray(message)
    for start in range(0, len(content), _PIECE_BYTES):
        part = torch.frombuffer(content, dtype=torch.uint8, offset=start, count=min(_PIECE_BYTES, len(content) - start))
        piece = part.to(device)
        dist.broadcast(piece, src=0, group=group)
        if message is None:
            part.copy_(piece)
    return bytes(content) if message is None else message


def _step_to_bytes(step: _Step) -> bytes:
    batch = {**vars(step.batch), "traces": vars(step.batch.traces)}
    return to_bytes({"batch": batch, "schedules": step.schedules, "state": step.state})


def _step_from_bytes(message: bytes) -> _Step:
    fields = from_bytes(message)
    batch, traces = fields["batch"], fields["batch"]["traces"]
    trace_batch = TraceBatch(**{**traces, "domains": tuple(traces["domains"])})
    return _Step(
        batch=OnlineBatch(**{**batch, "traces": trace_batch}),
        schedules=fields["schedules"],
        state=fields["state"],
    )
