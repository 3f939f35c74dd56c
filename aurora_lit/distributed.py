"""The processes that hold one target together: their groups, and the orders that rank 0 gives the others.

Rank 0 owns the engine. It sends an *order* before each thing that all ranks must do together, and every rank then does
it, so that their collectives match; whatever rank 0 does between orders the others need not know. Orders travel over
a gloo group of their own, on GPUs too, and the tensors of a pass over Fabric's (gloo on CPUs, NCCL on GPUs).
What is left out: what an order makes a rank do (models/sharded_target.py), and who ends whom when one dies (serve/server.py).

    ranks = Ranks(rank=0, size=2, folder=run_folder, strategy="fsdp")    # in each process; they wait for each other
    with ranks.order(FORWARD, ids_BT, starts_B): ...                     # rank 0
    order = ranks.next_order()                                           # the others, for ever

What fails in the midst of an order, a lost rank above all, raises RankError. The connection cannot be mended: the
process must end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from aurora_lit.errors import RankError

Strategy = Literal["fsdp", "tensor_parallel"]
Parallelize = Callable[[Any, DeviceMesh], Any]

_FILE_NAME = "ranks"
_INLINE_WORDS = 1024
"""Size of an order's first message; what does not fit follows in a second one."""
_MOST_TENSORS, _MOST_DIMS = 6, 3
_HEADER_WORDS = 3 + _MOST_TENSORS * (1 + _MOST_DIMS)
_COLLECTIVE_TIMEOUT = timedelta(minutes=5)
"""Far beyond any pass: dead or stopped processes are noticed by the server, this only ends a lockstep that broke."""
_IDLE_TIMEOUT = timedelta(days=365)
"""How long a rank waits for an order: an idle server gives none."""


class Op(IntEnum):
    """What an order is about."""

    STOP = 0
    VERSION = 1
    """The draft that proposes from now on: its name, one character a word."""
    SLOTS = 2
    FORWARD = 3
    LOGITS = 4
    EMBED = 5
    COPY = 6


@dataclass(frozen=True, kw_only=True)
class Order:
    """What rank 0 wants done."""

    op: Op
    tensors: tuple[torch.Tensor, ...]
    """int64, on the CPU."""
    version: str
    """Draft that proposes."""
    num_versions: int
    """Drafts announced so far."""


class Ranks:
    """One process's place among the others of this machine."""

    def __init__(self, *, rank: int, size: int, folder: Path, strategy: Strategy) -> None:
        """Meet the others; returns when all are there.

        `folder`: private to them and without traces of earlier meetings; they find each other through a file in it, so
        that no port is chosen beforehand and nobody else can join. The device is this rank's GPU where there are
        enough of them, else the CPU.
        """
        self.rank, self.size = rank, size
        self.version = ""
        """Draft that proposes, as rank 0 has announced it."""
        self.num_versions = 0
        """Announcements so far; every order carries it, and a rank that counts otherwise refuses the order."""
        self._lock = threading.RLock()
        self._broken = False
        self._parallelize: Parallelize | None = None
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens on the network
        if gpus:
            torch.cuda.set_device(rank)
        store = dist.FileStore(str(folder / _FILE_NAME), size)  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
        )
        self._control: Any = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        self.fabric = Fabric(
            accelerator="cuda" if gpus else "cpu",
            devices=size,
            strategy=ModelParallelStrategy(
                lambda model, mesh: self._parallelize(model, mesh),  # type: ignore[misc]
                data_parallel_size=size if strategy == "fsdp" else 1,
                tensor_parallel_size=1 if strategy == "fsdp" else size,
            ),
            plugins=[LightningEnvironment()],
        )
        self.fabric.launch()
        self.device = self.fabric.device

    def setup(self, model: nn.Module, parallelize: Parallelize) -> None:
        """Spread a model over the ranks, through Fabric's strategy."""
        self._parallelize = parallelize
        self.fabric.setup_module(model, move_to_device=False)

    def announce(self, version: str) -> None:
        """Tell all ranks which draft proposes from the next order on, if that has changed."""
        if version != self.version:
            with self.order(Op.VERSION, torch.tensor([ord(character) for character in version], dtype=torch.int64)):
                self.version = version
                self.num_versions += 1

    @contextmanager
    def order(self, op: Op, *tensors: torch.Tensor) -> Iterator[None]:
        """Have the others do `op` while inside; one order at a time, whichever thread gives it."""
        with self._lock:
            if self._broken:
                raise RankError(f"rank {self.rank} of {self.size} has lost the others")
            try:
                self._send(op, tensors)
                yield
            except RuntimeError as error:
                self._broken = True
                raise RankError(f"the engine's processes cannot go on together: {error}") from error
            except BaseException:
                self._broken = True  # the others may be in the midst of it
                raise

    def next_order(self) -> Order:
        """The next order; waits for it. Raises RankError when rank 0 is gone."""
        try:
            return self._receive()
        except RuntimeError as error:
            raise RankError(f"rank 0 of {self.size} is gone: {error}") from error

    def stop(self) -> None:
        """Let the others leave; does nothing when the connection is broken already."""
        if not self._broken:
            with self.order(Op.STOP):
                self._broken = True

    # -- collectives of a pass -------------------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; the same bits on every rank."""
        dist.all_reduce(tensor)
        return tensor

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, in place."""
        dist.broadcast(tensor, 0)
        return tensor

    def gather(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """All ranks' parts, of one shape, on rank 0; None on the others."""
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(part, parts, 0)
        return parts

    # -- orders as words -------------------------------------------------------------------------------------------

    def _send(self, op: Op, tensors: tuple[torch.Tensor, ...]) -> None:
        assert self.rank == 0
        assert len(tensors) <= _MOST_TENSORS
        shapes = torch.zeros(_MOST_TENSORS, 1 + _MOST_DIMS, dtype=torch.int64)
        for i, tensor in enumerate(tensors):
            shapes[i, 0] = tensor.ndim
            shapes[i, 1 : 1 + tensor.ndim] = torch.tensor(tensor.shape)
        head = torch.tensor([op, self.num_versions, len(tensors)])
        words = torch.cat([head, shapes.flatten(), *(tensor.flatten().cpu() for tensor in tensors)])
        first = torch.zeros(_INLINE_WORDS, dtype=torch.int64)
        first[: len(words)] = words[:_INLINE_WORDS]
        dist.broadcast(first, 0, group=self._control)
        if len(words) > _INLINE_WORDS:
            dist.broadcast(words[_INLINE_WORDS:].clone(), 0, group=self._control)

    def _receive(self) -> Order:
        words = torch.zeros(_INLINE_WORDS, dtype=torch.int64)
        dist.broadcast(words, 0, group=self._control)
        op, versions, count = words[:3].tolist()
        if versions != self.num_versions:
            raise RankError(f"rank {self.rank} knows {self.num_versions} drafts where rank 0 has announced {versions}")
        shapes = [row[1 : 1 + row[0]] for row in words[3:_HEADER_WORDS].view(_MOST_TENSORS, -1)[:count].tolist()]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        missing = _HEADER_WORDS + sum(sizes) - _INLINE_WORDS
        if missing > 0:
            rest = torch.zeros(missing, dtype=torch.int64)
            dist.broadcast(rest, 0, group=self._control)
            words = torch.cat([words, rest])
        parts = torch.split(words[_HEADER_WORDS : _HEADER_WORDS + sum(sizes)], sizes)
        tensors = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        if op == Op.VERSION:
            self.version = "".join(map(chr, tensors[0].tolist()))
            self.num_versions += 1
        return Order(op=Op(op), tensors=tensors, version=self.version, num_versions=self.num_versions)
